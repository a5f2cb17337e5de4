"""When is each W done, where the order of F and B is given?  `fill`, by what the tasks cost.

Each device takes its F and B in their order, each as soon as it can. Until the next one arrives it
may do a W. Where that takes longer, the next one is late, and so is all that waits for it; where
the device waits instead, it is idle, and its W come later. Being idle costs nothing while another
device has been idle for longer, since the makespan is that of the most idle one (as in Qi et al.,
arXiv 2401.10241, section 3.1, for gaps that are shorter than W). So W is begun

    where it fits, up to a part of it that may be missing
    where waiting would make this device the most idle of all
    where what comes next has not even been begun by the device that sends it
    where F comes next and has no room
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from passes.pipeline.schedule import Schedule, ScheduleError, Task, Work
from passes.pipeline.stage_costs import StageCosts

_NEAR = 1e-9  # as far as sums of times, and of parts of pieces, may differ


def fill(
    schedule: Schedule, costs: StageCosts, limit: float, late: float = 0.0, idle: float = 0.0
) -> Schedule:
    """The schedule with its W put anew.

    limit: of pieces on a device; one that waits for W counts as the part that W needs. late: how
    much of a W may be missing when the next task arrives. idle: as long as this any device may be.
    Raises ScheduleError where F and B do not fit the limit or wait for each other, and for BW.
    """
    if any(task.kind == "BW" for _, task in schedule.tasks()):
        raise ScheduleError(f"{schedule.name} has BW, of which no W can be put elsewhere")
    return _Fill(schedule, costs, limit, late, idle).run()


class _Fill:
    def __init__(
        self, schedule: Schedule, costs: StageCosts, limit: float, late: float, idle: float
    ) -> None:
        self.schedule, self.costs = schedule, costs
        self.limit, self.late, self.allowed = limit * (1 + _NEAR), late, idle
        self.ahead = [deque(t for t in order if t.kind != "W") for order in schedule.orders]
        self.pending = [deque[Task]() for _ in schedule.orders]
        self.orders: list[list[Task]] = [[] for _ in schedule.orders]
        self.free = [0.0] * schedule.devices
        self.idle = [0.0] * schedule.devices
        self.held = [0.0] * schedule.devices
        self.arrives: dict[Work, float] = {("F", m, 0): 0.0 for m in range(schedule.microbatches)}
        self.queue = [(0.0, d) for d in range(schedule.devices)]
        self.kept = [
            part / whole if whole else 1.0
            for whole, part in zip(costs.activation, costs.kept, strict=True)
        ]

    def run(self) -> Schedule:
        """Devices act in the order of time."""
        while self.queue:
            now, device = heapq.heappop(self.queue)
            if now >= self.free[device]:
                task = self._choose(device, now)
                if task is not None:
                    self._do(task, device, now)
        if any(self.ahead):
            raise ScheduleError(
                f"{self.schedule.name}: its F and B wait for each other, or need more room than "
                f"{self.limit:g} pieces"
            )
        orders = tuple(tuple(order) for order in self.orders)
        return Schedule(self.schedule.name, self.schedule.ways, self.schedule.way_of, orders)

    def _choose(self, device: int, now: float) -> Task | None:
        """What a device does now; None where it waits, for what wakes it when it arrives."""
        gap = math.inf
        if self.ahead[device]:
            task = self.ahead[device][0]
            arrives = self.arrives.get(self._work(device, task), math.inf)
            if task.kind != "F" or self.held[device] + 1 <= self.limit:
                gap = arrives - now
                if gap <= 0:
                    return self.ahead[device].popleft()
        if self.pending[device] and self._fits(device, gap):
            return self.pending[device].popleft()
        return None

    def _fits(self, device: int, gap: float) -> bool:
        takes = self.costs.weight[self.schedule.piece(device, self.pending[device][0])]
        if gap >= takes * (1 - self.late - _NEAR):
            return True
        return self.idle[device] + gap > max(self.allowed, *self.idle) * (1 + _NEAR)

    def _work(self, device: int, task: Task) -> Work:
        return task.kind, task.microbatch, self.schedule.piece(device, task)

    def _do(self, task: Task, device: int, now: float) -> None:
        kind, m, piece = self._work(device, task)
        if self.orders[device]:
            self.idle[device] += now - self.free[device]
        self.orders[device].append(task)
        end = self.free[device] = now + self.costs.seconds(kind, piece)
        heapq.heappush(self.queue, (end, device))
        if kind == "F":
            self.held[device] += 1
            last = piece + 1 == self.costs.pieces
            self._sent(("B", m, piece) if last else ("F", m, piece + 1), device, end)
        elif kind == "B":
            self.held[device] -= 1 - self.kept[piece]
            self.pending[device].append(task._replace(kind="W"))
            if piece:
                self._sent(("B", m, piece - 1), device, end)
        else:
            self.held[device] -= self.kept[piece]

    def _sent(self, work: Work, device: int, end: float) -> None:
        _, m, piece = work
        to = self.schedule.place(m, piece).device
        arrives = self.arrives[work] = end + (self.costs.send if to != device else 0.0)
        heapq.heappush(self.queue, (max(arrives, self.free[to]), to))
