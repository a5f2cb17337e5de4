"""Which prices of memory give the best bound, where a problem is large?  Steps along what is over.

At prices p the messages give a bound L(p), and choices that are near the best at these prices; how
many bytes these take over each row's limit is, nearly, the direction in which L rises. A step goes

    d <- over + DEFLECTION * d,        p <- max(0, p + theta (target - L(p)) / |d|^2  d)

(Polyak, USSR Comp. Math. 9(3), 1969; Camerini, Fratta, Maffioli, Math. Programming Study 3, 1975).
Only rows that were a peak of some choice have a price. Messages are kept from step to step, with
one pass there and back in each. Choices that fit are candidates for the best one.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from passes.solve.kernels import choose, price
from passes.solve.memory import Indices
from passes.solve.messages import Messages
from passes.solve.meter import Meter
from passes.solve.problem import Costs
from passes.solve.reduction import Core
from passes.solve.tables import Picks

DEFLECTION = 0.8
_PATIENCE = 25  # steps without a better bound before they become shorter
_SHORTER = 0.7
_SHORTEST = 0.01
_PEAKS = 8  # new rows in one step at most


class Ascent:
    """Prices and messages of one core. bound: the best so far, at `prices`. fitting: the cheapest
    choice that fits of those met in the last climb.
    """

    def __init__(self, core: Core, meter: Meter) -> None:
        self.core, self.meter = core, meter
        self.rows = core.rows()
        self.messages = Messages(core.unary, core.links, compiled=True)
        self.plain = self.messages.flat.copy()
        self.bound = -np.inf
        self.fitting: Indices | None = None
        self._least = np.inf  # what that costs
        self.prices = self._prices = np.zeros(len(core.slack))
        self._priced = np.zeros(len(self.plain))
        self._peaks: dict[int, None] = {}
        self._saved = self.messages.state()
        self._step = 6e-9 * self.messages.graph.pairs + 1e-7 * len(self.plain)

    def memory(self) -> Costs:
        """Per choice of all nodes what its memory costs at the best prices."""
        return self._memory_at(self.prices)

    def start_from(self, other: Ascent) -> None:
        """Start from the prices of a core that this one was part of."""
        at = np.searchsorted(other.core.times, self.core.times)
        self.prices = other.prices[at]
        self._set(self.prices)
        self._saved = self.messages.state()
        self._peaks = dict.fromkeys(np.flatnonzero(self.prices).tolist())

    def climb(self, steps: int, theta: float, target: float) -> None:
        """So many steps from the best prices, fewer where they lead nowhere. target: of the bound.

        The best choice that fits takes the target's place where it is less.
        """
        self.messages.restore(self._saved)
        self._prices = self.prices
        self._priced = self._memory_at(self._prices)
        self.fitting, self._least = None, np.inf
        direction = np.zeros(len(self._prices))
        idle = 0
        for _ in range(steps):
            bound = self._sweep()
            goal = min(target, self.meter.cost)
            idle = 0 if bound > self.bound + 1e-3 * max(goal - self.bound, 0.0) else idle + 1
            if bound > self.bound:
                self.bound, self.prices = bound, self._prices
                self._saved = self.messages.state()
                self.meter.note_prices(self.core.times, self.prices)
                self.meter.raise_bound(bound)
            if idle > _PATIENCE:
                theta, idle = theta * _SHORTER, 0
                if theta < _SHORTEST:
                    return
            over = self.offer()
            rows = np.array(list(self._peaks), dtype=np.intp)
            direction[rows] = over[rows] + DEFLECTION * direction[rows]
            along = direction[rows]
            along = np.where((self._prices[rows] > 0) | (along > 0), along, 0.0)
            length = float(along @ along)
            if length > 0:
                prices = self._prices.copy()
                ahead = theta * max(goal - bound, 1e-5 * abs(goal)) / length
                prices[rows] = np.maximum(0.0, prices[rows] + ahead * direction[rows])
                self._set(prices)
            self.meter.spend(self._step)

    def offer(self) -> Costs:
        """Choose by the messages, and offer that where it fits; bytes over the limit per row."""
        choice = self.decoded()
        over = self.rows.over(choice)
        if over.max(initial=-1.0) <= 0:
            cost = self.core.cost(choice)
            if cost < self._least:
                self.fitting, self._least = choice, cost
            if cost < self.meter.cost:
                self.meter.offer(self.core.expand(choice))
        for row in peaks(over):
            self._peaks[row] = None
        return over

    def decoded(self) -> Indices:
        """One choice per node, good at the present prices."""
        g = self.messages.graph
        choice = np.zeros(len(g.size), dtype=np.intp)
        nodes: tuple[Any, ...] = (g.order, g.start, g.size, g.ahead, g.ahead_at)
        edges = (g.behind, g.behind_at, g.first, g.table, g.tables, g.to_first)
        function: Any = choose
        function(*nodes, *edges, self.plain + self._priced, self.messages.backward, choice)
        return choice

    def kept(self, upper: float) -> list[Picks]:
        """Per node the choices that may be part of something cheaper than this."""
        self.messages.restore(self._saved)
        self._prices = self.prices
        self._priced = self._memory_at(self._prices)
        self._sweep()
        before = self.messages.before + self._offset - self._doubt
        reduced, starts = self.messages.reduced(), self.messages.starts
        room = max(upper - before, 0.0)
        return [np.flatnonzero(reduced[a:b] <= room) for a, b in itertools.pairwise(starts)]

    def _sweep(self) -> float:
        return self.messages.sweep() + self._offset - self._doubt

    @property
    def _offset(self) -> float:
        return self.core.constant - float(self._prices @ self.core.slack)

    @property
    def _doubt(self) -> float:
        """More than what rounding can add up to."""
        return 1e-11 * (abs(self.messages.bound) + abs(self._offset))

    def _set(self, prices: Costs) -> None:
        priced = self._memory_at(prices)
        self.messages.add(priced - self._priced)
        self._prices, self._priced = prices, priced

    def _memory_at(self, prices: Costs) -> Costs:
        r = self.rows
        out = np.empty(len(self.plain))
        price(
            r.node, r.begin, r.end, r.first, r.usage, self.messages.starts, prices, out
        )  # fmt: skip
        return out


def peaks(over: Costs) -> list[int]:
    """The worst row of each stretch of rows that are over, the worst stretches first."""
    high = over > 0
    if not high.any():
        return []
    edges = np.flatnonzero(np.diff(np.concatenate([[False], high, [False]]).astype(np.int8)))
    begins, ends = edges[::2], edges[1::2]
    most = np.maximum.reduceat(over, begins)
    worst = np.argsort(-most, kind="stable")[:_PEAKS]
    return [int(begins[k] + over[begins[k] : ends[k]].argmax()) for k in worst]
