"""Which stacks do loops slice, and what lies as their slices do?

Where a reader in the loop's body wants dims in an order of its own (`passes.restacked`), the wish
goes back to the slice through operations on elements, changes of shape, updates in place, and
products of one row, which are sums of products of elements.

An order is a tuple of groups of dims, from the outermost to the innermost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from passes.ir.graph import Graph, Op
from passes.ir.rule import Dim
from passes.liveness import Liveness
from passes.tile_padding import DOT

Order = tuple[Dim, ...]

_UPDATE = "dynamic_update_slice"
_SAME = frozenset({"region_enter", "region_exit", "loop_enter"})


class Slices(NamedTuple):
    """The slices of a given stack that a loop takes over the steps [begin, end)."""

    stack: int
    begin: int
    end: int


class Stacked(NamedTuple):
    """A stack that a loop makes over the steps [begin, end), and the function returns.

    chain: what is stacked, and what it is made of whose dims lie in the same order.
    """

    stack: int
    begin: int
    end: int
    chain: frozenset[int]


class Reader(NamedTuple):
    """A product with a batch that reads a slice, in an order of its dims by groups.

    operand: the value that it reads, made of the slice.
    """

    product: int
    operand: int
    slice: int
    order: Order


class Written(NamedTuple):
    """A part of a slice is overwritten in place.

    sources: what the new part is made of, by value the order in which its dims lie if that of the
    part is ascending.
    """

    slice: int
    sources: Mapping[int, Order]


class Stacks(NamedTuple):
    """given: by value of a slice. returned: stacks that loops make."""

    given: Mapping[int, Slices]
    readers: tuple[Reader, ...] = ()
    written: tuple[Written, ...] = ()
    returned: tuple[Stacked, ...] = ()

    @property
    def made(self) -> frozenset[int]:
        """The stacks that are returned."""
        return frozenset(r.stack for r in self.returned)


def stacks(graph: Graph, live: Liveness, platform: str) -> Stacks:
    """What may be laid anew; nothing but on a GPU."""
    if platform != "gpu":
        return Stacks({})
    given, returned = dict[int, Slices](), list[Stacked]()
    makers, results = graph.producers(), set(graph.outputs)
    for op in graph.ops:
        if op.name not in ("scan_slice", "scan_stack"):
            continue
        loop = graph.regions[op.region]
        span = live.when[loop.begin], live.when[loop.end - 1] + 1
        v, made = op.inputs[0], op.outputs[0]
        if op.name == "scan_stack" and made in results and not live.spans[made][0]:
            returned.append(Stacked(made, *span, _chain(graph, v)))
        elif op.name == "scan_slice" and makers[v] < 0 and len(graph.values[made].shape) > 1:
            given[made] = Slices(v, *span)
    readers = _readers(graph, given) if given else ()
    written = _written(graph, given) if given else ()
    return Stacks(given, tuple(readers), tuple(written), tuple(returned))


def _readers(graph: Graph, given: Mapping[int, Slices]) -> Iterator[Reader]:
    for op in graph.ops:
        if op.name == DOT and op.region and op.params["dimension_numbers"][1][0]:
            for k, v in enumerate(op.inputs):
                for s, order in behind(graph, v, groups_of(op, k), _never):
                    if s in given:
                        yield Reader(op.id, v, s, order)


def _written(graph: Graph, given: Mapping[int, Slices]) -> Iterator[Written]:
    for op in graph.ops:
        if op.name == _UPDATE and op.region:
            old, new = op.inputs[:2]
            sources = dict(_lying(graph, new, _ascending(graph, new), _never))
            for s, _ in behind(graph, old, _ascending(graph, old), _never):
                if s in given:
                    yield Written(s, sources)


def _never(product: Op) -> bool:
    return False


def _ascending(graph: Graph, v: int) -> Order:
    return tuple((d,) for d in range(len(graph.values[v].shape)))


def behind(
    graph: Graph, v: int, order: Order, passes: Callable[[Op], bool]
) -> Iterator[tuple[int, Order]]:
    """The slices that lie as a value does, and the order of their dims that means its order.

    passes: whether a product hands a wish on.
    """
    makers = graph.producers()
    for u, lies in _lying(graph, v, order, passes):
        if makers[u] >= 0 and graph.ops[makers[u]].name == "scan_slice":
            yield u, lies


def _lying(
    graph: Graph, v: int, order: Order, passes: Callable[[Op], bool]
) -> Iterator[tuple[int, Order]]:
    """All that lies as a value does, from which it is made, and the order of each."""
    makers = graph.producers()
    waiting, seen = [(v, order)], {v}
    while waiting:
        u, order = waiting.pop()
        yield u, order
        op = graph.ops[makers[u]] if makers[u] >= 0 else None
        if op is None or (op.name == DOT and not passes(op)):
            continue
        for k, given in enumerate(op.inputs):
            if given in seen or not (op.name == DOT or _hands_on(graph, op, k)):
                continue
            before = _before(op, k, order)
            if before is not None:
                seen.add(given)
                waiting.append((given, before))


def _chain(graph: Graph, v: int) -> frozenset[int]:
    """A value, and what it is made of whose dims lie in the same order."""
    order = _ascending(graph, v)
    return frozenset(u for u, lies in _lying(graph, v, order, _never) if lies == order)


def _hands_on(graph: Graph, op: Op, operand: int) -> bool:
    """Whether a result lies as this operand does: of an operation on elements, or on the shape."""
    if op.name in _SAME or op.name == _UPDATE:
        return not operand
    size = graph.values[op.inputs[operand]].type.size
    same = len(op.outputs) == 1 and graph.values[op.outputs[0]].type.size == size
    return op.rule.fuses and not op.is_link and same


def _before(op: Op, operand: int, order: Order) -> Order | None:
    """The order of an operand's dims, those that a product sums innermost; None without any."""
    result = op.rule.results[0]
    factors = [(f, n) for n, dims in enumerate(order) for d in dims for f in result[d]]
    place = {f: at for at, (f, _) in enumerate(factors)}
    found: list[tuple[int, int]] = []
    for d, dim in enumerate(op.rule.operands[operand]):
        at = [place[f] for f in dim if f in place]
        if at and at != list(range(at[0], at[0] + len(dim))):  # parts of a dim lie apart
            return None
        if at:
            found.append((at[0], d))
    if not found:
        return None
    inside = [tuple(d for at, d in sorted(found) if factors[at][1] == n) for n in range(len(order))]
    summed = groups_of(op, operand)[1] if op.name == DOT else ()
    return (*inside, summed)


def groups_of(product: Op, operand: int) -> tuple[Dim, Dim, Dim]:
    """The dims of an operand: the batch, those that are summed, and the rest."""
    summed, batch = (sides[operand] for sides in product.params["dimension_numbers"])
    rank = len(product.rule.operands[operand])
    free = tuple(d for d in range(rank) if d not in (*summed, *batch))
    return tuple(batch), tuple(summed), free


def rows(product: Op, shape: Sequence[int]) -> tuple[int, int]:
    """How many rows and columns a product's result has for each of its batch. shape: of all."""
    batch, _, free = groups_of(product, 0)
    at = len(batch) + len(free)
    return math.prod(shape[len(batch) : at]), math.prod(shape[at:])
