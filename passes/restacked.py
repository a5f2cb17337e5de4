"""Which stacks does XLA:GPU lay anew for the loops that slice them, and lay back after?

XLA:GPU chooses the order of dims in memory for a loop's body first; what is given to the loop, or
wanted of it, is copied to that order and back. Two kinds of readers fix an order in the body:

* A product with a batch wants the batch, what is summed and the rest each as neighbors in memory,
  and the batch not innermost. Keys that lie as `b k h d` are laid as `b h d k`, as are those that
  lie as `k h d` for a batch of one. A product of one row does not: it is a sum of products of
  elements.
* A gather wants the dim that it gathers outermost, and a sum that is scattered the dim that it
  scatters; dims of length 1 do not count. On its way to the slice the wish passes products of one
  row, which want what they sum innermost, if that is 32 elements or more: where the mixed heads of
  one more token are gathered along h, the values are laid as `h b d k`, and the keys as `h b k d`.

A copy of a stack serves all loops that want one order, and lies there from the first of them to the
last. A stack that is made in such an order lies there until it is copied, as a result, at the end.
(Caches of keys and values in five orders, weights of MLPs and of experts, bfloat16, float32 and
int8 for H100; a cache and the weights of an MLP for A100, too; jax 0.10.2. An all-to-all fixes no
order: its blocks are moved by kernels of their own. What a collective made and is written to a
slice fixes the slice's order before a gather does, and a product with a batch before both.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from passes.answer import Change
from passes.ir.graph import Graph, Op
from passes.ir.plan import Axes
from passes.ir.rule import Dim
from passes.ir.sharding import Sharding
from passes.loop_stacks import Order, Stacks, behind, groups_of, rows

_LEAST_SUMMED = 32  # elements: kReduce in xla/service/gpu/transforms/layout_assignment.cc


class Restacked(NamedTuple):
    """The steps [begin, end) during which a stack lies there in another order, too."""

    stack: int
    begin: int
    end: int


def restacked(
    stacks: Stacks,
    graph: Graph,
    values: Sequence[Axes],
    changed: Sequence[Change],
    sizes: tuple[int, ...],
) -> Iterator[Restacked]:
    """The stacks that a plan's loops want in another order."""
    if not stacks.given and not stacks.returned:
        return
    shapes = _Shapes(graph, values, sizes)
    wishes = dict(w for w in map(_wish, changed) if w is not None)
    found: dict[tuple[int, Dim], Restacked] = {}
    wanted = _for_wishes(stacks, shapes, wishes)
    wanted |= _for_written(stacks, shapes, wishes)
    wanted |= _for_products(stacks, shapes, wishes)
    anew = {v for v, order in wanted.items() if order}
    for v in sorted(anew):
        s, order = stacks.given[v], wanted[v]
        old = found.get((s.stack, order), Restacked(*s))
        span = min(old.begin, s.begin), max(old.end, s.end)
        found[s.stack, order] = Restacked(s.stack, *span)
    yield from found.values()
    for r in stacks.returned:
        asked = [_outermost_first(d, len(shapes[v])) for v, d in wishes.items() if v in r.chain]
        inner = shapes[r.stack][1:]
        if not anew.isdisjoint(r.chain) or not all(_as_it_lies(o, inner) for o in asked):
            yield Restacked(r.stack, r.begin, r.end)


class _Shapes:
    """The shapes of values on one device."""

    def __init__(self, graph: Graph, values: Sequence[Axes], sizes: tuple[int, ...]) -> None:
        self.graph, self.values, self.sizes = graph, values, sizes

    def __getitem__(self, v: int) -> tuple[int, ...]:
        return Sharding(self.values[v]).local_shape(self.graph.values[v].shape, self.sizes)

    def one_row(self, product: Op) -> bool:
        """Whether its result has one row for each of its batch, or one column."""
        return min(rows(product, self[product.outputs[0]])) == 1

    def sums_many(self, product: Op) -> bool:
        """Whether it has one row, and sums enough for its operands to be laid for that."""
        shape = self[product.inputs[0]]
        summed = math.prod(shape[d] for d in groups_of(product, 0)[1])
        return self.one_row(product) and summed >= _LEAST_SUMMED


def _wish(c: Change) -> tuple[int, int] | None:
    """A value and the dim of it that its first collective wants outermost."""
    move = next((m for m in c.moves if m.kind != "slice"), None)
    if move is None or move.kind not in ("all_gather", "reduce_scatter"):
        return None
    gathers = move.kind == "all_gather"
    return c.value, (c.source if gathers else c.target)[move.axis]


def _for_products(stacks: Stacks, shapes: _Shapes, wishes: Mapping[int, int]) -> Mapping[int, Dim]:
    """By slice the order that a product with a batch wants it in, () where that is as it lies."""
    out: dict[int, Dim] = {}
    for r in stacks.readers:
        product = shapes.graph.ops[r.product]
        if r.operand not in wishes and not shapes.one_row(product):
            out[r.slice] = () if _multiplies(r.order) else sum(r.order, ())
    return out


def _for_written(stacks: Stacks, shapes: _Shapes, wishes: Mapping[int, int]) -> Mapping[int, Dim]:
    """By slice the order of what a collective made and is written to it, () for as it lies."""
    out: dict[int, Dim] = {}
    for w in stacks.written:
        for v in sorted(w.sources.keys() & wishes.keys()):
            shape = shapes[v]
            wish = _outermost_first(wishes[v], len(shape))
            as_it_lies = _several(w.sources[v], shape) == _several(wish, shape)
            out[w.slice] = () if as_it_lies else sum(wish, ())
    return out


def _for_wishes(stacks: Stacks, shapes: _Shapes, wishes: Mapping[int, int]) -> dict[int, Dim]:
    """By slice the order that a collective wants it in, of it or of what is made of it."""
    out: dict[int, Dim] = {}
    for v, d in wishes.items():
        order = _outermost_first(d, len(shapes.graph.values[v].shape))
        for s, wanted in behind(shapes.graph, v, order, shapes.sums_many):
            if s in stacks.given and not _as_it_lies(wanted, shapes[s]):
                out[s] = sum(wanted, ())
    return out


def _outermost_first(d: int, rank: int) -> Order:
    return ((d,), *((e,) for e in range(rank) if e != d))


def _as_it_lies(order: Order, shape: Sequence[int]) -> bool:
    """Whether an array of this shape that lies in the order of its dims lies in this order.

    >>> _as_it_lies(((1,), (0,), (2,)), (1, 4, 8)), _as_it_lies(((1,), (0,), (2,)), (2, 4, 8))
    (True, False)
    """
    several = _several(order, shape)
    return several == sorted(several)


def _several(order: Order, shape: Sequence[int]) -> list[int]:
    """The dims of an order without those of length 1."""
    return [d for dims in order for d in dims if shape[d] > 1]


def _multiplies(groups: Order) -> bool:
    """Whether a product reads dims that lie in ascending order: batch, summed, the rest.

    >>> _multiplies(((0, 1), (3,), (2,))), _multiplies(((0, 2), (3,), (1,)))
    (True, False)
    >>> _multiplies(((1,), (0,), (2,))), _multiplies(((2,), (0,), (1,)))
    (True, False)
    """
    batch, *others = groups
    neighbors = all(d == tuple(range(d[0], d[0] + len(d))) for d in groups if d)
    inner = max((d for dims in others for d in dims), default=0)
    return neighbors and max(batch, default=-1) < inner
