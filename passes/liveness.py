"""When does each value hold memory, and does it hold any?

Time is the index of an operation in the flat program. A value that a loop body reads from outside
lives until the loop ends; what a scan stacks up exists from the loop's first step. An operation
that XLA fuses into all its readers leaves nothing in memory; a donated argument and the result
that takes its place are one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from passes.ir.graph import Graph, Op

# How many operations away a reader may be for XLA to compute the value again inside it. A guess at
# how long forward and backward of one layer part lie from each other; costs nothing but memory.
_REACH = 64
# Made from nothing or from less: never kept, at any distance.
_FREE = frozenset({"broadcast_in_dim", "iota"})


@dataclass(frozen=True, slots=True)
class Liveness:
    """spans: per value its half-open life, (0, 0) for none. stored: whether it has memory."""

    spans: tuple[tuple[int, int], ...]
    stored: tuple[bool, ...]
    steps: int


def liveness(graph: Graph, aliases: Sequence[tuple[int, int]] = ()) -> Liveness:
    """Life of every value; aliases are (donated input, output) pairs that share a buffer."""
    steps = len(graph.ops) + 1
    begin, end, home = _made(graph)
    for op in graph.ops:
        for v in op.inputs:
            end[v] = max(end[v], _last_read(graph, op, home[v]))
    kept = {v.id for v in graph.values if v.kind == "constant"}
    kept.update(v for v in graph.inputs if v not in graph.donated)  # the caller keeps them
    for v in (*graph.outputs, *kept):
        end[v] = steps
    stored = _stored(graph)
    for op in reversed(graph.ops):  # what is computed again keeps its operands alive
        for v in op.outputs:
            if not stored[v] and not op.is_link:
                for u in op.inputs:
                    end[u] = max(end[u], end[v])
    for given, result in aliases:
        end[given] = steps
        if result != given:
            stored[result] = False
    spans = tuple((b, e) if s else (0, 0) for b, e, s in zip(begin, end, stored, strict=True))
    return Liveness(spans, tuple(stored), steps)


def _made(graph: Graph) -> tuple[list[int], list[int], list[int]]:
    """Per value the step it begins at, the first it may end at, and the region it is made in."""
    begin, end, home = ([0] * len(graph.values) for _ in range(3))
    for op in graph.ops:
        region = graph.regions[op.region]
        for v in op.outputs:
            home[v], begin[v], end[v] = op.region, op.id, op.id + 1
            if op.name == "scan_stack":  # the whole stack exists from the first trip on
                begin[v] = region.begin
            if op.name in ("scan_stack", "loop_next"):
                home[v] = region.parent
    return begin, end, home


def _last_read(graph: Graph, op: Op, home: int) -> int:
    """One past the time of a read: the end of the outermost loop between the read and the home."""
    last = op.id + 1
    region = op.region
    while region and region != home:
        r = graph.regions[region]
        if r.kind in ("scan", "while_body", "while_cond"):
            last = max(last, r.end)
        region = r.parent
    return last


def _stored(graph: Graph) -> list[bool]:
    """Values that XLA keeps in memory: all but those fused into every one of their readers."""
    producers = graph.producers()
    stored = [v.kind != "literal" for v in graph.values]
    consumers = graph.consumers()
    outputs = set(graph.outputs)
    for value in graph.values:
        v = value.id
        if producers[v] < 0 or v in outputs:
            continue
        maker = graph.ops[producers[v]]
        if maker.name in ("loop_enter", "scan_slice", "region_enter", "region_exit"):
            stored[v] = maker.name == "scan_slice"
        elif maker.name == "loop_next":
            stored[v] = True
        elif maker.rule.fuses:
            far = not _FREE.issuperset((maker.name,)) and any(
                c - maker.id > _REACH for c, _ in consumers[v]
            )
            stored[v] = far or not all(_fuses_in(graph.ops[c]) for c, _ in consumers[v])
    return stored


def _fuses_in(op: Op) -> bool:
    """Whether XLA would compute an operand inside this reader: elementwise chains, reductions."""
    if op.is_link:
        return op.name == "region_exit"
    return op.rule.fuses or (
        bool(op.rule.factors)
        and any(f.kind == "reduction" for f in op.rule.factors)
        and len(op.inputs) == 1
    )
