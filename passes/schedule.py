"""In which order do the operations run?

In the order of the trace, but for what a step does last: an update of the state runs as soon as its
gradient is there and nobody reads the old state any more, so that no two gradients lie in memory
longer than they must. A trace updates all of the state at the end; XLA's schedulers, which take
what frees most memory first, do not (seen in compiled programs for TPU and GPU).

Only what stores nothing but results of the function, or scalars, runs early: it needs no memory of
its own. So do constants that are made as arrays. Operations in loops stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from passes.ir.graph import Graph

# Bytes of a value that is no reason to wait: a norm, a step count, a statistic of one dim.
_SMALL = 1 << 16


def schedule(
    graph: Graph,
    stored: Sequence[bool],
    aliases: Sequence[tuple[int, int]] = (),
    filled: Set[int] = frozenset(),
) -> tuple[int, ...]:
    """Ids of all operations in the order in which they run.

    stored: whether a value has memory. aliases: (donated input, output) pairs that share a buffer.
    filled: constants made as arrays as soon as they can be.
    """
    after = _latest(graph, stored, aliases, filled)
    return tuple(sorted(range(len(graph.ops)), key=lambda o: (after[o], o)))


def _latest(
    graph: Graph, stored: Sequence[bool], aliases: Sequence[tuple[int, int]], filled: Set[int]
) -> list[int]:
    """Per operation the one after which it runs: itself, the last that it waits for, or -1."""
    results, given = set(graph.outputs), {result: v for v, result in aliases}
    producers, consumers = graph.producers(), graph.consumers()
    after: list[int] = []
    for op in graph.ops:
        waits = [producers[v] for v in op.inputs]
        for old in (given[v] for v in op.outputs if v in given):
            waits += [reader for reader, _ in consumers[old] if reader < op.id]
        last = max((_end(graph, after[o]) for o in waits if o >= 0), default=-1)
        early = all(
            not stored[v] or v in results or v in filled or graph.values[v].type.nbytes <= _SMALL
            for v in op.outputs
        )
        early = early and not (op.region or op.effects or op.is_link)
        after.append(last if early else op.id)
    return after


def _end(graph: Graph, o: int) -> int:
    """The operation, or the last one of the outermost region around it."""
    region = graph.regions[graph.ops[o].region]
    while region.parent:
        region = graph.regions[region.parent]
    return region.end - 1 if region.id else o
