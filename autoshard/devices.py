"""Which cluster are we on?  The catalogue entry that the devices jax has stand for."""

from __future__ import annotations

import jax

from cost_models.cluster import Cluster, UnknownCluster, cluster, names

# jax's device_kind (a part of it, lower case) to the catalogue's name.
_KINDS = (
    ("v5 lite", "tpu-v5e"),
    ("v5e", "tpu-v5e"),
    ("v5p", "tpu-v5p"),
    ("v5", "tpu-v5p"),
    ("v6", "tpu-v6e"),
    ("v4", "tpu-v4"),
    ("h200", "h200"),
    ("h100", "h100"),
    ("a100", "a100"),
)


def cluster_here() -> Cluster:
    """The cluster of `jax.devices()`; raises UnknownCluster for hardware not in the catalogue."""
    devices = jax.devices()
    first = devices[0]
    if first.platform == "cpu":
        return cluster(f"cpu:{len(devices)}")
    kind = first.device_kind.lower()
    for part, name in _KINDS:
        if part in kind:
            return cluster(f"{name}:{_shape(devices)}")
    raise UnknownCluster(
        f"jax has {len(devices)} devices of kind {first.device_kind!r}, which the catalogue does "
        f"not know ({', '.join(names())}): name the nearest with cluster=..., or write a file"
    )


def _shape(devices: list[jax.Device]) -> str:
    if all(hasattr(d, "coords") for d in devices):
        extents = [len({d.coords[i] for d in devices}) for i in range(len(devices[0].coords))]
        if extents[-1] == 1 and len(extents) == 3:
            extents = extents[:2]
        return "x".join(map(str, extents))
    nodes = len({d.process_index for d in devices})
    return f"{nodes}x{len(devices) // nodes}" if nodes > 1 else str(len(devices))
