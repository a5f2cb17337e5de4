"""Which softmaxes does XLA:TPU run in a kernel of its own, with the product behind them?

Where weights of an attention are the first operand of a product, whose batch dims are the first of
both operands, in order, and whose other operand is contracted over its last dim but one (weights @
values), the compiler puts one kernel, "online-softmax", in the place of the softmax and this
product. It has no estimated cycles; here its product is priced as any other.

Not where weights are made narrower before that product, nor where the scores are just as their own
product makes them, without a scale or a mask, nor for rows or columns that are no whole tiles: 197
of either, or one row. For v6e tiles have 256 (128 and 384 of either have no such kernel, 256 and
512 have), for v5e and v5p 128; here 128 count for all. (Seen for v5e, v5p and v6e with bfloat16 and
float32; for v5e with 3 and 4 dims, rows of 128 to 8192, heads of 32 to 128; jax 0.10.2, libtpu
0.0.42.1.)

That kernel wants scores row by row. Where a scan runs it and keeps exponentials for a backward
pass, these are made once of the scores, and their stack lies row by row, too. The backward loop
wants a slice column by column: it takes the slice in one kernel and copies it to columns in
another, once for all who read it. Neither is so where the product is written otherwise, or where
weights are narrowed: there the stack lies as its readers want it, and slices are taken inside
them. Without a scan there are no copies either. (Scans of attentions of 1024 places and their
gradients, bfloat16 for v5e, v5p and v6e, float32 for v5e.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cost_models.fitted import LANES
from passes.ir.graph import Graph, Op
from passes.tile_padding import DOT

_SAME = frozenset({"broadcast_in_dim", "convert_element_type", "max", "stop_gradient"})


class OwnSoftmax(NamedTuple):
    """exp: the exponentials. slices: those that other loops take of their stack, if any."""

    exp: int
    slices: tuple[int, ...] = ()


def own_softmaxes(graph: Graph) -> Iterator[OwnSoftmax]:
    """Every softmax of a graph that has a kernel of its own."""
    makers, readers = graph.producers(), graph.consumers()
    for op in graph.ops:
        less = makers[op.inputs[0]] if op.name == "exp" else -1
        if less < 0 or graph.ops[less].name != "sub":
            continue
        scores, most = graph.ops[less].inputs
        plain = makers[scores] < 0 or graph.ops[makers[scores]].name == DOT
        if plain or not _made_of(graph, makers, most, "reduce_max"):
            continue
        exp = op.outputs[0]
        for c, k in readers[exp]:
            div = graph.ops[c]
            if div.name != "div" or k or not _made_of(graph, makers, div.inputs[1], "reduce_sum"):
                continue
            if any(_multiplies(graph, graph.ops[o], n) for o, n in readers[div.outputs[0]]):
                yield OwnSoftmax(exp, tuple(_slices(graph, readers, exp)))


def _multiplies(graph: Graph, op: Op, operand: int) -> bool:
    """Whether it multiplies whole tiles of its first operand's rows with its second's columns."""
    if op.name != DOT or operand:
        return False
    shape = graph.values[op.inputs[0]].shape
    (left, right), (outer, inner) = op.params["dimension_numbers"]
    rows, batch = len(shape) - 2, tuple(range(len(shape) - 2))
    if any(n % LANES for n in shape[rows:]) or not batch:
        return False
    return (*left, *right) == (rows + 1, rows) and tuple(outer) == tuple(inner) == batch


def _made_of(graph: Graph, makers: Sequence[int], v: int, name: str) -> bool:
    """Whether it is what a reduction made, perhaps converted and spread out since."""
    for _ in range(8):
        if makers[v] < 0:
            return False
        op = graph.ops[makers[v]]
        if op.name == name:
            return True
        given = [u for u in op.inputs if graph.values[u].kind != "literal"]
        if op.name not in _SAME or len(given) != 1:
            return False
        v = given[0]
    return False


def _slices(graph: Graph, readers: Sequence[Sequence[tuple[int, int]]], v: int) -> Iterator[int]:
    """The slices that loops take of the stack of a value."""
    for c, _ in readers[v]:
        op = graph.ops[c]
        if op.name == "scan_slice":
            yield from op.outputs
        elif op.is_link:
            for u in op.outputs:
                yield from _slices(graph, readers, u)
