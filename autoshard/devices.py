"""Which cluster are we on?  The catalogue entry that the devices jax has stand for.

Each file of the catalogue says under which names jax knows its chip (`device_kinds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from cost_models import cluster_file
from cost_models.cluster import Cluster, UnknownCluster, cluster, names


def cluster_here() -> Cluster:
    """The cluster of `jax.devices()`; raises UnknownCluster for hardware not in the catalogue."""
    devices = jax.devices()
    kind = devices[0].device_kind
    name = cluster_file.by_device_kind(kind)
    file = name and cluster_file.catalogue_file(name)
    if not file:
        raise UnknownCluster(
            f"jax has {len(devices)} devices of kind {kind!r}, which the catalogue does not know "
            f"({', '.join(names())}): name the nearest with cluster=..., or write a file"
        )
    wires = cluster_file.read(file)["network"][-1]
    return cluster(f"{name}:{_shape(devices, wires)}")


def _shape(devices: Sequence[Any], wires: dict[str, Any]) -> str:
    """How many there are along each dim: nodes or slices, if several, then what these wires join.

    >>> from types import SimpleNamespace as Device
    >>> chips = [Device(coords=(x, y, 0), process_index=0) for y in range(2) for x in range(4)]
    >>> _shape(chips, {"kind": "torus", "dims": 3}), _shape(chips, {"kind": "torus", "dims": 2})
    ('4x2x1', '4x2')
    """
    if wires["kind"] == "torus":
        groups = {getattr(d, "slice_index", 0) or 0 for d in devices}
        inside = [len({d.coords[i] for d in devices}) for i in range(wires["dims"])]
    else:
        groups = {d.process_index for d in devices} if devices[0].platform != "cpu" else {0}
        inside = [len(devices) // len(groups)]
    return "x".join(map(str, [len(groups), *inside] if len(groups) > 1 else inside))
