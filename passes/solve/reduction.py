"""What is left of a problem after presolve, and how does its answer become the problem's?

A `Core` has nodes 0..n-1 with pooled cost arrays, infinity as numpy's, no parallel edges and no
node of one choice. Its `trail` says how each removed node follows from those still there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from passes.solve.memory import Rows, Span
from passes.solve.problem import Costs
from passes.solve.tables import Picks

Choice = Sequence[int] | npt.NDArray[np.intp]


class Infeasible(Exception):
    """No choice has a finite cost: presolve has proven it."""


@dataclass(frozen=True, slots=True)
class Step:
    """A removed node's choice, given those of up to two others, all as in the problem.

    labels: per given node the choices that the axes of `answer` stand for, in rising order.
    """

    node: int
    given: tuple[int, ...]
    labels: tuple[Picks, ...]
    answer: Picks

    def follow(self, choice: Sequence[int]) -> int:
        """The node's choice once those it depends on are known."""
        at = tuple(
            int(np.searchsorted(labels, choice[u]))
            for u, labels in zip(self.given, self.labels, strict=True)
        )
        return int(self.answer[at])


@dataclass(frozen=True, slots=True)
class Core:
    """A reduced problem. names, labels: per node its number and choices in the problem.

    unary: costs per node. links: per node, per neighbour (rising), the table with this node's
    choices as rows; constant: cost already certain. spans: memory by row; slack: room per row;
    times: the problem's time step of each row.
    """

    names: tuple[int, ...]
    labels: tuple[Picks, ...]
    unary: tuple[Costs, ...]
    links: tuple[Mapping[int, Costs], ...]
    constant: float
    spans: tuple[tuple[Span, ...], ...]
    slack: Costs
    times: Picks
    trail: tuple[Step, ...]
    nodes: int  # of the problem

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of choices of each node."""
        return tuple(len(u) for u in self.unary)

    @property
    def edges(self) -> int:
        """How many pairs of nodes have a table."""
        return sum(map(len, self.links)) // 2

    def rows(self) -> Rows:
        """The memory, laid out for arithmetic on all nodes at once."""
        return Rows.of(self.slack, self.spans, self.sizes)

    def cost(self, choice: Choice) -> float:
        """The problem's cost of one choice per core node."""
        total = self.constant
        for v, around in enumerate(self.links):
            total += float(self.unary[v][choice[v]])
            for u, table in around.items():
                if v < u:
                    total += float(table[choice[v], choice[u]])
        return total

    def expand(self, choice: Choice) -> tuple[int, ...]:
        """The problem's choice per node from the core's."""
        out = [0] * self.nodes
        for v, labels, c in zip(self.names, self.labels, choice, strict=True):
            out[v] = int(labels[c])
        for step in reversed(self.trail):
            out[step.node] = step.follow(out)
        return tuple(out)

    def place(self, full: Sequence[int]) -> Picks:
        """The core's choice that the problem's choice stands for; -1 where it has been removed."""
        out = np.empty(len(self.names), dtype=np.intp)
        for i, (v, labels) in enumerate(zip(self.names, self.labels, strict=True)):
            at = int(np.searchsorted(labels, full[v]))
            out[i] = at if at < len(labels) and labels[at] == full[v] else -1
        return out

    def with_rows(self, rows: Sequence[int]) -> Core:
        """The same with only these memory rows (rising)."""
        place = np.searchsorted(np.array(rows, dtype=np.intp), np.arange(len(self.slack) + 1))
        spans = tuple(
            tuple(
                (int(place[b]), int(place[e]), usages)
                for b, e, usages in own
                if place[b] < place[e]
            )
            for own in self.spans
        )
        picked = list(rows)
        return replace(self, spans=spans, slack=self.slack[picked], times=self.times[picked])
