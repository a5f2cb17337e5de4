"""Which schedule is the best for these costs and this limit?  `best_schedule`.

On each way that the pieces may lie:

1. the published schedules that fit, and many made from recipes (see `search`);
2. the best one improved, task by task (see `improve`);
3. where few tasks are left to order, all orders (see `exact`).

It ends where the makespan is one that none can be below (see `bounds`). Work is counted, not time:
the same input gives the same schedule.

>>> from passes.pipeline.stage_costs import even
>>> best = best_schedule(4, 8, lambda pieces: even(4, pieces, 1, 1, 1), limit=4)
>>> best.timeline.makespan, best.family, best.optimal
(24.0, 'ZB-V', True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from passes.pipeline.bounds import least_limit
from passes.pipeline.schedule import ScheduleError, Way, straight, there_and_back
from passes.pipeline.search import Search
from passes.pipeline.stage_costs import StageCosts
from passes.pipeline.timeline import Timeline

_SAME = 1e-6  # of the makespan: as far as a schedule may be from the bound and be called optimal
_ROOM = 1e-9  # of the limit: as far as sums of activations may differ
_FEW, _PROOF = 300, 0.5  # tasks that all orders of are searched by default, and how long


@dataclass(frozen=True)
class Best:
    """The best schedule that was found.

    bound: no schedule on any of the ways has a smaller makespan. family: what it was made from.
    limit: within which.
    """

    timeline: Timeline
    bound: float
    family: str
    limit: float

    @property
    def optimal(self) -> bool:
        """Whether it is proven that no schedule takes less time, but for rounding."""
        return self.timeline.makespan <= self.bound * (1 + _SAME)

    @property
    def gap(self) -> float:
        """How far the bound is below the makespan, as a part of it."""
        makespan = self.timeline.makespan
        return max(0.0, 1 - self.bound / makespan) if makespan else 0.0


def best_schedule(
    devices: int,
    microbatches: int,
    costs_of: Callable[[int], StageCosts],
    limit: float,
    ways: Sequence[Way] | None = None,
    work: int | None = None,
    proof: float | None = None,
) -> Best:
    """The best schedule that is found within a limit of activations per device.

    costs_of: the costs of the model cut into so many pieces. ways: where these may lie, by default
    straight and there and back. work: how many tasks may be simulated on each way; by default it
    grows with their number, and takes some seconds. proof: seconds of CP-SAT (of its own measure)
    for the search of all orders on each way; by default there is one where there are few tasks.
    Raises ScheduleError where no schedule fits, with the least limit that works.
    """
    if devices < 1 or microbatches < 1:
        raise ScheduleError(
            f"{microbatches} microbatches on {devices} devices: one of each is needed at least"
        )
    ways = (straight(devices), there_and_back(devices)) if ways is None else ways
    searches = _searches(microbatches, costs_of, limit, ways, work)
    # The most promising way first, so that others are left as soon as they can not be better.
    aim = math.inf
    for search in sorted(searches, key=lambda search: search.bound):
        search.recipes(aim)
        aim = min(aim, search.best.makespan)
    for search in searches:
        search.moves(_least(searches))
    for search in searches:
        few = search.tasks <= _FEW
        search.all_orders(_PROOF * few if proof is None else proof, _least(searches))
    best = min(searches, key=lambda search: search.best.makespan)
    bound = min(search.bound for search in searches)
    return Best(best.best, bound, best.family, limit)


def _least(searches: Sequence[Search]) -> float:
    return min(search.best.makespan for search in searches)


def _searches(
    microbatches: int,
    costs_of: Callable[[int], StageCosts],
    limit: float,
    ways: Sequence[Way],
    work: int | None,
) -> list[Search]:
    """On each of the ways that has room for one microbatch."""
    searches, least = [], math.inf
    for way in ways:
        costs = costs_of(len(way))
        needed = least_limit(way, costs)
        least = min(least, needed)
        if needed <= limit * (1 + _ROOM):
            searches.append(Search(way, microbatches, costs, limit, work))
    if not searches:
        raise ScheduleError(
            f"no schedule fits within {limit:g} of activations per device; "
            f"the least limit that works is {least:.12g}"
        )
    return searches
