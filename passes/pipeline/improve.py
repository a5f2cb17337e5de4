"""Which small changes of order make a schedule shorter?  `improve`, a local search.

What makes the makespan is a path of tasks, each of which begins when the one before it ends or
arrives, back from the last task of the device that is longest at it. Only what changes this path
can help (van Laarhoven, Aarts, Lenstra, Operations Research 40(1), 1992, on job shops). The path
stays on a device for a while (a *run* of tasks without idle time), then goes on to another. Moves
of one task on its device:

  sooner   the last task of a run, for which the other device waits, before others of the run
  fill     a later task into the idle time before a run
  later    a task of a run, to after it

Where a move leaves no room for an F, the W and B that make room for it come sooner, too. A move is
drawn at random (always the same draws), simulated, and kept if it makes the schedule longer by no
more than a tolerance, which sinks to 0 (threshold accepting: Dueck, Scheuer, J. Comput. Phys.
90(1), 1990). How long a schedule is: its makespan, and a small part of the mean of all devices, so
that it counts when one of several devices gets better. The best one on the way is the answer.
"""

from __future__ import annotations

import random
from dataclasses import replace

from passes.pipeline.schedule import Schedule
from passes.pipeline.stage_costs import StageCosts

_NEAR = 1e-9  # of the makespan, of the limit: as far as sums may differ
_FAR = 8  # places that a task moves at most
_REPAIRS = 3  # tasks that come sooner to make room, at most
_TOLERANCE = 0.02  # of the longest task, when the search begins
_MEAN = 0.02  # how much the mean of the devices counts beside the makespan
_DRAW = 20  # tasks that could be simulated while a move is drawn that is not allowed

_Run = tuple[int, int, int]  # a device, the places of the first and the last task


def improve(
    schedule: Schedule, costs: StageCosts, limit: float, work: int, enough: float = 0.0
) -> Schedule:
    """A schedule of the same tasks that takes no longer. work: tasks simulated.

    enough: a makespan at which the search ends.
    """
    search = _Moves(schedule, costs, limit)
    search.run(work, enough)
    orders = tuple(tuple(search.tasks[k][1] for k in order) for order in search.best)
    return replace(schedule, orders=orders)


class _Moves:
    def __init__(self, schedule: Schedule, costs: StageCosts, limit: float) -> None:
        self.limit = limit * (1 + _NEAR)
        self.tasks = list(schedule.tasks())
        count = len(self.tasks)
        self.orders: list[list[int]] = [[] for _ in schedule.orders]
        for k, (device, _) in enumerate(self.tasks):
            self.orders[device].append(k)
        self.takes, self.holds = [0.0] * count, [0.0] * count
        # What a task waits for: on its device, which comes first in any case; and elsewhere.
        self.own, self.after = [-1] * count, [-1] * count
        self.other, self.delay = [-1] * count, [0.0] * count
        self._wire(schedule, costs)
        self.best = [list(order) for order in self.orders]
        self.spent = 0

    def _wire(self, schedule: Schedule, costs: StageCosts) -> None:
        number = {
            (task.kind, task.microbatch, schedule.piece(device, task)): k
            for k, (device, task) in enumerate(self.tasks)
        }
        for (kind, m, piece), k in number.items():
            whole, kept = costs.activation[piece], costs.kept[piece]
            self.takes[k] = costs.seconds(kind, piece)
            self.holds[k] = {"F": whole, "B": kept - whole, "W": -kept, "BW": -whole}[kind]
            if kind != "F":
                self.own[k] = number["B" if kind == "W" else "F", m, piece]
                self.after[self.own[k]] = k
            step = {"F": -1, "B": 1, "BW": 1, "W": 0}[kind]
            names = ("F",) if kind == "F" else ("B", "BW")
            if step and 0 <= piece + step < schedule.pieces:
                self.other[k] = next(
                    number[n, m, piece + step] for n in names if (n, m, piece + step) in number
                )
                if self.tasks[self.other[k]][0] != self.tasks[k][0]:
                    self.delay[k] = costs.send

    def run(self, work: int, enough: float) -> None:
        rng = random.Random(1)
        ends = self._ends()
        assert ends is not None, "the tasks of a schedule that was simulated do not wait in a ring"
        shortest = makespan = self._makespan(ends)
        value = self._value(ends)
        most = _TOLERANCE * max(self.takes, default=0.0)
        runs = self._runs(ends, rng)
        tries = 0
        while self.spent < work and shortest > enough:
            self.spent += _DRAW
            device, first, last = runs[int(rng.random() * len(runs))]
            before = self.orders[device]
            after = self._moved(before, first, last, rng)
            if after is None:
                continue
            self.orders[device] = after
            found = self._ends()
            tolerance = most * max(0.0, 1 - self.spent / work) * rng.random()
            if found is not None and self._value(found) <= value + tolerance:
                ends, value = found, self._value(found)
                makespan = self._makespan(ends)
                runs = self._runs(ends, rng)
                if makespan < shortest * (1 - _NEAR):
                    shortest, self.best = makespan, [list(order) for order in self.orders]
                continue
            self.orders[device] = before
            tries += 1
            if tries % 20 == 0:  # perhaps the path of another device that is as long at it
                runs = self._runs(ends, rng)

    def _ends(self) -> list[float] | None:
        """When each task ends; None where some wait for each other."""
        orders, other, delay, takes = self.orders, self.other, self.delay, self.takes
        self.spent += len(takes)
        ends = [-1.0] * len(takes)
        free, at = [0.0] * len(orders), [0] * len(orders)
        waiting: dict[int, int] = {}
        turn = list(range(len(orders)))
        done = 0
        while turn:
            device = turn.pop()
            order, now, since = orders[device], free[device], at[device]
            for task in order[since:] if since else order:
                first = other[task]
                if first >= 0:
                    arrives = ends[first]
                    if arrives < 0:
                        waiting[first] = device
                        break
                    arrives += delay[task]
                    if arrives > now:
                        now = arrives
                now += takes[task]
                ends[task] = now
                since += 1
                if task in waiting:
                    turn.append(waiting.pop(task))
            done += since - at[device]
            free[device], at[device] = now, since
        return ends if done == len(takes) else None

    def _spans(self, ends: list[float]) -> list[float]:
        return [ends[o[-1]] - ends[o[0]] + self.takes[o[0]] if o else 0.0 for o in self.orders]

    def _makespan(self, ends: list[float]) -> float:
        return max(self._spans(ends))

    def _value(self, ends: list[float]) -> float:
        spans = self._spans(ends)
        return max(spans) + _MEAN * sum(spans) / len(spans)

    def _runs(self, ends: list[float], rng: random.Random) -> list[_Run]:
        """The path back from the end of a device: mostly of one that is longest at it."""
        spans = self._spans(ends)
        longest = max(spans) * (1 - _NEAR)
        devices = [d for d, span in enumerate(spans) if self.orders[d]]
        if rng.random() < 0.7:
            devices = [d for d in devices if spans[d] >= longest]
        device = devices[int(rng.random() * len(devices))]
        near = longest * _NEAR
        place, out = len(self.orders[device]) - 1, []
        while True:
            order, last = self.orders[device], place
            while place and ends[order[place - 1]] >= self._begin(ends, order[place]) - near:
                place -= 1
            out.append((device, place, last))
            other = self.other[order[place]]
            if other < 0:
                return out
            device = self.tasks[other][0]
            place = self.orders[device].index(other)

    def _begin(self, ends: list[float], task: int) -> float:
        return ends[task] - self.takes[task]

    def _moved(
        self, order: list[int], first: int, last: int, rng: random.Random
    ) -> list[int] | None:
        """The order of a device with one task moved; None where that can not be."""
        which, far = rng.random(), 1 + int(rng.random() * _FAR)
        if which < 0.4:
            source, target = last, last - far
        elif which < 0.8:
            source, target = first + far, first
        else:
            source, target = last - far, last
        if min(source, target) < 0 or source >= len(order):
            return None
        task = order[source]
        if target < source:
            passed = order[target:source]
            if self.own[task] in passed:
                return None
            moved = [*order[:target], task, *passed, *order[source + 1 :]]
        else:
            passed = order[source + 1 : target + 1]
            if self.after[task] in passed:
                return None
            moved = [*order[:source], *passed, task, *order[target + 1 :]]
        return self._with_room(moved)

    def _with_room(self, order: list[int]) -> list[int] | None:
        """The order with B and W sooner where there is no room for an F; None where none help."""
        holds, held, place, repairs = self.holds, 0.0, 0, 0
        while place < len(order):
            held += holds[order[place]]
            if held <= self.limit:
                place += 1
                continue
            held -= holds[order[place]]
            done = set(order[:place])
            frees = (k for k in range(place + 1, len(order)) if holds[order[k]] < 0)
            source = next((k for k in frees if self.own[order[k]] in done), None)
            if source is None or repairs == _REPAIRS:
                return None
            repairs += 1
            order = [*order[:place], order[source], *order[place:source], *order[source + 1 :]]
        return order
