"""Which schedule is the best of all, and how good can it be at most?  `solve`, for small ones.

All microbatches cost the same. Of any schedule, let the tasks of each kind on each piece change
places so that they come in the order of the microbatches: whatever task number n waits for is still
done in time, for the n earliest of those have ended when n of these begin. So it is enough to look
for schedules in which each kind of task on each piece is done in order, the same on every device.

Unknown: the time at which each task begins, in whole steps of time. For CP-SAT:

  takes_turns   tasks of one device do not overlap; those of one kind and piece follow each other
  arrives       no task begins before what it waits for has arrived
  fits          activations from F to the end of B, a part of them on to the end of W: cumulative
  span          the makespan is at least each device's last end less its first begin

*What is proven*: where the costs are whole numbers of some step nothing is rounded. Otherwise steps
are small; times are rounded down, and memory in favour of the schedule, so that for each
schedule there is one in steps that takes at most a step longer: the bound, less that, holds. The
order that is found is simulated with the true costs.

The same input gives the same answer: one worker, a fixed seed, and a limit on CP-SAT's own measure
of work. The search begins with a schedule that is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from passes.pipeline.schedule import Schedule, Task
from passes.pipeline.stage_costs import StageCosts
from passes.pipeline.timeline import Timeline, simulate

_WHOLE = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 100, 1000)  # steps per unit of time to try
_STEPS = 1e5  # as many steps has a makespan that is rounded; CP-SAT is far slower with many more
_ROOM = 1e-9  # of the limit: as far as sums of activations may differ
_MEMORY = 1e6  # as many steps has the limit


@dataclass(frozen=True, slots=True)
class Exact:
    """A schedule, if one was found, and a lower bound of every schedule's makespan."""

    timeline: Timeline | None
    bound: float
    work: float


def solve(start: Timeline, limit: float, bound: float, work: float) -> Exact:
    """The best schedule on the way of another one.

    start: a schedule that is known, on one way. bound: one that is known. work: as much as CP-SAT
    may do, in its deterministic seconds.
    """
    return _Model(start, limit, bound).solve(work)


class _Model:
    def __init__(self, start: Timeline, limit: float, bound: float) -> None:
        from ortools.sat.python import cp_model

        self.start, self.limit, self.known = start, limit, bound
        self.schedule, self.costs = start.schedule, start.costs
        (self.way,) = self.schedule.ways
        self.steps, self.rounded = _steps(self.costs, start.makespan)
        work = sum(row.end - row.start for row in start.rows)
        sends = 2 * len(self.way) * self.costs.send
        self.horizon = 2 * math.ceil((work + sends) * self.steps) + 2
        self.cp_model, self.model = cp_model, cp_model.CpModel()
        self.begin: dict[tuple[str, int, int], Any] = {}
        self._tasks()
        self._takes_turns()
        self._arrives()
        self._fits()
        self._span()

    def _length(self, seconds: float) -> int:
        return math.floor(seconds * self.steps + 1e-6)

    def _takes(self, kind: str, piece: int) -> int:
        return self._length(self.costs.seconds(kind, piece))

    def _end(self, kind: str, piece: int, m: int) -> Any:
        return self.begin[kind, piece, m] + self._takes(kind, piece)

    def _tasks(self) -> None:
        for kind in "FBW":
            for k in range(len(self.way)):
                for m in range(self.schedule.microbatches):
                    name = f"{kind}{m}.{k}"
                    self.begin[kind, k, m] = self.model.new_int_var(0, self.horizon, name)

    def _takes_turns(self) -> None:
        own: dict[int, list[Any]] = {}
        for (kind, k, m), begin in self.begin.items():
            takes = self._takes(kind, k)
            box = self.model.new_fixed_size_interval_var(begin, takes, "")
            own.setdefault(self.way[k].device, []).append(box)
            if m:
                self.model.add(begin >= self._end(kind, k, m - 1))
        for boxes in own.values():
            self.model.add_no_overlap(boxes)

    def _arrives(self) -> None:
        last = len(self.way) - 1
        for m in range(self.schedule.microbatches):
            for k in range(last + 1):
                self.model.add(self.begin["W", k, m] >= self._end("B", k, m))
                self.model.add(self.begin["B", k, m] >= self._end("F", k, m))
                if k == last:
                    continue
                far = self.way[k].device != self.way[k + 1].device
                send = self._length(self.costs.send) if far else 0
                self.model.add(self.begin["F", k + 1, m] >= self._end("F", k, m) + send)
                self.model.add(self.begin["B", k, m] >= self._end("B", k + 1, m) + send)

    def _fits(self) -> None:
        unit = _MEMORY / self.limit if self.limit > 0 else 0.0
        room = math.ceil(self.limit * unit)
        held: dict[int, list[tuple[Any, int]]] = {}
        for k, place in enumerate(self.way):
            size, kept = (math.floor(x[k] * unit) for x in (self.costs.activation, self.costs.kept))
            boxes = held.setdefault(place.device, [])
            for m in range(self.schedule.microbatches):
                begin, done = self.begin["F", k, m], self._end("B", k, m)
                boxes.append((self._box(begin, done), size))
                boxes.append((self._box(done, self._end("W", k, m)), kept))
            together = room // size if size else self.schedule.microbatches
            for m in range(together, self.schedule.microbatches):
                self.model.add(self.begin["F", k, m] >= self._end("B", k, m - together))
        for boxes in held.values():
            self.model.add_cumulative([b for b, _ in boxes], [n for _, n in boxes], room)

    def _box(self, begin: Any, end: Any) -> Any:
        size = self.model.new_int_var(0, self.horizon, "")
        return self.model.new_interval_var(begin, size, end, "")

    def _span(self) -> None:
        most = math.ceil(self.start.makespan * self.steps)
        least = max(0, math.floor(self.known * self.steps))
        self.makespan = self.model.new_int_var(min(least, most), most, "makespan")
        first: dict[int, int] = {}
        for k, place in enumerate(self.way):
            first.setdefault(place.device, k)
        n = self.schedule.microbatches - 1
        self.model.add(self.begin["F", 0, 0] == 0)
        for k, place in enumerate(self.way):
            begin = self.begin["F", first[place.device], 0]
            self.model.add(self._end("W", k, n) - begin <= self.makespan)
        self.model.minimize(self.makespan)

    def _hint(self) -> None:
        numbers: dict[tuple[str, int], int] = {}
        for row in sorted(self.start.rows, key=lambda r: (r.start, r.end)):
            k = self.schedule.piece(row.device, row.task)
            m = numbers.get((row.kind, k), 0)
            numbers[row.kind, k] = m + 1
            self.model.add_hint(self.begin[row.kind, k, m], self._length(row.start))

    def solve(self, work: float) -> Exact:
        self._hint()
        solver = self.cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 1
        solver.parameters.max_deterministic_time = work
        solver.parameters.catch_sigint_signal = False  # Ctrl-C stays what it was
        status = solver.solve(self.model)
        spent = solver.response_proto.deterministic_time
        if status not in (self.cp_model.OPTIMAL, self.cp_model.FEASIBLE):
            return Exact(None, self.known, spent)
        bound = (math.ceil(solver.best_objective_bound - 1e-6) - int(self.rounded)) / self.steps
        orders: list[list[tuple[int, int, int, int, Task]]] = [[] for _ in self.schedule.orders]
        for (kind, k, m), begin in self.begin.items():
            device, chunk = self.way[k]
            at = solver.value(begin)
            # Tasks that take no time: a microbatch after the other, each in its order.
            rank = {"F": k, "B": 2 * len(self.way) - k, "W": 3 * len(self.way)}[kind]
            orders[device].append((at, at + self._takes(kind, k), m, rank, Task(kind, m, chunk)))
        tables = tuple(tuple(task for *_, task in sorted(order)) for order in orders)
        schedule = Schedule("exact", self.schedule.ways, self.schedule.way_of, tables)
        return Exact(self._checked(schedule), max(self.known, bound), spent)

    def _checked(self, schedule: Schedule) -> Timeline | None:
        """With the true costs; none where it fits only because memory was rounded."""
        timeline = simulate(schedule, self.costs)
        return timeline if max(timeline.peaks) <= self.limit * (1 + _ROOM) else None


def _steps(costs: StageCosts, makespan: float) -> tuple[float, bool]:
    """How many steps a unit of time has, and whether times are rounded to them."""
    times = {*costs.forward, *costs.backward, *costs.weight, costs.send}
    for steps in _WHOLE:
        if all(abs(t * steps - round(t * steps)) < 1e-9 for t in times):
            return float(steps), False
    return _STEPS / makespan, True
