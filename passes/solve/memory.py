"""Which time steps can run out of memory, and what does each node hold there?

A *row* is a time step whose set of live intervals is not contained in that of another: only there
can the limit bind first (usages are not negative). A node's memory is a list of spans (begin, end,
usages) over rows. `Rows` sums, prices and checks memory for all nodes at once.

>>> from passes.solve.problem import Node, Use
>>> one, two = np.array([1.0]), np.array([2.0])
>>> problem = Problem("x", (Node(one, (Use(0, 5, one),)), Node(one, (Use(3, 9, two),))), (), 10)
>>> row_times(problem).tolist()
[4]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from passes.solve.problem import Costs, Problem, Shortage

Span = tuple[int, int, Costs]  # first row, row after the last, bytes per choice
Indices = npt.NDArray[np.intp]


def row_times(problem: Problem) -> Indices:
    """The time steps that matter: just before an end, when something began since the last one."""
    if problem.limit is None:
        return np.zeros(0, dtype=np.intp)
    begins, ends = set(), set()
    for node in problem.nodes:
        for use in node.uses:
            if use.begin < use.end:
                begins.add(use.begin)
                ends.add(use.end)
    times, begun = [], False
    for time in sorted(begins | ends):
        if time in ends and begun:
            times.append(time - 1)
            begun = False
        begun |= time in begins
    return np.array(times, dtype=np.intp)


@dataclass(frozen=True, slots=True)
class Rows:
    """The memory of many nodes, laid out flat: one entry per (span, choice).

    slack: per row the bytes left for what the spans hold. node, begin, end: per span. first: per
    span its first entry in `usage`. entry: per entry its place in the flat list of all choices.
    """

    slack: Costs
    node: Indices
    begin: Indices
    end: Indices
    first: Indices
    usage: Costs
    entry: Indices

    @staticmethod
    def of(slack: Costs, spans: Sequence[Sequence[Span]], sizes: Sequence[int]) -> Rows:
        """Lay out the spans of nodes that have so many choices each."""
        offset = np.concatenate([[0], np.cumsum(sizes)]).astype(np.intp)
        node = [v for v, own in enumerate(spans) for _ in own]
        flat = [span for own in spans for span in own]
        lengths = [len(usages) for _, _, usages in flat]
        index = np.array(node, dtype=np.intp)
        return Rows(
            slack,
            index,
            np.array([b for b, _, _ in flat], dtype=np.intp),
            np.array([e for _, e, _ in flat], dtype=np.intp),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.intp)[:-1],
            np.concatenate([np.zeros(0), *(usages for _, _, usages in flat)]),
            np.concatenate(
                [np.zeros(0, dtype=np.intp)]
                + [np.arange(offset[v], offset[v] + n) for v, n in zip(node, lengths, strict=True)]
            ).astype(np.intp),
        )

    def used(self, choice: Indices) -> Costs:
        """Bytes that the spans hold in each row, for one choice per node."""
        held = self.usage[self.first + choice[self.node]]
        rows = len(self.slack)
        change = np.bincount(self.begin, held, rows + 1) - np.bincount(self.end, held, rows + 1)
        return np.cumsum(change)[:rows]

    def over(self, choice: Indices) -> Costs:
        """Bytes above the limit in each row (negative where there is room)."""
        return self.used(choice) - self.slack

    def priced(self, prices: Costs, choices: int) -> Costs:
        """For each of all nodes' choices what its memory costs at these prices per row and byte."""
        total = np.concatenate([[0.0], np.cumsum(prices)])
        weight = total[self.end] - total[self.begin]
        lengths = np.diff(np.append(self.first, len(self.usage)))
        weights = self.usage * np.repeat(weight, lengths)
        return np.bincount(self.entry, weights, choices).astype(np.float64)


def find_shortage(problem: Problem, smallest: Sequence[Sequence[float]]) -> Shortage | None:
    """The worst time step when each use takes its smallest size, if that breaks the limit.

    smallest: per node, per use, the fewest bytes among the choices that are possible at all.
    """
    if problem.limit is None:
        return None
    steps = max((use.end for n in problem.nodes for use in n.uses), default=0)
    change = np.zeros(steps + 1)
    for node, least in zip(problem.nodes, smallest, strict=True):
        for use, n in zip(node.uses, least, strict=True):
            if use.begin < use.end:
                change[use.begin] += n
                change[use.end] -= n
    memory = np.cumsum(change)[:steps]
    if memory.max(initial=0.0) <= problem.limit:
        return None
    return least_at(problem, smallest, int(memory.argmax()))


def least_at(problem: Problem, smallest: Sequence[Sequence[float]], time: int) -> Shortage:
    """Who holds how much at a time when each use takes its smallest size."""
    held = [
        sum(n for use, n in zip(node.uses, least, strict=True) if use.begin <= time < use.end)
        for node, least in zip(problem.nodes, smallest, strict=True)
    ]
    nodes = sorted((v for v, n in enumerate(held) if n > 0), key=lambda v: (-held[v], v))
    sizes = tuple(float(held[v]) for v in nodes)
    assert problem.limit is not None, "nothing is short without a limit"
    return Shortage(time, float(sum(held)), float(problem.limit), tuple(nodes), sizes)
