"""Which meshes are there to try?  `candidate_meshes(cluster, names) -> list[Mesh]`.

Every factorisation of the device count into at most three axes, the slowest axis first, so that the
last axis lies on the fastest links; of those that lie on the same links only one.
"""

from __future__ import annotations

from collections.abc import Sequence

from cost_models.cluster import Cluster
from cost_models.topology import AxisLink, lay
from passes.ir.graph import Hint
from passes.ir.mesh import Mesh

AXIS_NAMES = ("data", "model", "seq")
_SPARE = ("x", "y", "z")  # where time axes have such names


def candidate_meshes(
    cluster: Cluster, names: Sequence[str] = (), taken: Sequence[str] = ()
) -> list[Mesh]:
    """Factorisations of the device count into one to three axes, without those that are the same.

    names: axis names that hints use; every mesh then has them all, in this order, and splits
    something along each unless the devices are too few. taken: names of time axes.
    """
    own = [n for n in (*AXIS_NAMES, *_SPARE) if n not in taken][: len(AXIS_NAMES)]
    return _meshes(cluster, names, own, 2) or _meshes(cluster, names, own, 1)


def _meshes(
    cluster: Cluster, names: Sequence[str], own: Sequence[str], least_size: int
) -> list[Mesh]:
    wanted = [*names, *(n for n in own if n not in names)]
    least = max(1, len(names))
    out: list[Mesh] = []
    seen: set[object] = set()
    most = max(3, least) if least_size > 1 else least
    for count in range(least, most + 1):
        for sizes in _factorisations(cluster.devices, count, least_size):
            # Without hints names mean nothing: the same links in another order are the same.
            links = lay(cluster, sizes)
            key: object = sizes if names else tuple(sorted(map(repr, links)))
            if key not in seen:
                seen.add(key)
                out.append(Mesh(tuple(wanted[:count]), sizes))
    return out


def _factorisations(n: int, count: int, least: int) -> list[tuple[int, ...]]:
    if count == 1:
        return [(n,)] if n >= least else []
    out = []
    for first in sorted((d for d in range(least, n + 1) if n % d == 0), reverse=True):
        out += [(first, *rest) for rest in _factorisations(n // first, count - 1, least)]
    return out


def links_of(cluster: Cluster, mesh: Mesh) -> tuple[AxisLink, ...]:
    """The links of each axis; of a mesh of fewer devices those of one of many, side by side."""
    if mesh.devices == cluster.devices or cluster.devices % mesh.devices:
        return lay(cluster, mesh.sizes)
    return lay(cluster, (cluster.devices // mesh.devices, *mesh.sizes))[1:]


def natural_meshes(solver: str, meshes: Sequence[Mesh]) -> list[Mesh]:
    """The meshes an expert would use a baseline on: one axis, two for fsdp+tp, either for tp."""
    want = {"tp": (1, 2), "fsdp+tp": (2,)}.get(solver, (1,))
    found = [m for m in meshes if len([s for s in m.sizes if s > 1]) in want]
    return found or list(meshes)


def names_of(hints: Sequence[Hint]) -> tuple[str, ...]:
    """Axis names that hints use, ours first."""
    names = [a for h in hints for axes in h.dims if axes for a in axes]
    order = {n: k for k, n in enumerate(AXIS_NAMES)}
    return tuple(sorted(dict.fromkeys(names), key=lambda n: (order.get(n, 99),)))


def axes_of(mesh: Mesh) -> tuple[tuple[str, int], ...]:
    """Name and size of every axis."""
    return tuple(zip(mesh.names, mesh.sizes, strict=True))
