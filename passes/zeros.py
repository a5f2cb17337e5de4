"""Which zeros does XLA:TPU fill inside the kernel that adds rows to them?

The gradient of a table is zeros that rows are added to. Where the table is small
(`Fitted.filled_inside`), or more rows are added than an eighth of its own, which are sorted first,
the kernel of the scatter fills it; like any scatter it has no estimate, and is priced by what it
moves. Else a broadcast of its own does, in small pieces. Apart from that a scatter touches no rows
but those that it adds to, as a gather reads none that is not picked.

Seen with Adagrad on one device, tables of 3000 to 2^20 rows of 4 to 1024 float32, and 256 to 65536
rows added, for v6e: none of 8192 rows for 65536 and 32768 for 262144 is filled inside, all of 10240
and 49152 are. The same for 65536 rows on v5e and v5p; and so are steps of DLRM, BERT and mixtures
of experts compiled. (jax 0.10.2, libtpu 0.0.42.1.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cost_models.fitted import LANES
from passes.ir.graph import Graph

_MANY = 1 / 8  # of a table's rows


def added_to(graph: Graph) -> Mapping[int, int]:
    """By the operation that fills a table with a constant, the one that adds rows to it."""
    makers, readers = graph.producers(), graph.consumers()
    out: dict[int, int] = {}
    for op in graph.ops:
        if op.name != "scatter-add" or len(graph.values[op.inputs[0]].shape) != 2:
            continue
        table, rows = op.inputs[0], graph.values[op.inputs[2]].shape
        if makers[table] < 0 or len(readers[table]) > 1 or len(rows) < 2:
            continue
        fill = graph.ops[makers[table]]
        constant = fill.name == "broadcast_in_dim" and not graph.values[fill.inputs[0]].shape
        if constant and rows[-1] == graph.values[table].shape[-1]:
            out[fill.id] = op.id
    return out


def filled_inside(shape: Sequence[int], bits: int, added: float, small: float) -> bool:
    """Whether the kernel that adds so many rows to a table of this shape fills it, on one device.

    small: bytes of a table, each row along the lanes, up to which it does in any case.

    >>> [filled_inside((65536, 128), 32, n, 30 * 2**20) for n in (8192, 10240)]
    [False, True]
    >>> [filled_inside((n, 128), 32, 256, 30 * 2**20) for n in (32768, 65536)]
    [True, False]
    """
    rows, width = shape
    nbytes = rows * -(-width // LANES) * LANES * bits / 8
    return nbytes <= small or added > rows * _MANY
