"""Which products run sooner than they were traced, because that frees memory?

The gradient of a product is traced as the gradient of its left operand and then of its right one.
XLA:TPU runs first what frees more: where the weights of an attention are kept for the backward
pass, the product that reads them for the last time runs before the one that makes their gradient,
as large (steps of GPT, LLaMA and long attention for v5p; jax 0.10.2, libtpu 0.0.42.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

from passes.chains import PRODUCTS
from passes.ir.graph import Graph, Op


def freed_early(graph: Graph, stored: Sequence[bool]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Operations that move together, in order, and the one that they run after.

    A product moves with what is computed for it alone, and with what follows it in its kernel.
    """
    consumers, producers = graph.consumers(), graph.producers()
    for op in graph.ops:
        if op.name not in PRODUCTS:
            continue
        before, after = _for_it_alone(graph, op, stored, producers)
        if 0 <= after < before[0] - 1 and _frees(graph, before, stored, consumers, producers):
            there = set(range(after + 1)) | set(before)
            yield (*before, *_behind(graph, op, stored, consumers, producers, there)), after


def _frees(
    graph: Graph,
    inside: Sequence[int],
    stored: Sequence[bool],
    consumers: Sequence[Sequence[tuple[int, int]]],
    producers: Sequence[int],
) -> bool:
    """Whether a kernel, the last operation of which is a product, is the last to read a value, made
    beside it, that is larger than what it makes.
    """
    op = graph.ops[inside[-1]]
    made = sum(graph.values[v].type.nbytes for v in op.outputs)
    return any(
        stored[v]
        and producers[v] >= 0
        and graph.ops[producers[v]].region == op.region
        and graph.values[v].type.nbytes > made
        and v not in graph.outputs
        and all(c <= op.id for c, _ in consumers[v])
        for o in inside
        for v in graph.ops[o].inputs
    )


def _for_it_alone(
    graph: Graph, op: Op, stored: Sequence[bool], producers: Sequence[int]
) -> tuple[list[int], int]:
    """A product and what is computed inside its kernel before it, and the last they wait for."""
    inside, after, waiting = {op.id}, -1, list(op.inputs)
    outside = graph.regions[op.region].begin
    while waiting:
        v = waiting.pop()
        maker = producers[v]
        if maker < outside or maker in inside:
            continue
        made = graph.ops[maker]
        if stored[v] or made.is_link or made.region != op.region:
            after = max(after, _end(graph, maker, op.region))
        else:
            inside.add(maker)
            waiting += graph.ops[maker].inputs
    return sorted(inside), after


def _end(graph: Graph, o: int, home: int) -> int:
    """The last operation of the region around one that lies in this home; itself in none."""
    region = graph.regions[graph.ops[o].region]
    last = o
    while region.id != home:
        last, region = region.end - 1, graph.regions[region.parent]
    return last


def _behind(
    graph: Graph,
    op: Op,
    stored: Sequence[bool],
    consumers: Sequence[Sequence[tuple[int, int]]],
    producers: Sequence[int],
    there: Set[int],
) -> Iterator[int]:
    """What follows a product in its kernel, where all else that it reads is there by then."""
    v = op.outputs[0]
    while not stored[v] and len(consumers[v]) == 1:
        follower = graph.ops[consumers[v][0][0]]
        if follower.region != op.region or follower.is_link or not follower.rule.fuses:
            return
        others = (producers[u] for u in follower.inputs if u != v)
        if len(follower.outputs) != 1 or any(maker >= 0 and maker not in there for maker in others):
            return
        yield follower.id
        v = follower.outputs[0]
