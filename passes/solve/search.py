"""How do bound and best choice meet?  Rounds of pricing memory, adding rows, and exact finishes.

A round works on the reduced problem with only those memory rows that have been found to matter
(none at first); its bound holds for the whole, and what it finds is checked against the whole.

1. *climb*: pass messages, look at the best priced choice, choose new prices from what has been met.
   A row that deserves a price but is not in the round starts a new round with it.
2. *close*: leave per node only the choices within tau of the bound and those met on the way, reduce
   that again, and let CP-SAT answer exactly; then with a larger tau. Everything left out costs at
   least bound + tau, so each exact answer also raises the bound.
3. *improve*: when a round can do no more: free a neighbourhood of the best choice, fix the rest,
   solve exactly, repeat until the budget ends.
"""

from __future__ import annotations

import numpy as np

from passes.solve.cuts import Cut, best_prices
from passes.solve.exact import best_choice
from passes.solve.meter import Meter, Stop
from passes.solve.presolve import reduce_again
from passes.solve.prices import PricedCore, Visit, union
from passes.solve.problem import Costs
from passes.solve.reduction import Core, Infeasible
from passes.solve.restrict import Budget
from passes.solve.tables import Picks, Pool

_STEPS = 40  # price changes in a climb at most
_PAIRS = 2000.0, 60000.0  # more than edges, in the first exact finish and the last
_LOOK = Budget(4e6, 1e6)
_LOOK_HARD = Budget(5e7, 4e6)
# Caps of mini-bucket tables, one a look. Which one cuts the buckets at harmless places is luck, and
# the same luck in every repeated layer: trying several is cheap.
_CAPS = (1e5, 1e6, 1e4, 3e5, 2e4, 7e3)
# Passes of messages at the best prices: tens of them, while each ten close this part of the gap. Of
# 0.8, 1.5 and 3 %, GPT-2 on 2 x 2 x 2 devices came to a gap of 0.1 % first with the first two.
_TENS, _PART = 20, 0.015
_NEAR = 4000.0  # pairs of the first neighbourhood


class Search:
    """One search. core: the presolved problem, with all its rows."""

    def __init__(self, core: Core, pool: Pool, meter: Meter) -> None:
        self.core, self.pool, self.meter = core, pool, meter
        self.rows = core.rows()
        self.active: list[int] = []
        self.cuts: list[Cut] = []
        self.candidates: set[int] = set()
        self.top = core.constant + sum(_most(c) for c in core.unary)
        for v, around in enumerate(core.links):
            self.top += sum(_most(t) for u, t in around.items() if v < u)
        self.visited: list[Picks] = []  # choices of the present round's core, the last few
        self.guess = np.inf  # while no feasible choice is known: what one might cost
        problem = meter.problem
        if meter.choice and len(core.times):
            assert problem.limit is not None, "rows without a limit"
            over = problem.memory(meter.choice)[core.times] - problem.limit
            self.cuts.append(Cut(meter.cost, over))

    def run(self) -> None:
        """Search until the meter stops it; raises Infeasible when it finds that nothing fits."""
        every = [np.arange(n) for n in self.core.sizes]
        while True:
            core = reduce_again(self.core.with_rows(self.active), every, self.pool)
            self.spend(1e-4 * len(core.names))
            priced = PricedCore(core)
            pairs, most = _PAIRS
            self.visited = []
            while self.climb(priced) and self.close(priced, pairs):
                pairs *= 3
                if pairs > most:
                    self.improve()

    def spend(self, work: float) -> None:
        """Count effort; may stop the search."""
        self.meter.spend(work)

    # -- climb -----------------------------------------------------------------------------------

    def climb(self, priced: PricedCore) -> bool:
        """Raise the bound by prices and messages; False when a new row calls for a new round."""
        at = np.searchsorted(self.core.times, priced.core.times)
        prices, _ = self.new_prices()
        priced.set_prices(prices[at])
        for step in range(_STEPS):
            spent = priced.work
            priced.sweep(4 if step == 0 else 3)
            visit = self.look(priced, _LOOK, np.inf)
            self.spend(priced.work - spent)
            old, (prices, promise) = prices, self.new_prices()
            if self.add_rows(np.flatnonzero(prices)):
                return False
            left = self.meter.cost - visit.value
            if np.array_equal(old, prices) or promise - visit.value <= 0.02 * left:
                if self.meter.cost < np.inf or promise < 0.9 * self.guess:
                    self.meter.note_prices(priced.core.times, priced.best_prices)
                    self.certify(priced, visit.value)
                    return True
                self.raise_guess()
                prices, _ = self.new_prices()
            priced.set_prices(self.between(priced.best_prices, prices[at]))
        self.meter.note_prices(priced.core.times, priced.best_prices)
        priced.set_prices(priced.best_prices)
        return True

    def look(self, priced: PricedCore, budget: Budget, upper: float) -> Visit:
        """Find a good choice at the present prices, and take note of it."""
        visit = priced.visit(budget, upper)
        self.visited = [*self.visited[-3:], visit.choice]
        self.meet(priced.core.expand(visit.choice))
        self.learn(priced.bound)
        return visit

    def certify(self, priced: PricedCore, value: float) -> None:
        """Raise the bound at the present prices towards the least priced cost met, `value`."""
        self.converge(priced, value)
        for step in range(_STEPS):
            spent, before = priced.work, priced.bound
            priced.tighten(value, _CAPS[step % len(_CAPS)])
            self.learn(priced.bound)
            gap = value - priced.bound
            if gap <= max(0.1 * (self.meter.cost - value), 1e-9 * abs(value)):
                return
            priced.sweep(4)
            visit = self.look(priced, _LOOK if step < 3 else _LOOK_HARD, value)
            value = min(value, visit.value)
            self.spend(priced.work - spent)
            if visit.exact or (step > len(_CAPS) and priced.bound - before <= 0.05 * gap):
                return

    def converge(self, priced: PricedCore, value: float) -> None:
        """Pass messages as long as ten passes still close a part of the gap."""
        for _ in range(_TENS):
            spent, before = priced.work, priced.before()
            bound = priced.sweep(10)
            self.learn(priced.bound)
            self.spend(priced.work - spent)
            if bound - before <= _PART * (value - bound):
                break

    def between(self, best: Costs, new: Costs) -> Costs:
        """Where to look next: with several prices, half-way from the best ones to the new."""
        return new if np.count_nonzero(best + new) <= 1 else (best + new) / 2

    def meet(self, choice: tuple[int, ...]) -> bool:
        """Take note of a choice for the whole problem; whether it is feasible."""
        placed = self.core.place(choice)
        assert (placed >= 0).all(), "a reduced core only has choices of the presolved one"
        over = self.rows.over(placed)
        cost = self.core.cost(placed)
        self.cuts.append(Cut(cost, over))
        self.candidates.update(_peaks(over))
        if self.guess == np.inf:
            self.guess = cost + abs(cost)
        if over.max(initial=-1.0) <= 0:
            self.meter.offer(choice)
            return True
        return False

    def learn(self, bound: float) -> None:
        """Note a bound; with one above every possible cost nothing fits."""
        if bound > self.top:
            raise Infeasible
        self.meter.raise_bound(bound)

    def raise_guess(self) -> None:
        """Nothing feasible at such prices: let them rise."""
        self.guess = min(4 * self.guess - 3 * min(c.cost for c in self.cuts), 2 * abs(self.top) + 1)

    def new_prices(self) -> tuple[Costs, float]:
        """The prices that look best after all that was met, and the bound they promise."""
        prices = np.zeros(len(self.core.slack))
        rows = sorted(self.candidates)
        if not rows:
            return prices, np.inf
        cuts = self.cuts
        if self.meter.cost == np.inf:  # a choice that takes no memory at all, if there were one
            cuts = [*cuts, Cut(self.guess, -np.maximum(self.core.slack, 1.0))]
        prices[rows], promise = best_prices(cuts, rows)
        return prices, promise

    def add_rows(self, rows: Picks) -> bool:
        """Take these rows into the rounds to come; whether any of them is new."""
        new = set(rows.tolist()) - set(self.active)
        self.active = sorted(new.union(self.active))
        return bool(new)

    # -- close -----------------------------------------------------------------------------------

    def close(self, priced: PricedCore, pairs: float) -> bool:
        """An exact answer for the most promising choices; False when a new row needs a round."""
        core, spent = priced.core, priced.work
        priced.sweep(2)
        self.learn(priced.bound)
        self.spend(priced.work - spent)
        before = priced.before()
        tau = priced.tau_for(pairs, self.meter.cost - before)
        keep = [priced.within(tau)]
        hint = core.place(self.meter.choice) if self.meter.choice else None
        seen = [*self.visited, hint] if hint is not None and (hint >= 0).all() else self.visited
        keep += [[np.array([c]) for c in choice] for choice in seen]
        answer, cut = self.exactly(core, union(keep), pairs / 1000)
        self.learn(min(answer, before + tau))
        return cut is None or not self.add_rows(np.flatnonzero(cut.over > 0))

    def exactly(self, core: Core, keep: list[Picks], work: float) -> tuple[float, Cut | None]:
        """The bound of a restricted core (inf when nothing in it fits), and what was found."""
        try:
            small = reduce_again(core, keep, Pool())  # a pool of its own: its arrays are not kept
        except Infeasible:
            return np.inf, None
        if (small.slack < 0).any():
            return np.inf, None
        hint = small.place(self.meter.choice) if self.meter.choice else None
        if hint is not None and (hint < 0).any():
            hint = None
        work = min(work, self.meter.work_left())
        found = best_choice(
            small, hint=hint, upper=self.meter.cost, work=work, seconds=self.meter.seconds_left()
        )
        if found.choice is None:
            self.spend(found.work)
            return found.bound, None
        self.meet(small.expand(found.choice))
        self.spend(found.work)
        return found.bound, self.cuts[-1]

    # -- improve ---------------------------------------------------------------------------------

    def improve(self) -> None:
        """Free a neighbourhood of the best choice, fix the rest, solve exactly; until stopped."""
        random = np.random.default_rng(1)
        pairs = _NEAR
        while self.meter.choice:
            now = self.core.place(self.meter.choice)
            if (now < 0).any():
                break  # a start with choices that presolve has dropped
            keep = self.around(int(random.integers(len(now))), now, pairs)
            before = self.meter.cost
            answer, _ = self.exactly(self.core, keep, pairs / 2000)
            self.spend(1e-4 * len(now))
            # Small neighbourhoods that are solved to the end and hold nothing new may grow.
            if self.meter.cost == before:
                pairs *= 1.05 if answer >= before else 0.8
        raise Stop("work")

    def around(self, start: int, now: Picks, pairs: float) -> list[Picks]:
        """All choices near a node, up to so many pairs on the edges; elsewhere the present one."""
        keep = [np.array([c]) for c in now]
        sizes, links = self.core.sizes, self.core.links
        queue, seen, count = [start], {start}, 0.0
        for v in queue:
            count += sum(sizes[v] * len(keep[u]) for u in links[v])
            if count > pairs and v != start:
                break
            keep[v] = np.arange(sizes[v])
            new = [u for u in links[v] if u not in seen]
            seen.update(new)
            queue += new
        return keep


def _most(costs: Costs) -> float:
    """The largest finite entry."""
    return float(costs[np.isfinite(costs)].max())


def _peaks(over: Costs) -> list[int]:
    """The worst row of each stretch of rows that are over, at most eight of them."""
    high = np.flatnonzero(over > 0)
    if not len(high):
        return []
    stretches = np.split(high, np.flatnonzero(np.diff(high) > 1) + 1)
    worst = [int(s[over[s].argmax()]) for s in stretches]
    return sorted(worst, key=lambda r: -over[r])[:8]
