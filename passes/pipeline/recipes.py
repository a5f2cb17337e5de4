"""From which few numbers can a schedule be made?  Recipes, which a search can vary.

A recipe is a pattern, how many F each device does before its first B, and a policy for W. Patterns:

  in turn        the F that come first, then B and F in turn. There and back, of two pieces: the F
                 of the first that come first, F of both in turn, F and B of the second, then F and
                 B of the first and of the second in turn (ZB-V, Qi et al., arXiv 2401.10241,
                 section 6)
  B first        list scheduling, the most urgent B before any F, the oldest microbatch first
  F first        likewise, F before B
  nearest end    likewise, what has the least way to go before it

of which the first puts W where there is room (see `refill`), the others as they go (see `greedy`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from passes.pipeline.greedy import Policy, Urgency, timed_greedy
from passes.pipeline.refill import timed_refill
from passes.pipeline.schedule import Schedule, Task, Way, straight, there_and_back
from passes.pipeline.stage_costs import StageCosts

IN_TURN = "in turn"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a schedule is made from.

    first: per device how many F come first; none for any number.
    """

    pattern: str
    first: tuple[int, ...]
    policy: Policy


def make(
    recipe: Recipe, way: Way, microbatches: int, costs: StageCosts, limit: float
) -> tuple[Schedule, float]:
    """The schedule and its makespan; ScheduleError where limit or way do not allow it."""
    if recipe.pattern == IN_TURN:
        return timed_refill(in_turn(way, microbatches, recipe.first), costs, limit, recipe.policy)
    policy = recipe.policy
    if recipe.first:
        ahead = tuple(recipe.first[place.device] for place in way)
        policy = Policy(policy.patience, ahead, policy.idle)
    urgency = URGENCIES[recipe.pattern](len(way), microbatches)
    way_of = (0,) * microbatches
    return timed_greedy(recipe.pattern, (way,), way_of, costs, limit, urgency, policy)


def _kind_first(kind: str) -> Callable[[int, int], Urgency]:
    def of(pieces: int, microbatches: int) -> Urgency:
        return lambda own, m, piece: float(m + microbatches * (own != kind))

    return of


def _nearest_end(pieces: int, microbatches: int) -> Urgency:
    return lambda kind, m, piece: float(piece if kind == "B" else 2 * pieces - piece)


URGENCIES: dict[str, Callable[[int, int], Urgency]] = {
    "B first": _kind_first("B"),
    "F first": _kind_first("F"),
    "nearest end": _nearest_end,
}


def has_turns(way: Way) -> bool:
    """Whether the pattern is known for this way."""
    devices = 1 + max(place.device for place in way)
    return way in (straight(devices), there_and_back(devices))


def in_turn(way: Way, microbatches: int, first: tuple[int, ...]) -> Schedule:
    """F and B in turn, without W."""
    devices = len(first)
    turns = _turns_straight if way == straight(devices) else _turns_there_and_back
    orders = [_Order(microbatches) for _ in first]
    for d, order in enumerate(orders):
        turns(order, d, devices, first[d])
    done = tuple(tuple(order.tasks) for order in orders)
    return Schedule(IN_TURN, (way,), (0,) * microbatches, done)


class _Order:
    """The tasks of a device so far; those that there are no more of are left out."""

    def __init__(self, microbatches: int) -> None:
        self.microbatches = microbatches
        self.tasks: list[Task] = []
        self.done = {(kind, chunk): 0 for kind in "FB" for chunk in (0, 1)}

    def add(self, *kinds: tuple[str, int], times: int = 1) -> None:
        for _ in range(times):
            for kind, chunk in kinds:
                m = self.done[kind, chunk]
                if m < (self.microbatches if kind == "F" else self.done["F", chunk]):
                    self.done[kind, chunk] = m + 1
                    self.tasks.append(Task(kind, m, chunk))


def _turns_straight(order: _Order, device: int, devices: int, first: int) -> None:
    order.add(("F", 0), times=first)
    order.add(("B", 0), ("F", 0), times=order.microbatches)


def _turns_there_and_back(order: _Order, device: int, devices: int, first: int) -> None:
    one, two = (("F", 0), ("B", 0)), (("F", 1), ("B", 1))
    order.add(one[0], times=first)
    order.add(two[0], one[0], times=device)
    order.add(*two, times=devices - device)
    while order.done["F", 1] < order.microbatches:
        order.add(*one, *two)
    order.add(one[1], two[1], times=order.microbatches)
