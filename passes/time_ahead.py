"""Which part of a program can run in steps?  `time_loop(graph, seeds, steps) -> TimeLoop`.

Where what couples the steps is cheap (how many labels count), it is computed ahead of the loop, of
the whole input, and the program is followed again (`passes.time_phases`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from passes.ir.graph import LOOPS, Graph, Op
from passes.time_axis import Split, View
from passes.time_loop import Path, TimeLoop, unit_path
from passes.time_phases import followed

_CHEAP = 0.01  # of all FLOPs, and of all bytes that are split: what may be computed ahead, whole
_SMALL = 1 << 20  # bytes that are nothing, whatever the rest is


def time_loop(
    graph: Graph,
    seeds: Mapping[int, Split],
    steps: int,
    deciders: Mapping[Path, int] | None = None,
) -> TimeLoop:
    """The loop over time in which these inputs are split.

    deciders: by the path of a branch or while loop, the value that decides it.
    """
    tried = frozenset[int]()
    while True:
        found = followed(graph, seeds, steps, deciders or {}, tried)
        more = _cheap_wholes(found, tried)
        if not more:
            return found
        tried |= more


def _cheap_wholes(found: TimeLoop, tried: Collection[int]) -> set[int]:
    """Operations that a coupling waits for, where computing them ahead costs next to nothing."""
    graph = found.graph
    makers = graph.producers()
    flops = sum(op.rule.flops * graph.trips(op.region) for op in graph.ops)
    nbytes = sum(graph.values[v].type.nbytes for v, s in enumerate(found.views) if _apart(s))
    for coupling in found.couplings:
        needed = _made_of(found, coupling.value, makers)
        if needed is None or needed <= set(tried):
            continue
        costs = sum(graph.ops[o].rule.flops for o in needed)
        made = [v for o in needed for v in graph.ops[o].outputs if _apart(found.views[v])]
        takes = sum(graph.values[v].type.nbytes for v in made)
        if costs <= _CHEAP * flops and takes <= max(_SMALL, _CHEAP * nbytes):
            return needed
    return set()


def _apart(view: View) -> bool:
    return isinstance(view, Split)


def _made_of(found: TimeLoop, value: int, makers: Sequence[int]) -> set[int] | None:
    """All operations in or after the loop that a value is made of; None where a loop is one."""
    graph, out, left = found.graph, set[int](), [value]
    while left:
        maker = makers[left.pop()]
        if maker < 0 or maker in out:
            continue
        op = graph.ops[maker]
        if found.phases[unit_path(op)] == "before":
            continue
        if op.is_link or any(graph.regions[r].kind in LOOPS for r in _around(graph, op)):
            return None
        out.add(maker)
        left += op.inputs
    return out


def _around(graph: Graph, op: Op) -> Iterator[int]:
    region = op.region
    while region:
        yield region
        region = graph.regions[region].parent
