"""What is to be decided, and at which price?  One node per decision, edges between decisions.

    minimise   sum_n cost_n[x_n] + sum_(u,v) cost_uv[x_u, x_v]
    such that  for every time t:  sum of usage_n[x_n] over the nodes alive at t  <=  limit

over one choice x_n for every node n. This is the problem of Google's IOPDDL contest (Moffitt and
Fegade, ASPLOS/EuroSys 2025). Costs are whole numbers (picoseconds where autoshard makes the
problem), usages are bytes; a pair that may not be chosen together costs INFINITY.

>>> a = Node(np.array([1.0, 5.0]), (Use(0, 2, np.array([8.0, 4.0])),), "a")
>>> b = Node(np.array([2.0, 3.0]), (Use(1, 3, np.array([8.0, 2.0])),), "b")
>>> small = Problem("small", (a, b), (Edge(0, 1, np.array([[0.0, 9.0], [1.0, 0.0]])),), limit=12)
>>> small.cost((1, 0)), small.memory((1, 0)).tolist(), small.feasible((1, 0))
(8.0, [4.0, 12.0, 8.0], True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Costs = npt.NDArray[np.float64]
INFINITY = 1e18


class ProblemError(ValueError):
    """A problem that says nothing: an edge to a missing node, a matrix of the wrong shape, ..."""


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
    """The whole of it. limit: bytes at every time, None for none. Edges may repeat: they add."""

    name: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    limit: float | None = None

    def cost(self, choice: Sequence[int]) -> float:
        """Total cost of one choice per node; INFINITY when any part of it is."""
        parts = [float(n.costs[c]) for n, c in zip(self.nodes, choice, strict=True)]
        parts += [float(e.costs[choice[e.u], choice[e.v]]) for e in self.edges]
        return INFINITY if max(parts, default=0.0) >= INFINITY else sum(parts)

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
class Shortage:
    """Why nothing fits: at one time step even the smallest choices together are too large.

    needed: the fewest bytes that all choices together can be made to take at `time`. nodes: those
    alive then, the largest first; smallest: the bytes of each in its smallest choice (choices that
    exclude one another may need more than the sum).
    """

    time: int
    needed: float
    limit: float
    nodes: tuple[int, ...]
    smallest: tuple[float, ...]

    @property
    def short(self) -> float:
        """Bytes that are missing."""
        return self.needed - self.limit


@dataclass(frozen=True, slots=True)
class Solution:
    """One choice per node. bound: no choice costs less.

    status: "optimal" (cost equals bound), "feasible", "infeasible" (proven: choice is empty and
    cost infinite) or "unknown" (nothing feasible found within the budget, nothing proven).
    work: deterministic units of effort spent, for reports. shortage: of an infeasible problem,
    where memory falls short, when that is the reason. stopped: what ended the search, "proven",
    "good" (gap small enough), "cutoff" (nothing beats what was to be beaten), "work", "time" or
    "interrupted" (Ctrl-C). prices: by time, what the bound would fall for a byte more of memory
    there; only where memory binds.
    """

    choice: tuple[int, ...]
    cost: float
    bound: float
    peak: float
    status: str
    work: float = 0.0
    shortage: Shortage | None = None
    stopped: str = "proven"
    prices: tuple[tuple[int, float], ...] = ()

    @property
    def gap(self) -> float:
        """Proven distance from optimal, relative to the cost (0 when optimal)."""
        return (
            0.0
            if self.cost <= self.bound
            else (self.cost - self.bound) / max(abs(self.cost), 1e-30)
        )


def check(problem: Problem) -> None:
    """Raise ProblemError with one sentence when the problem is malformed."""
    for i, node in enumerate(problem.nodes):
        _check_node(f"node {i}" + (f" ({node.label})" if node.label else ""), node)
    seen: set[int] = set()
    for i, edge in enumerate(problem.edges):
        for end in (edge.u, edge.v):
            if not 0 <= end < len(problem.nodes):
                raise ProblemError(
                    f"edge {i} ends at node {end}, but there are {len(problem.nodes)} nodes"
                )
        want = (len(problem.nodes[edge.u].costs), len(problem.nodes[edge.v].costs))
        if edge.costs.shape != want:
            raise ProblemError(
                f"edge {i} between nodes {edge.u} and {edge.v} has a {edge.costs.shape} matrix;"
                f" their choices ask for {want}"
            )
        if id(edge.costs) not in seen and np.isnan(edge.costs).any():
            raise ProblemError(
                f"edge {i} between nodes {edge.u} and {edge.v} has a cost that is not a number"
            )
        seen.add(id(edge.costs))
    if problem.limit is not None and not problem.limit >= 0:
        raise ProblemError(f"the memory limit is {problem.limit}; give a number of bytes, or None")


def _check_node(name: str, node: Node) -> None:
    """Raise ProblemError when one node is malformed."""
    if node.costs.ndim != 1 or not node.costs.size:
        raise ProblemError(f"{name} has no choices")
    if np.isnan(node.costs).any():
        raise ProblemError(f"{name} has a cost that is not a number")
    for use in node.uses:
        if use.usages.shape != node.costs.shape:
            raise ProblemError(
                f"{name} has {node.costs.size} choices but {use.usages.size} memory usages"
            )
        if not (use.usages >= 0).all():
            raise ProblemError(f"{name} has a memory usage that is negative or not a number")
        if use.begin < 0:
            raise ProblemError(f"{name} is alive from time {use.begin}; times start at 0")
