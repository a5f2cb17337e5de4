"""Which operations does nobody need?  Those done before, and those that no result depends on.

Libraries cast one activation for each of its readers, and tracing a gradient leaves dead equations
behind; XLA removes both, so they must not be priced. The paths of the others stay as they were: the
lowering still walks the whole jaxpr.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from passes.chains import BARRIER
from passes.ir.graph import Graph, Op

Path = tuple[int | str, ...]


def merge_same(graph: Graph) -> tuple[Graph, Mapping[Path, Path]]:
    """The same graph where nothing cheap is done twice, and per path left out the one that stays.

    Operations that XLA fuses (their parameters are plain data, and say all), of one region, with
    the same operands. Values that a hint is about stay apart. What was left out leaves values
    behind that nobody makes: `drop_dead` takes them away.
    """
    hinted = {h.value for h in graph.hints}
    now = list(range(len(graph.values)))
    first: dict[Any, Op] = {}
    same: dict[Path, Path] = {}
    before = [0]  # how many ops that stay come before each op
    ops: list[Op] = []
    for op in graph.ops:
        op = replace(op, id=len(ops), inputs=tuple(now[v] for v in op.inputs))
        twin = op
        cheap = op.rule.fuses and not op.is_link and op.name != BARRIER
        if cheap and not op.effects and hinted.isdisjoint(op.outputs):
            types = tuple(graph.values[v].type for v in op.outputs)
            key = (op.name, op.region, op.inputs, types, repr(sorted(op.params.items())))
            twin = first.setdefault(key, op)
        if twin is op:
            ops.append(op)
        else:
            same[op.path] = twin.path
            for v, u in zip(op.outputs, twin.outputs, strict=True):
                now[v] = u
        before.append(len(ops))
    merged = replace(
        graph,
        ops=tuple(ops),
        regions=tuple(replace(r, begin=before[r.begin], end=before[r.end]) for r in graph.regions),
        outputs=tuple(now[v] for v in graph.outputs),
        ties=tuple((now[a], now[b]) for a, b in graph.ties),
    )
    return merged, same


def drop_dead(graph: Graph) -> Graph:
    """The same graph without operations that neither reach an output nor have effects."""
    alive = _alive(graph)
    before = [0] * (len(graph.ops) + 1)  # how many live ops come before each op
    for k, a in enumerate(alive):
        before[k + 1] = before[k] + a
    ops: list[Op] = []
    for op in graph.ops:
        if alive[op.id]:
            ops.append(replace(op, id=len(ops)))
    regions = tuple(replace(r, begin=before[r.begin], end=before[r.end]) for r in graph.regions)
    needed = {v for op in ops for v in (*op.inputs, *op.outputs)}
    needed.update(graph.inputs, graph.outputs)
    ties = tuple(t for t in graph.ties if needed.issuperset(t))
    hints = tuple(h for h in graph.hints if h.value in needed)
    left = replace(graph, ops=tuple(ops), regions=regions, ties=ties, hints=hints)
    return _renumbered(left, sorted(needed))


def _renumbered(graph: Graph, needed: Sequence[int]) -> Graph:
    """The same graph with these values alone."""
    new = {v: k for k, v in enumerate(needed)}

    def renamed(values: Iterable[int]) -> tuple[int, ...]:
        return tuple(new[v] for v in values)

    return replace(
        graph,
        values=tuple(replace(graph.values[v], id=k) for v, k in new.items()),
        ops=tuple(
            replace(op, inputs=renamed(op.inputs), outputs=renamed(op.outputs)) for op in graph.ops
        ),
        inputs=renamed(graph.inputs),
        outputs=renamed(graph.outputs),
        ties=tuple((new[a], new[b]) for a, b in graph.ties),
        donated=frozenset(renamed(graph.donated)),
        hints=tuple(replace(h, value=new[h.value]) for h in graph.hints),
    )


def _alive(graph: Graph) -> list[bool]:
    producers = graph.producers()
    # A loop's carry is needed by the next trip: whoever needs the value that enters the body needs
    # the one that leaves it, and the other way round.
    tied: dict[int, list[int]] = {}
    for a, b in graph.ties:
        tied.setdefault(a, []).append(b)
        tied.setdefault(b, []).append(a)
    # A while loop runs as long as its condition says: the condition is needed with the loop.
    conditions = {
        r.id + 1: [op for op in graph.ops[r.begin : r.end]]
        for r in graph.regions
        if r.kind == "while_cond"
    }
    alive = [False] * len(graph.ops)
    seen = [False] * len(graph.values)
    todo = [*graph.outputs, *(v for op in graph.ops if op.effects for v in op.inputs)]
    for op in graph.ops:
        alive[op.id] = op.effects
    while todo:
        v = todo.pop()
        if seen[v]:
            continue
        seen[v] = True
        todo.extend(tied.get(v, ()))
        if producers[v] < 0:
            continue
        op = graph.ops[producers[v]]
        if not alive[op.id]:
            alive[op.id] = True
            todo.extend(op.inputs)
            todo.extend(op.outputs)
            region = op.region
            while region:
                for c in conditions.pop(region, ()):
                    alive[c.id] = True
                    todo.extend(c.inputs)
                region = graph.regions[region].parent
    return alive
