"""Which devices form a mesh, and how is a plan's sharding written for jax?

Meshes have Auto axes: the compiler's partitioner follows our constraints (Explicit axes, jax's
default since 0.9, would make every operation check its own sharding instead).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from passes.ir.mesh import Mesh
from passes.ir.sharding import Sharding


class DevicesError(ValueError):
    """Devices that can not form a mesh: too few, one of them twice, or no devices at all."""


def device_mesh(mesh: Mesh, devices: Sequence[Any] | None) -> jax.sharding.Mesh:
    """A jax mesh over these devices (None: the ones jax has), in the order of the plan's axes.

    TPU devices are put in the order of their place in the torus, as the cost model assumes.
    """
    found = checked_devices(jax.devices() if devices is None else devices)
    if len(found) < mesh.devices:
        raise DevicesError(
            f"the plan's mesh {mesh} needs {mesh.devices} devices, but only {len(found)} are here; "
            "for virtual CPU devices set jax.config.update('jax_num_cpu_devices', "
            f"{mesh.devices}) before jax starts"
        )
    found = found[: mesh.devices]
    types = (AxisType.Auto,) * len(mesh.names)
    return jax.sharding.Mesh(_grid(found, mesh.sizes), mesh.names, axis_types=types)


def lowering_platform(device: Any) -> str:
    """What jax lowers for on this device: its platform, of GPUs by their maker."""
    if device.platform != "gpu":
        return str(device.platform)
    version = str(getattr(getattr(device, "client", None), "platform_version", ""))
    return "rocm" if "rocm" in version.lower() else "cuda"


def checked_devices(devices: Any) -> list[Any]:
    """The devices in a list; DevicesError for what is no device, and for one given twice."""
    found = list(np.asarray(devices, dtype=object).flat)
    for d in found:
        if not (hasattr(d, "platform") and hasattr(d, "id")):
            raise DevicesError(f"{d!r:.60} is no device; give a list such as jax.devices()[:8]")
    if len(set(found)) < len(found):
        twice = next(d for k, d in enumerate(found) if d in found[:k])
        raise DevicesError(f"device {twice} is given twice; a mesh has each device once")
    return found


def _grid(devices: list[Any], sizes: tuple[int, ...]) -> Any:
    """The devices as an array of the mesh's shape."""
    on_torus = all(hasattr(d, "coords") for d in devices)
    slices = {getattr(d, "slice_index", 0) or 0 for d in devices}
    if on_torus and len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if on_torus:
        devices = sorted(devices, key=lambda d: (d.slice_index, tuple(d.coords)))
    grid = np.empty(len(devices), dtype=object)
    grid[:] = devices
    return grid.reshape(sizes)


def partition_spec(spec: Sequence[Sequence[str]]) -> PartitionSpec:
    """A PartitionSpec from axis names per dim, trailing unsplit dims left out."""
    entries: list[Any] = [None if not s else s[0] if len(s) == 1 else tuple(s) for s in spec]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def named_sharding(
    axes: tuple[int, ...],
    rank: int,
    mesh: Mesh,
    devices: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> NamedSharding:
    """The jax sharding of a value of this rank."""
    return NamedSharding(devices, partition_spec(Sharding(axes).spec(rank, mesh)))
