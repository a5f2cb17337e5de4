"""What does XLA:TPU lay anew around an all-to-all, and what do these copies take?

An all-to-all sends blocks that lie one after the other in memory: before it, the dim that it splits
must be the outermost one, and after it, the dim that it puts together is. The outermost is the
first, mostly. Where another one is wanted there, the blocks are copied: [B, S, N] from S(0) to S(1)
before it, from S(1) to S(0) after it, from S(1) to S(2) before and after. Dims of one on a device
do not count: from S(0) to S(1) of one row each, nothing is copied.

A copy in HBM takes what any kernel does that reads and writes as much. What stays in VMEM has no
traffic; there, whole tiles of float32 are moved in no time, those of bfloat16 as a lone operation
works on their elements. An array of two dims is transposed instead, in no time in VMEM.

Bags of rows of a table, [..., rows of a bag, columns], lie in tiles of their own, with the columns
along the lanes, fewer than 128 on a device though they be. Before an all-to-all that puts the
columns together, and after one that splits them, each tile is laid anew with its rows along the
lanes. That takes the same 7 to 12 cycles for a tile of 2, 4 or 8 rows of 8 to 64 columns, in
float32 and bfloat16. Rows that are picked of a huge table, or added to it, lie as it does, and are
laid into such tiles first, or out of them, if they do not fill them. (Sums of bags of 2 to 20 rows
and their gradients, for v5e; of 4 to 16 for v5p and v6e. Not counted: bfloat16 in VMEM takes
nothing of that, and whole tiles of huge tables take their columns for their bags.)

(Products and sums with all-to-alls of [B, S, N], of [B, S, T, N] and of [N, M] between them, all
pairs of dims, in bfloat16 and float32, 2 to 128 MiB on each of 16 devices of v5e; [B, S, N] of 8
and 64 MiB on v5p and v6e, too. Not counted: a product or sum behind it reads blocks of 128 columns
and more of a last dim as they arrive, without the copy; where a product has made such, it is
transposed while it is copied, which takes up to twice as long. Where the blocks have fewer than 128
elements along every dim, what moves between two other dims than the first is reshaped too, which
takes a float32 array 10 to 18 times as long as memory would. jax 0.10.2, libtpu 0.0.42.1.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cost_models.cluster import Chip, Cluster
from cost_models.fitted import LANES
from cost_models.vector import kernel_seconds
from passes.bags import SUBLANES
from passes.ir.sharding import BROADCAST
from passes.relaid import AS_IT_LIES
from passes.reshard import Axes, Step

Numbers = npt.NDArray[np.intp]


class Copies(NamedTuple):
    """[source, target]: how many copies the all-to-alls between two shardings take, of an array in
    how many parts, and whether it has two dims only. tiles: those of picked rows that are turned.
    """

    number: Numbers
    parts: Numbers
    flat: npt.NDArray[np.bool_]
    tiles: Numbers


class Moved(NamedTuple):
    """What is resharded. table: the rows of the table whose rows it holds, in bags; 0: none."""

    shape: tuple[int, ...]
    table: int = 0


def copying_chip(cluster: Cluster) -> Chip | None:
    """The chip of a cluster whose compiler makes such copies."""
    return cluster.chip if cluster.platform == "tpu" and cluster.chip.fitted else None


def exchanges(moves: Sequence[Step]) -> bool:
    """Whether there is an all-to-all among these moves."""
    return any(s.kind == "all_to_all" for s in moves)


def copies(
    sources: Sequence[Axes], targets: Sequence[Axes], value: Moved, sizes: Sequence[int]
) -> Copies:
    """Those of all pairs of shardings of an array, were each changed by all-to-alls.

    >>> s = [(0,), (1,), (2,)]
    >>> copies(s, s, Moved((64, 4096, 1024)), (16,)).number.tolist()
    [[0, 1, 1], [1, 0, 2], [1, 2, 0]]
    >>> copies(s, s, Moved((16, 4096, 1024)), (16,)).number.tolist()
    [[0, 0, 1], [0, 0, 2], [1, 2, 0]]
    >>> copies(s, s, Moved((8192, 4, 128), 100000), (16,)).tiles.tolist()
    [[0, 0, 8192], [0, 0, 8192], [8192, 8192, 0]]
    """
    before, after = np.array(sources, np.intp), np.array(targets, np.intp)
    local, arrived = _local(before, value.shape, sizes), _local(after, value.shape, sizes)
    number = np.zeros((len(before), len(after)), np.intp)
    parts, tiles = np.ones_like(number), np.zeros_like(number)
    first, first_then = (local > 1).argmax(axis=1)[:, None], (arrived > 1).argmax(axis=1)
    for a, n in enumerate(sizes):
        d, e = before[:, a, None], after[None, :, a]
        moved = (d > BROADCAST) & (e > BROADCAST) & (d != e) & (n > 1)
        number += moved * ((e != first).astype(np.intp) + (d != first_then))
        if value.table:
            last = len(value.shape) - 1
            put_together, split = moved & (d == last), moved & (e == last)
            tiles = np.maximum(tiles, put_together * _tiles(local)[:, None])
            tiles = np.maximum(tiles, split * _tiles(arrived))
        parts *= np.where((d > BROADCAST) | (e > BROADCAST), n, 1)
    flat = np.broadcast_to((local > 1).sum(axis=1)[:, None] <= 2, number.shape)
    return Copies(number, parts, flat, tiles)


class Kind(NamedTuple):
    """Copies that take the same: of tiles that are turned, or of an array in so many parts."""

    tiles: int
    parts: int
    flat: bool


def by_kind(found: Copies, there: npt.NDArray[np.bool_]) -> list[tuple[Kind, Numbers]]:
    """How many copies of each kind there are. there: between which shardings there are any."""
    out = []
    number = found.number * there
    for flat in (False, True):
        alike = (number > 0) & (found.flat == flat)
        for p in np.unique(found.parts[alike]).tolist():
            out.append((Kind(0, p, flat), number * (alike & (found.parts == p))))
    tiles = found.tiles * there
    for n in np.unique(tiles[tiles > 0]).tolist():
        out.append((Kind(n, 1, False), (tiles == n).astype(np.intp)))
    return out


def _tiles(local: Numbers) -> Numbers:
    """Of bags of rows with these shapes; 0 where a row fills the lanes."""
    full = local[:, :-2].prod(axis=1) * -(-local[:, -2] // SUBLANES)
    return np.where(local[:, -1] < LANES, full, 0)


def turned_seconds(chip: Chip, value: Moved, tiles: int) -> float:
    """Seconds to turn so many tiles, and to lay rows of a huge table into them, or out of them."""
    f, rows = chip.fitted, value.shape[-2]
    assert f is not None, "only for chips with fitted constants"
    time = tiles * f.tile_turned
    if value.table >= AS_IT_LIES and rows % SUBLANES:
        time += turned_bytes(value.shape, tiles, 32) / f.stream
    return time


def turned_bytes(shape: Sequence[int], tiles: int, bits: int) -> float:
    """Bytes of so many tiles of bags of rows.

    >>> turned_bytes((8192, 4, 128), 8192, 32) / 8192
    2048.0
    """
    rows = min(SUBLANES, 1 << (shape[-2] - 1).bit_length())
    return tiles * LANES * rows * bits / 8


def _local(axes: Numbers, shape: Sequence[int], sizes: Sequence[int]) -> Numbers:
    """[sharding, dim]: the shape on one device."""
    local = np.tile(np.array(shape, np.intp), (len(axes), 1))
    for a, n in enumerate(sizes):
        for d in range(len(shape)):
            local[axes[:, a] == d, d] //= n
    return local


def copy_seconds(chip: Chip, elements: float, nbytes: float, flat: bool) -> float:
    """Seconds of one copy on one device. flat: of an array of two dims."""
    f = chip.fitted
    assert f is not None, "only for chips with fitted constants"
    wide, moved = nbytes >= 4 * elements, 2 * nbytes
    if nbytes > f.handed_on * f.vmem:
        return kernel_seconds(chip, elements, moved, wide)
    if wide or flat:
        return 0.0
    return kernel_seconds(chip, elements, moved, wide, alone=True) - moved / f.stream
