"""In which order do the operations run?

In the order of the trace, but for what a step does last: an update of the state runs as soon as its
gradient is there and nobody reads the old state any more, so that no two gradients lie in memory
longer than they must. A trace updates all of the state at the end; XLA's schedulers, which take
what frees most memory first, do not (seen in compiled programs for TPU and GPU).

Only what stores nothing but results of the function, or scalars, runs early: it needs no memory of
its own. Some compilers so make constants too. Operations in loops stay where they are.
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
    fills_early: bool = False,
) -> tuple[int, ...]:
    """Ids of all operations in the order in which they run.

    stored: whether a value has memory. aliases: (donated input, output) pairs that share a buffer.
    filled: constants that are made as arrays; fills_early: when a step begins, not for a reader.
    """
    ready = [
        all(not stored[v] or v in filled or _needs_little(graph, v) for v in op.outputs)
        and not (op.region or op.effects or op.is_link)
        for op in graph.ops
    ]
    after = _latest(graph, ready, aliases)
    place = [(float(a), float(o)) for o, a in enumerate(after)]
    consumers = graph.consumers()
    for op in graph.ops if not fills_early else ():
        if ready[op.id] and not filled.isdisjoint(op.outputs):
            readers = [place[_ends(graph, c)[0]] for v in op.outputs for c, _ in consumers[v]]
            first = min(readers, default=place[op.id])
            place[op.id] = first[0], first[1] - 0.5
    return tuple(sorted(range(len(graph.ops)), key=place.__getitem__))


def _needs_little(graph: Graph, v: int) -> bool:
    """Whether a value needs no memory to speak of: its place is there, or it is small."""
    return v in graph.outputs or graph.values[v].type.nbytes <= _SMALL


def _latest(graph: Graph, ready: Sequence[bool], aliases: Sequence[tuple[int, int]]) -> list[int]:
    """Per operation the one after which it runs: itself, the last that it waits for, or -1.

    ready: those that run as soon as they can.
    """
    given = {result: v for v, result in aliases}
    producers, consumers = graph.producers(), graph.consumers()
    after: list[int] = []
    for op in graph.ops:
        waits = [producers[v] for v in op.inputs]
        for old in (given[v] for v in op.outputs if v in given):
            waits += [reader for reader, _ in consumers[old] if reader < op.id]
        last = max((_ends(graph, after[o])[1] for o in waits if o >= 0), default=-1)
        after.append(last if ready[op.id] else op.id)
    return after


def _ends(graph: Graph, o: int) -> tuple[int, int]:
    """The first and the last operation of the outermost region around one: itself at the top."""
    region = graph.regions[graph.ops[o].region]
    while region.parent:
        region = graph.regions[region.parent]
    return (region.begin, region.end - 1) if region.id else (o, o)
