"""Which gradients does XLA:TPU make column by column, and the state with them?

For v6e a product's kernel computes its first operand as it reads it, but not the second. Where it
is the second that is computed, the compiler swaps the two, and the product comes out transposed.
That is no matter inside a program; but a gradient meets its weight and the optimizer's state there,
which the caller has laid row by row. XLA copies all of them to columns before the update, and what
is new of them back to rows after it. It does so whatever the sizes, dtypes and axes, whether the
gradient is summed over devices before or not, and whether the state is given away or not.

Computed are operations on elements with two operands, one of which may be a constant: the mask of a
ReLU, a bias, a scale, a square. Not computed, in this sense, are conversions and functions of one
operand, as tanh. Where both operands are computed nothing is swapped. (Seen with gradients of
weights of two dims, on 1, 4 and 16 devices of v6e; never for v5e and v5p: jax 0.10.2, libtpu
0.0.42.1. Weights of three dims, and gradients that a loop writes into a stack, are laid otherwise.)

Where one gradient is swapped, those of all weights that have the same shape on a device come in
columns, too, without any swap: of three layers of 1024 x 1024 all, on one device already, of three
different ones the first alone; of six layers split in turn by columns and by rows the three that
are split alike. That depends on how the others are split, and is not counted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from passes.chains import MOVES, SAYS
from passes.ir.graph import Graph, Op

_HANDS_ON = (MOVES - {"reshape", "squeeze", "broadcast_in_dim"}) | SAYS


def is_computed(graph: Graph, ops: Iterable[int]) -> bool:
    """Whether an operand behind which these operations run counts as computed."""
    return any(
        len(graph.ops[o].inputs) > 1 or graph.ops[o].name == "integer_pow"
        for o in ops
        if graph.ops[o].rule.fuses and not graph.ops[o].is_link
    )


def makes_turned(graph: Graph, op: Op, computed: Set[tuple[int, int]]) -> bool:
    """Whether a product comes out transposed. computed: operands, as (operation, number)."""
    if op.name != "dot_general" or len(graph.values[op.outputs[0]].shape) != 2:
        return False
    if any(len(graph.values[v].shape) != 2 for v in op.inputs):
        return False
    rows = 1 if _is_transposed(graph, op.outputs[0]) else 0
    return (op.id, 1 - rows) in computed and (op.id, rows) not in computed


def _is_transposed(graph: Graph, v: int) -> bool:
    """Whether a value is transposed before anything else is done with it."""
    readers, turned = graph.consumers(), False
    while len({c for c, _ in readers[v]}) == 1:
        op = graph.ops[readers[v][0][0]]
        if op.name not in _HANDS_ON:
            break
        turned ^= op.name == "transpose"
        v = op.outputs[0]
    return turned
