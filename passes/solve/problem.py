"""What is to be decided, and at which price?  One node per decision, edges between decisions.

    minimise   sum_n cost_n[x_n] + sum_(u,v) cost_uv[x_u, x_v]
    such that  for every time t:  sum of usage_n[x_n] over the nodes alive at t  <=  limit

over one choice x_n for every node n. This is the problem of Google's IOPDDL contest (Moffitt and
Fegade, ASPLOS/EuroSys 2025). Costs are whole numbers (picoseconds where autoshard makes the
problem), usages are bytes; a pair that may not be chosen together costs INFINITY.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Costs = npt.NDArray[np.float64]
INFINITY = 1e18


@dataclass(frozen=True, slots=True)
class Use:
    """Memory one decision takes over the half-open times [begin, end): bytes per choice."""

    begin: int
    end: int
    usages: Costs


@dataclass(frozen=True, slots=True)
class Node:
    """One decision. costs: one entry per choice. uses: its memory, over any number of intervals.

    label: for messages, such as the value's name.
    """

    costs: Costs
    uses: tuple[Use, ...] = ()
    label: str = ""


@dataclass(frozen=True, slots=True)
class Edge:
    """A pairwise cost: costs[i, j] when node u takes choice i and node v takes choice j."""

    u: int
    v: int
    costs: Costs


@dataclass(frozen=True, slots=True)
class Problem:
    """The whole of it. limit: bytes at every time, None for no limit. Edges may repeat (they add)."""

    name: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    limit: float | None = None

    def cost(self, choice: Sequence[int]) -> float:
        """Total cost of one choice per node."""
        total = sum(float(n.costs[c]) for n, c in zip(self.nodes, choice, strict=True))
        return total + sum(float(e.costs[choice[e.u], choice[e.v]]) for e in self.edges)

    def memory(self, choice: Sequence[int]) -> Costs:
        """Bytes in use at each time step for one choice per node."""
        steps = max((use.end for n in self.nodes for use in n.uses), default=0)
        change = np.zeros(steps + 1)
        for node, c in zip(self.nodes, choice, strict=True):
            for use in node.uses:
                if use.begin < use.end:
                    change[use.begin] += use.usages[c]
                    change[use.end] -= use.usages[c]
        return np.cumsum(change)[:steps]

    def feasible(self, choice: Sequence[int]) -> bool:
        """Whether the choice costs less than INFINITY and keeps the memory limit."""
        if self.cost(choice) >= INFINITY:
            return False
        peak = float(self.memory(choice).max(initial=0.0))
        return self.limit is None or peak <= self.limit


@dataclass(frozen=True, slots=True)
class Solution:
    """One choice per node. bound: no choice costs less. status: optimal, feasible or infeasible.

    work: deterministic units of effort spent, for reports.
    """

    choice: tuple[int, ...]
    cost: float
    bound: float
    peak: float
    status: str
    work: float = 0.0

    @property
    def gap(self) -> float:
        """Proven distance from optimal, relative to the cost (0 when optimal)."""
        return 0.0 if self.cost <= self.bound else (self.cost - self.bound) / max(abs(self.cost), 1e-30)
