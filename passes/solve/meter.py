"""How much effort is left, and how good is the answer so far?  The anytime state of one solve.

A solve that is given neither work nor seconds stops when its gap is small for the effort spent.

Effort is counted in deterministic units, about a second each on a laptop core, from table entries,
visits and CP-SAT's own deterministic time; so a budget ends a search at the same place on every
machine. Only an explicit time limit looks at a clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from passes.solve.memory import Indices
from passes.solve.problem import INFINITY, Costs, Problem

# A solve without a budget stops when the gap is small for the units spent, or at long last anyway.
_GOOD = ((1.0, 1e-4), (2.0, 1e-3), (3.0, 2e-3), (6.0, 5e-3), (12.0, 2e-2))
# At last: so many units for every edge, but not less than the first and no more than the second. An
# MLP of 59 edges at its memory limit found nothing better in 20 units than in 6.
_PER_EDGE = 0.1
_LEAST_WORK, _MOST_WORK = 6.0, 20.0


@dataclass(frozen=True, slots=True)
class Progress:
    """What is known at one moment: cost of the best choice (inf for none), bound, work units."""

    cost: float
    bound: float
    work: float

    @property
    def gap(self) -> float:
        """Distance of the best cost from the bound, relative to the cost."""
        if self.cost <= self.bound:
            return 0.0
        if not np.isfinite(self.cost):
            return np.inf
        return (self.cost - self.bound) / max(abs(self.cost), 1e-30)


class Stop(Exception):
    """The search ends now; its argument is the reason, as in Solution.stopped."""


class Meter:
    """Best choice, bound and effort of one solve; raises Stop when the search should end."""

    def __init__(
        self,
        problem: Problem,
        work: float | None,
        time_limit: float | None,
        progress: Callable[[Progress], None] | None,
        cutoff: float = np.inf,
        most_work: float | None = None,
    ) -> None:
        self.problem = problem
        longest = min(max(_LEAST_WORK, _PER_EDGE * len(problem.edges)), _MOST_WORK)
        self._most = longest if most_work is None else min(most_work, longest)
        self.cutoff = cutoff
        self.choice: tuple[int, ...] = ()
        self.cost = np.inf
        self.bound = -np.inf
        self.work = 0.0
        self.prices: tuple[tuple[int, float], ...] = ()
        # Who gives seconds, and no work, wants them used.
        self._budget = np.inf if work is None and time_limit is not None else work
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._progress = progress or (lambda _: None)
        self._whole = _whole(problem)

    def offer(self, choice: Sequence[int]) -> bool:
        """Take a choice when it is feasible and cheaper than the best; whether it was taken."""
        cost = self.problem.cost(choice)
        if cost >= min(self.cost, INFINITY) or not self.problem.feasible(choice):
            return False
        self.choice, self.cost = tuple(int(c) for c in choice), cost
        self._settle()
        return True

    def raise_bound(self, bound: float) -> None:
        """Note that no feasible choice costs less."""
        if bound > self.bound:
            self.bound = min(float(bound), self.cost)
            self._settle()

    def note_prices(self, times: Indices, prices: Costs) -> None:
        """Note what a byte of memory is worth at these times, where it is worth anything."""
        worth = np.flatnonzero(prices > 0)
        self.prices = tuple((int(times[r]), float(prices[r])) for r in worth)

    def spend(self, work: float) -> None:
        """Note effort; raises Stop when there is none left."""
        self.work += work
        gap = Progress(self.cost, self.bound, self.work).gap
        if self._budget is None:
            if any(self.work >= units and gap <= small for units, small in _GOOD):
                raise Stop("good")
            if self.work >= self._most:
                raise Stop("work")
        elif self.work >= self._budget:
            raise Stop("work")
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise Stop("time")

    def work_left(self) -> float:
        """Units until the search must stop."""
        return max(0.01, (self._most if self._budget is None else self._budget) - self.work)

    def seconds_left(self) -> float | None:
        """Until the time limit, None without one."""
        return None if self._deadline is None else max(0.01, self._deadline - time.monotonic())

    @property
    def room(self) -> float:
        """What a better choice may cost above the bound; infinite while there is no choice."""
        return self.cost - self.bound

    def _settle(self) -> None:
        """Tell the progress; stop when nothing better can exist."""
        if np.isfinite(self.cost):
            # Whole costs differ by at least one.
            near = self.room < 1.0 if self._whole else self.room <= 1e-9 * abs(self.cost)
            if near:
                self.bound = self.cost
        self._progress(Progress(self.cost, self.bound, self.work))
        if self.bound >= self.cost:
            raise Stop("proven")
        if self.bound >= self.cutoff:
            raise Stop("cutoff")


def _whole(problem: Problem) -> bool:
    """Whether all finite costs are whole numbers."""
    arrays = {id(a): a for a in [n.costs for n in problem.nodes] + [e.costs for e in problem.edges]}
    for a in arrays.values():
        finite = a[a < INFINITY]
        if not (finite == np.floor(finite)).all():
            return False
    return True
