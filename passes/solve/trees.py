"""How does a choice that fits become cheaper, where a problem is large?  One random tree at a time.

All nodes but those of a tree are fixed; on a tree (with all edges between its nodes) the best
choices are found by dynamic programming, in one pass over its tables. Memory is priced meanwhile,
at one of several weights of the prices that `ascent` has found; then every row's limit is held.
Rounds that judge by cost alone and rounds that judge by cost and priced memory take turns: the
latter make room.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from passes.solve.flat import Flat
from passes.solve.kernels import Edges, Spans, Tree, improve
from passes.solve.memory import Indices
from passes.solve.meter import Meter
from passes.solve.problem import Costs
from passes.solve.reduction import Core

# Weights of the memory's price while a tree is minimised, and while it is judged; how often it is
# minimised at a heavier one while it does not fit; and per round how many trees of how many nodes
# at most. Chosen on instances K, M and S of the IOPDDL contest (tests/data/iopddl).
_WEIGHTS = ((np.array([0.3, 0.1, 0.0, 0.6]), 0.0), (np.array([0.5]), 0.5))
_HEAVIER = 3
_SEED = 88172645463325252
_ROUNDS = ((1000, 30), (1000, 100), (300, 400))


class Trees:
    """One choice of a core that becomes better. cost: its cost now, not the best met."""

    def __init__(
        self, core: Core, graph: Flat, plain: Costs, choice: Indices, meter: Meter
    ) -> None:
        self.core, self.plain, self.meter = core, plain, meter
        rows = core.rows()
        self.choice = choice.copy()
        self.over = rows.over(choice)
        self.cost = core.cost(choice)
        nodes = np.arange(len(graph.size) + 1)
        at = np.searchsorted(rows.node, nodes).astype(np.intp)
        self._spans = Spans(at, rows.begin, rows.end, rows.first, rows.usage)
        ends = np.concatenate([graph.first, graph.second])
        edges = np.argsort(ends, kind="stable").astype(np.intp)
        at = np.searchsorted(ends[edges], nodes).astype(np.intp)
        edges %= max(len(graph.first), 1)
        self._edges = Edges(
            graph.start, graph.size, edges, at, graph.first, graph.second, graph.table, graph.tables
        )
        # Another choice, or the same with another effort behind it, gets other trees.
        self._random = np.array([_SEED + int(1e6 * meter.work)], dtype=np.uint64)
        self._turns = itertools.cycle(itertools.product(_ROUNDS, _WEIGHTS))

    def improve(self, rounds: int, memory: Costs) -> None:
        """So many rounds; better choices are offered. memory: per choice what its memory costs."""
        function: Any = improve
        for _ in range(rounds):
            (tries, most), (weights, judged) = next(self._turns)
            gained = np.zeros(1)
            work = function(
                self._random, tries, weights, _HEAVIER, judged, self._edges, self._spans,
                _room(most, self._edges.size), self.plain, memory, self.choice, self.over, gained,
            )  # fmt: skip
            self.cost -= float(gained[0])
            if self.cost < self.meter.cost:
                self.meter.offer(self.core.expand(self.choice))
            self.meter.spend(4e-9 * work + 1e-6 * tries)


def _room(most: int, size: Indices) -> Tree:
    """For trees of at most so many nodes of a graph with these numbers of choices."""

    def indices(*shape: int) -> Indices:
        return np.zeros(shape, np.intp)

    choices, graph = int(size.max()), len(size)
    return Tree(
        nodes=indices(most),
        parents=indices(most),
        by=indices(most),
        found=indices(most),
        value=np.zeros((most, choices)),
        pick=indices(most, choices),
        stamps=indices(graph),
        place=indices(graph),
        touched=indices(graph),
        touches=indices(graph),
        waiting=indices(graph),
    )
