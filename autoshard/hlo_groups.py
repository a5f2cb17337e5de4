"""Which devices take part in a collective of a compiled program, and along which mesh axes?

XLA writes groups of devices in four ways: `{{0,1},{2,3}}`; `[2,4]<=[8]`, ids cut into rows, perhaps
after a transpose as in `[2,4]<=[4,2]T(1,0)`; `mesh['a'=2,'b'=4] {'b'}`, all devices along axes of
a mesh, perhaps with its `device_ids=([4,2]T(1,0))`; and `{}` for all of them.

>>> groups("replica_groups=[2,4]<=[4,2]T(1,0)", 8)
((0, 2, 4, 6), (1, 3, 5, 7))
>>> groups("replica_groups=mesh['x'=2,'y'=4] {'y'}", 8)
((0, 1, 2, 3), (4, 5, 6, 7))
>>> axes_of(((0, 1, 2, 3), (4, 5, 6, 7)), (2, 2, 2))
(1, 2)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Groups = tuple[tuple[int, ...], ...]
Ids = npt.NDArray[np.intp]

_LISTED = re.compile(r"replica_groups=\{(\{[\d, {}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)(?= \{))? \{([^}]*)\}")
_TURNED = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d, {}]*\})\}")


def groups(attributes: str, devices: int) -> Groups:
    """Ids of the devices of each group; of a permute, of those that a value passes through."""
    if found := _PAIRS.search(attributes):
        return _cycles([(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", found[1])])
    if found := _LISTED.search(attributes):
        return tuple(tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", found[1]))
    if found := _IOTA.search(attributes):
        rows, columns = int(found[1]), int(found[2])
        ids = np.arange(rows * columns).reshape([int(n) for n in found[3].split(",")])
        if found[4]:
            ids = ids.transpose([int(n) for n in found[4].split(",")])
        return _rows(ids.reshape(rows, columns))
    if found := _MESH.search(attributes):
        return _along(found[1], found[2], found[3])
    return (tuple(range(devices)),)


def _rows(ids: Ids) -> Groups:
    return tuple(tuple(int(i) for i in row) for row in ids)


def _along(mesh: str, order: str | None, axes: str) -> Groups:
    """Groups along axes of a mesh; `'a':(2)4` is the part of axis a with 2 parts before it."""
    sizes = {name: int(n) for name, n in re.findall(r"'?([\w.]+)'?=(\d+)", mesh)}
    dims: list[int] = []
    at: list[int] = []
    wanted = {
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([\w.]+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, size in sizes.items():
        cuts = sorted({1, size, *(c for n, b, s in wanted if n == name for c in (b, b * s))})
        for low, high in pairwise(cuts):
            if any(n == name and b <= low and high <= b * s for n, b, s in wanted):
                at.append(len(dims))
            dims.append(high // low)
    whole = math.prod(dims)
    ids = _ids(order, whole)
    apart = [k for k in range(len(dims)) if k not in at]
    together = math.prod(dims[k] for k in at)
    return _rows(ids.reshape(dims).transpose([*apart, *at]).reshape(whole // together, together))


def _ids(order: str | None, whole: int) -> Ids:
    """Devices in the order of the mesh: counted up, listed, or as `[2,2,2]T(1,0,2)` turns them."""
    if not order:
        return np.arange(whole)
    if found := _TURNED.fullmatch(order):
        ids = np.arange(whole).reshape([int(n) for n in found[1].split(",")])
        return ids.transpose([int(n) for n in found[2].split(",")]).ravel() if found[2] else ids
    return np.array([int(i) for i in order.split(",")])


def _cycles(pairs: Sequence[tuple[int, int]]) -> Groups:
    """Devices that are joined by pairs of a source and a target."""
    home = {i: i for pair in pairs for i in pair}

    def root(i: int) -> int:
        while home[i] != i:
            home[i] = home[home[i]]
            i = home[i]
        return i

    for a, b in pairs:
        home[root(b)] = root(a)
    out: dict[int, list[int]] = {}
    for i in sorted(home):
        out.setdefault(root(i), []).append(i)
    return tuple(tuple(g) for g in out.values())


def axes_of(found: Groups, sizes: Sequence[int]) -> tuple[int, ...] | None:
    """The mesh axes along which these groups lie; None where they are no whole axes of the mesh.

    Devices are numbered row by row over the mesh's sizes.
    """
    largest = max(found, key=len)
    if math.prod(sizes) <= max(largest):
        return None
    places = np.array(np.unravel_index(np.array(largest), tuple(sizes)))
    varied = tuple(a for a, row in enumerate(places) if len(set(row.tolist())) > 1)
    whole = math.prod(sizes[a] for a in varied) == len(largest)
    return varied if whole else None
