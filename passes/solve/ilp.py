"""What is the cheapest choice per node?  `solve(problem) -> Solution`.

Presolve makes the problem small (`presolve`), a search brings a lower bound and a feasible choice
together (`search`), and what comes out is checked against the problem as it was given.

>>> from passes.solve.problem import Edge, Node
>>> a, b = Node(np.array([0.0, 4.0])), Node(np.array([3.0, 0.0]))
>>> found = solve(Problem("two", (a, b), (Edge(0, 1, np.array([[0.0, 5.0], [0.0, 0.0]])),)))
>>> found.choice, found.cost, found.status
((0, 0), 3.0, 'optimal')
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from passes.solve.memory import find_shortage, least_at
from passes.solve.meter import Meter, Progress, Stop
from passes.solve.presolve import presolve
from passes.solve.problem import INFINITY, Problem, ProblemError, Shortage, Solution, check
from passes.solve.reduction import Core, Infeasible
from passes.solve.search import Search
from passes.solve.tables import Pool

# Edges: with more than _LARGE a problem is first searched by compiled loops (loading these takes a
# second), until it has shrunk to _SMALL.
_LARGE, _SMALL = 5000, 2000


def solve(
    problem: Problem,
    *,
    starts: Sequence[Sequence[int]] = (),
    work: float | None = None,
    time_limit: float | None = None,
    progress: Callable[[Progress], None] | None = None,
    cutoff: float = np.inf,
    most_work: float | None = None,
) -> Solution:
    """The cheapest feasible choice found, never dearer than the best feasible start, and a bound.

    work: deterministic units of effort, about a second each. time_limit: seconds; then the answer
    may differ between machines. It ends at the first of them, or proven optimal; with neither, as
    soon as the gap is small, or after `most_work` units (more for larger problems, twenty at most).
    progress: told of each new best cost and bound. cutoff: a cost that is to be beaten: the search
    ends when it can not be. Ctrl-C ends it with what it has; raises KeyboardInterrupt without any,
    and ProblemError for a malformed problem.
    """
    check(problem)
    meter = Meter(problem, work, time_limit, progress, cutoff, most_work)
    try:
        for start in starts:
            _check_start(problem, start)
            meter.offer(start)
        stopped = _search(problem, meter)
    except Stop as stop:
        stopped = str(stop)
    except KeyboardInterrupt:
        if not meter.choice:
            raise
        stopped = "interrupted"
    except _NothingFits as nothing:
        return Solution((), np.inf, np.inf, 0.0, "infeasible", meter.work, nothing.shortage)
    if not meter.choice and (problem.nodes or meter.cost > 0):
        return Solution((), np.inf, meter.bound, 0.0, "unknown", meter.work, None, stopped)
    peak = float(problem.memory(meter.choice).max(initial=0.0))
    status = "optimal" if meter.bound >= meter.cost else "feasible"
    return Solution(
        meter.choice, meter.cost, meter.bound, peak, status, meter.work, None, stopped, meter.prices
    )


class _NothingFits(Exception):
    """No choice is feasible; shortage says why, where that is known."""

    def __init__(self, shortage: Shortage | None) -> None:
        super().__init__()
        self.shortage = shortage


def _search(problem: Problem, meter: Meter) -> str:
    """Presolve and search; returns why it ended, unless by raising Stop."""
    pool = Pool()
    try:
        core = presolve(problem, pool)
        meter.spend(1e-4 * len(problem.nodes))
        shortage = _shortage(problem, core)
        if shortage is not None:
            raise _NothingFits(shortage)
        if core.edges > _LARGE:
            from passes.solve.large import shrink

            core = shrink(core, pool, meter, _SMALL)
        Search(core, pool, meter).run()
    except Infeasible:
        if not meter.choice:
            raise _NothingFits(None) from None
    return "proven"


def _shortage(problem: Problem, core: Core) -> Shortage | None:
    """Where even the smallest choices overflow, if presolve found such a time."""
    smallest = [
        [float(use.usages[node.costs < INFINITY].min(initial=np.inf)) for use in node.uses]
        for node in problem.nodes
    ]
    found = find_shortage(problem, smallest)
    if found is None and (core.slack < 0).any():
        # Choices that exclude one another leave no small enough combination.
        row = int(core.slack.argmin())
        least = least_at(problem, smallest, int(core.times[row]))
        found = replace(least, needed=least.limit - float(core.slack[row]))
    return found


def _check_start(problem: Problem, start: Sequence[int]) -> None:
    """Raise ProblemError for a start that is no choice of this problem."""
    if len(start) != len(problem.nodes):
        raise ProblemError(f"a start has {len(start)} choices for {len(problem.nodes)} nodes")
    for v, (node, c) in enumerate(zip(problem.nodes, start, strict=True)):
        if not 0 <= c < len(node.costs):
            raise ProblemError(f"a start takes choice {c} of node {v}, which has {len(node.costs)}")
