"""Which schedule on one way is good?  `Search`: published ones, recipes, moves, all orders.

It begins with what is published, then tries recipes (see `recipes`) for how many F come first on
each device. The first B is back on device d after a round trip from there to the last device,

    R_d = sum of F_k over k >= d + sum of B_k over k > d + 2 c (p - 1 - d)

so with R_d / F first the device has no time to wait; others are multiples of the devices that
follow. The best recipe is changed, number by number, as long as that makes it better. Then single
tasks are moved (see `improve`); and where few are left to order all orders are searched (see
`exact`). It ends where the makespan is the lower bound (see `bounds`).

Recipes differ in how a schedule begins and ends. So where there are many microbatches they are
compared with fewer of them, and only the best one is made for all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from passes.pipeline import generators, vee
from passes.pipeline.bounds import lower_bound, round_trip
from passes.pipeline.exact import solve
from passes.pipeline.greedy import Policy
from passes.pipeline.improve import improve
from passes.pipeline.recipes import IN_TURN, URGENCIES, Recipe, has_turns, make
from passes.pipeline.schedule import Schedule, ScheduleError, Way, straight, there_and_back
from passes.pipeline.stage_costs import StageCosts
from passes.pipeline.timeline import Timeline, simulate

_SAME = 1e-6  # of the makespan: it is no longer worth to look for less
_ROOM = 1e-9  # of the limit: as far as sums of activations may differ
_WORK, _WORK_PER_TASK = 4_000_000, 150  # about 1 s, and another one for 20,000 tasks
_PLACED = 8  # to place a task takes as long as to simulate one so many times in `improve`
_SPARE = (0.0, 0.002, 0.01, 0.03)  # of the work: idle time that devices may have beyond the bound


class Search:
    """The best schedule on a way so far, the family that it is from, and a bound for all."""

    def __init__(
        self, way: Way, microbatches: int, costs: StageCosts, limit: float, work: int | None
    ) -> None:
        self.way, self.microbatches, self.costs, self.limit = way, microbatches, costs, limit
        self.devices = 1 + max(place.device for place in way)
        self.tasks = 3 * microbatches * len(way)
        self.left = _WORK + _WORK_PER_TASK * self.tasks if work is None else work
        self.bound = lower_bound(way, microbatches, costs, limit)
        self._seen: dict[tuple[Recipe, int], float] = {}
        # List scheduling lets no microbatch begin that can not end: this one always fits.
        safe, _ = make(Recipe("B first", (), Policy()), way, microbatches, costs, limit)
        self.best, self.family = simulate(safe, costs), "B first"

    def _offer(self, timeline: Timeline, family: str) -> None:
        if timeline.makespan < self.best.makespan * (1 - _ROOM):
            self.best, self.family = timeline, family

    def recipes(self, aim: float = math.inf) -> None:
        """Published schedules, and recipes unless the bound is above the aim."""
        for schedule in _published(self.way, self.microbatches):
            timeline = simulate(schedule, self.costs)
            if max(timeline.peaks) <= self.limit * (1 + _ROOM):
                self._offer(timeline, schedule.name)
        if self.bound >= aim:
            return
        few = self._under_way() + self.devices + 8
        if few < 0.6 * self.microbatches:
            shared = self.left // 2
            self.left -= shared
            best = self._vary(few, list(self._first_recipes(few)))
            self.left += shared
            if best is None:
                return
            policies = [best.policy, *self._policies(self.microbatches)]
            self._vary(self.microbatches, [replace(best, policy=each) for each in policies])
        else:
            self._vary(self.microbatches, list(self._first_recipes(self.microbatches)))

    def _vary(self, microbatches: int, recipes: Iterable[Recipe]) -> Recipe | None:
        """The best of these recipes, or what becomes of it by changes."""
        bound = lower_bound(self.way, microbatches, self.costs, self.limit) * (1 + _SAME)
        if microbatches == self.microbatches and self.best.makespan <= bound:
            return None
        best, least = None, math.inf
        for recipe in recipes:
            makespan = self._try(recipe, microbatches)
            if makespan < least * (1 - _ROOM):
                best, least = recipe, makespan
            if self.left < 0 or least <= bound:
                return best
        changes = list(_changes(self.devices, list(self._policies(microbatches))))
        better = best is not None
        while better:
            better = False
            for change in changes:
                other = _changed(best, change) if best is not None else None
                makespan = self._try(other, microbatches) if other else math.inf
                if makespan < least * (1 - _ROOM):
                    best, least, better = other, makespan, True
                if self.left < 0 or least <= bound:
                    return best
        return best

    def _try(self, recipe: Recipe, microbatches: int) -> float:
        """A recipe's makespan; where it is one of all microbatches it may be the answer."""
        key = recipe, microbatches
        if key not in self._seen:
            self.left -= _PLACED * 3 * microbatches * len(self.way)
            try:
                made, self._seen[key] = make(recipe, self.way, microbatches, self.costs, self.limit)
            except ScheduleError:
                self._seen[key] = math.inf
                return math.inf
            if microbatches == self.microbatches and self._seen[key] < self.best.makespan:
                self._offer(simulate(made, self.costs), recipe.pattern)
        return self._seen[key]

    def _first_recipes(self, microbatches: int) -> Iterator[Recipe]:
        # Two policies will do to find what is good to begin with; others are changes of it.
        policies = list(self._policies(microbatches))[:2]
        firsts = list(dict.fromkeys(self._firsts()))
        if has_turns(self.way):
            for policy, first in itertools.product(policies, firsts):
                yield Recipe(IN_TURN, first, policy)
        for pattern, policy, first in itertools.product(URGENCIES, policies, (firsts[0], ())):
            yield Recipe(pattern, first, policy)

    def _policies(self, microbatches: int) -> Iterator[Policy]:
        """By how late a W may end, and by how long devices may be idle, as the bound allows."""
        costs, busy = self.costs, [0.0] * self.devices
        for k, place in enumerate(self.way):
            busy[place.device] += microbatches * (costs.forward[k] + costs.seconds("BW", k))
        bound = lower_bound(self.way, microbatches, costs, self.limit)
        spare = [
            Policy(idle=tuple(max(0.0, bound - b) + more * max(busy) for b in busy))
            for more in _SPARE
        ]
        yield from (Policy(1.0), spare[0])
        yield from (Policy(patience) for patience in (0.5, 0.0, 0.75, 0.25))
        yield from spare[1:]

    def _under_way(self) -> int:
        """How many microbatches there is room for on a device; of two round trips at most."""
        held = [0.0] * self.devices
        for k, place in enumerate(self.way):
            held[place.device] += self.costs.activation[k]
        most = 2 * self.devices
        return min(most, int(self.limit / max(held))) if max(held) > 0 else most

    def _firsts(self) -> Iterator[tuple[int, ...]]:
        """How many F may come first on each device."""
        p, size = self.devices, max(self.costs.activation)
        most = math.floor(self.limit / size * (1 + _ROOM)) if size else self.microbatches
        for numbers in self._there_and_back() if self.way == there_and_back(p) else self._ahead():
            yield tuple(max(1, min(n, most, self.microbatches)) for n in numbers)

    def _there_and_back(self) -> Iterator[list[int]]:
        """Until the first F is back, without time to wait."""
        for more in (0, 1, -1):
            yield [2 * (self.devices - d) - 1 + more for d in range(self.devices)]

    def _ahead(self) -> Iterator[list[int]]:
        """Until the first B is back, or for each device ahead so many.

        One F more delays the B for all devices before, one less leaves this device idle: the first
        devices can afford the one, the last ones the other.
        """
        p = self.devices
        trips = [round_trip(self.way, self.costs, d) - self.costs.backward[d] for d in range(p)]
        slowest = list(itertools.accumulate(self.costs.forward[:p], max))
        fit = [r / f if f else 1.0 for r, f in zip(trips, slowest, strict=True)]
        yield [math.ceil(n) if 2 * d < p else math.floor(n) for d, n in enumerate(fit)]
        yield [math.floor(n) for n in fit]
        for factor in (2.0, 1.0, 1.5):
            yield [1 + int(factor * (p - 1 - d)) for d in range(p)]

    def moves(self, aim: float) -> None:
        """The best schedule with single tasks moved, unless this way can not come to the aim."""
        enough = self.bound * (1 + _SAME)
        if self.left > 0 and self.best.makespan > enough and aim > enough:
            schedule = improve(self.best.schedule, self.costs, self.limit, self.left, enough)
            self._offer(simulate(schedule, self.costs), f"{self.family}, moved")

    def all_orders(self, seconds: float, aim: float) -> None:
        """The best of all orders, and a better bound, unless this way can not come to the aim."""
        if seconds > 0 and aim > self.bound * (1 + _SAME):
            exact = solve(self.best, self.limit, self.bound, seconds)
            self.bound = max(self.bound, exact.bound)
            if exact.timeline is not None:
                self._offer(exact.timeline, "exact")


class _Change(NamedTuple):
    """Another policy, or so many F more that come first on some devices, one after the other."""

    policy: Policy | None
    devices: range = range(0)
    more: int = 0


def _changes(devices: int, policies: Sequence[Policy]) -> Iterator[_Change]:
    """Policies, then F on all devices up to one, on those after it, on one alone."""
    yield from map(_Change, policies)
    # In the middle first, then in the middle of the halves, and so on.
    order = sorted(range(devices), key=lambda d: (-((d + 1) & -(d + 1)), d))
    for d, more in itertools.product(order, (1, -1)):
        yield _Change(None, range(d + 1), more)
        yield _Change(None, range(d + 1, devices), more)
    for d, more in itertools.product(order, (1, -1)):
        yield _Change(None, range(d, d + 1), more)


def _changed(recipe: Recipe, change: _Change) -> Recipe | None:
    if change.policy is not None:
        return replace(recipe, policy=change.policy)
    first = tuple(n + change.more * (d in change.devices) for d, n in enumerate(recipe.first))
    return replace(recipe, first=first) if min(first, default=0) > 0 else None


def _published(way: Way, microbatches: int) -> Iterator[Schedule]:
    """All published schedules of a way."""
    p = 1 + max(place.device for place in way)
    chunks = len(way) // p
    if way == straight(p):
        yield generators.one_f_one_b(p, microbatches)
        yield generators.zb_h1(p, microbatches)
        yield generators.zb_h2(p, microbatches)
        yield generators.gpipe(p, microbatches)
        yield generators.eager(p, microbatches)
        yield generators.two_bp(p, microbatches)
    elif way == there_and_back(p):
        yield vee.v_min(p, microbatches)
        yield vee.v_half(p, microbatches)
        yield vee.zb_v(p, microbatches)
    elif way == straight(p, chunks) and microbatches % p == 0:
        yield generators.interleaved(p, microbatches, chunks)
