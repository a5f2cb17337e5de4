"""What is a byte of memory worth?  A core whose memory rows are priced instead of enforced.

For prices p_r >= 0 per row r,

    L(p) = min over x of  cost(x) + sum_r p_r over_r(x),      over_r(x) = bytes used in r - limit

is a lower bound of every feasible cost (its overs are not positive), and so is anything below it:
the messages' bound. With the memory priced into the node costs, no row is left, and the core is a
plain sum of tables that messages bound and elimination minimises.

Looking at all choices with reduced cost up to tau raises the bound: a solution either uses such
choices only, then it costs at least the best of those, or some other, then at least bound + tau.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from passes.solve.buckets import lower_bound
from passes.solve.memory import Indices
from passes.solve.messages import Messages
from passes.solve.problem import Costs
from passes.solve.reduction import Core
from passes.solve.restrict import Budget, best_within
from passes.solve.tables import Picks


@dataclass(frozen=True, slots=True)
class Visit:
    """One look at the priced core: the best choice found, its priced cost, whether it is exact."""

    choice: Indices
    value: float
    exact: bool


class PricedCore:
    """A core at prices that can be changed. bound: of the core's cost, the best over all prices."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.rows = core.rows()
        self.messages = Messages(core.unary, core.links)
        self.prices = np.zeros(len(core.slack))
        self.best_prices = self.prices
        self.bound = -np.inf
        self.work = 0.0
        self._plain = self.messages.flat.copy()
        self._kept: int | None = None
        self._priced = self._plain
        self._step = 2e-6 * len(self.messages.sizes)
        for around in core.links:
            self._step += sum(6e-6 + 2e-9 * t.size for t in around.values())

    @property
    def offset(self) -> float:
        """What the priced cost of a choice is more than its table entries."""
        return self.core.constant - float(self.prices @ self.core.slack)

    def set_prices(self, prices: Costs) -> None:
        """Change the prices; messages stay as they are."""
        if len(prices):
            self.prices = prices
            priced = self._plain + self.rows.priced(prices, len(self._plain))
            self.messages.add(priced - self._priced)
            self._priced = priced

    def sweep(self, times: int) -> float:
        """Pass messages; returns the bound at these prices."""
        for _ in range(times):
            self.messages.sweep()
            self.work += self._step
        return self._raise(self.messages.bound + self.offset - self._doubt)

    def visit(self, budget: Budget, upper: float = np.inf) -> Visit:
        """The best choice within the budget, after a sweep. upper: a priced cost already met."""
        before = self.before()
        found = best_within(
            self._parts(self._priced),
            self.core.links,
            self.messages.reduced(),
            max(0.0, upper - before) if upper < np.inf else np.inf,
            budget,
            self._kept,
        )
        self._kept = found.kept
        self.work += found.work * 4e-9 + 5e-5 * len(self.core.names)
        value = found.value + self.offset
        exact = found.tau >= value - before
        if found.tau >= 0:
            doubt = self._doubt if self.prices.any() else 0.0  # sums of whole numbers are exact
            self._raise(min(value - doubt, before + found.tau))
        return Visit(found.choice, value, exact)

    def tighten(self, upper: float, cap: float) -> None:
        """Raise the bound by mini-buckets with tables up to the cap. upper: a priced cost met here.

        Choices whose reduced cost takes them above it are not in the best one.
        """
        keep = self.within(max(0.0, upper - self.before()) + self._doubt)
        unary, tables = self.messages.rest(keep)
        found = lower_bound([len(k) for k in keep], unary, tables, cap)
        self.work += found.work * 4e-9 + 5e-5 * len(keep) + 1e-5 * len(tables)
        self._raise(min(upper, found.bound + self.offset - self._doubt))

    @property
    def _doubt(self) -> float:
        """More than what rounding can add up to."""
        return 1e-12 * (abs(self.messages.bound) + abs(self.offset))

    def _raise(self, bound: float) -> float:
        if bound > self.bound:
            self.bound, self.best_prices = bound, self.prices
        return bound

    def _parts(self, flat: Costs) -> list[Costs]:
        starts = self.messages.starts
        return [flat[a:b] for a, b in itertools.pairwise(starts)]

    def within(self, tau: float) -> list[Picks]:
        """Per node the choices whose reduced cost at the present prices is at most tau."""
        return [np.flatnonzero(r <= tau) for r in self._parts(self.messages.reduced())]

    def before(self) -> float:
        """The bound that reduced costs count from, at the present prices."""
        return self.messages.before + self.offset - self._doubt

    def tau_for(self, pairs: float, tau: float) -> float:
        """The largest tau up to the given one that leaves at most so many pairs more than edges."""
        reduced = self.messages.reduced()
        levels = np.sort(reduced[reduced <= tau])
        if not len(levels) or self._pairs(reduced, tau) <= pairs:
            return tau
        low, high = 0, len(levels) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._pairs(reduced, levels[middle]) <= pairs:
                low = middle
            else:
                high = middle - 1
        return float(levels[low])

    def _pairs(self, reduced: Costs, tau: float) -> float:
        kept = np.add.reduceat((reduced <= tau).astype(np.float64), self.messages.starts[:-1])
        return float(
            sum(kept[v] * kept[u] - 1 for v, a in enumerate(self.core.links) for u in a if v < u)
        )


def union(keeps: Sequence[Sequence[Picks]]) -> list[Picks]:
    """Per node the choices that any of these lists keeps."""
    return [np.unique(np.concatenate(own)) for own in zip(*keeps, strict=True)]
