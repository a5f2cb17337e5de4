"""Which sums add up rows that are picked of a table, a bag of them at a time?

XLA:TPU lays each picked row along the lanes of tiles, whatever its length. Where the rows of a bag
are no whole tiles of 8, each bag has tiles of its own, and a kernel that does nothing else adds up
its rows, or spreads a bag's gradient over them. It takes some 20 to 30 cycles for a tile: for four
rows of 128 float32 five to ten times what the memory takes. Rows of fewer than 128 columns are
copied into such tiles, and the gradients of theirs out of them. (Bags of 2 and 4 rows of 8 to 512
columns, for v5e and v6e. With 8 rows both are done inside other kernels, at about what the memory
takes; so is such a sum where no gather or scatter stands beside it and the layout is free. What an
all-to-all of such rows copies: `passes.reshard_copies`. jax 0.10.2, libtpu 0.0.42.1.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cost_models.fitted import LANES
from passes.ir.graph import Graph

SUBLANES = 8
SCATTERS = frozenset({"scatter-add", "scatter"})


def bags(graph: Graph) -> Mapping[int, int]:
    """By operation that adds up bags of rows, or spreads over them, the value that has all rows."""
    makers, readers = graph.producers(), graph.consumers()
    out: dict[int, int] = {}
    for op in graph.ops:
        if op.name == "reduce_sum":
            (v,) = op.inputs
            dims = [d for d, _ in enumerate(graph.values[v].shape)]
            picked = makers[v] >= 0 and graph.ops[makers[v]].name == "gather"
            if picked and len(dims) > 2 and tuple(op.params["axes"]) == (dims[-2],):
                out[op.id] = v
        elif op.name == "broadcast_in_dim":
            (v,) = op.outputs
            rank = len(graph.values[v].shape)
            kept = [d for d in range(rank) if d != rank - 2]
            spread = rank > 2 and list(op.params["broadcast_dimensions"]) == kept
            updates = [k == 2 and graph.ops[o].name in SCATTERS for o, k in readers[v]]
            if spread and updates and all(updates):
                out[op.id] = v
    return out


def picked(graph: Graph) -> Mapping[int, int]:
    """Values that hold bags of rows of a table, [..., rows of a bag, columns]: the table's rows.

    They are picked of it, or are added to it.
    """
    out: dict[int, int] = {}
    for op in graph.ops:
        if op.name == "gather" or op.name in SCATTERS:
            v = op.outputs[0] if op.name == "gather" else op.inputs[2]
            table, bag = graph.values[op.inputs[0]].shape, graph.values[v].shape
            if len(table) == 2 and len(bag) > 2 and bag[-1] == table[1] and bag[-2] > 1:
                out[v] = table[0]
    return out


def tiles(shape: Sequence[int]) -> int:
    """Tiles of bags of rows, [..., rows of a bag, columns] on one device; 0 where bags share them.

    >>> tiles((1024, 4, 8)), tiles((1024, 4, 128)), tiles((1024, 20, 256)), tiles((1024, 8, 128))
    (1024, 1024, 6144, 0)
    """
    *outer, rows, columns = shape
    whole = rows % SUBLANES == 0
    return 0 if whole else math.prod(outer) * -(-rows // SUBLANES) * -(-columns // LANES)


def tile_bytes(shape: Sequence[int], bits: int) -> float:
    """Bytes of all rows, each along the lanes of tiles; 0 where they need no copy."""
    *outer, columns = shape
    return math.prod(outer) * LANES * bits / 8 if columns < LANES and tiles(shape) else 0.0
