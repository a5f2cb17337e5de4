"""Where do W go when each device keeps the order of its F and B?  `refill`.

W can wait. Taken out of a schedule they leave gaps, and go back one at a time, the oldest first:
before an F for which there is no room without them; into the time before the next F or B arrives
where they end before that; and where they end later, by the policy (see `greedy`).
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import replace

from passes.pipeline.greedy import Policy
from passes.pipeline.schedule import Schedule, ScheduleError, Task, Work
from passes.pipeline.stage_costs import StageCosts

_ROOM = 1e-9  # of the limit: as far as sums of activations may differ


def refill(schedule: Schedule, costs: StageCosts, limit: float, policy: Policy) -> Schedule:
    """The same F and B in the same order, B alone in place of BW, and W anew.

    Raises ScheduleError where the order of F and B does not fit within the limit.
    """
    return timed_refill(schedule, costs, limit, policy)[0]


def timed_refill(
    schedule: Schedule, costs: StageCosts, limit: float, policy: Policy
) -> tuple[Schedule, float]:
    """Likewise, with its makespan, which is known then without simulating."""
    run = _Refill(schedule, costs, limit, policy)
    done = run.run()
    return done, max((device.free - device.begins for device in run.devices), default=0.0)


class _Device:
    """What is still to come on a device, and what it has done."""

    def __init__(self, fixed: list[tuple[Task, Work]]) -> None:
        self.fixed = fixed[::-1]
        self.pending: deque[tuple[Task, Work]] = deque()
        self.free = self.held = self.idle = self.begins = 0.0
        self.order: list[Task] = []


class _Refill:
    def __init__(self, schedule: Schedule, costs: StageCosts, limit: float, policy: Policy) -> None:
        self.schedule, self.costs, self.policy = schedule, costs, policy
        self.limit = limit * (1 + _ROOM)
        self.devices: list[_Device] = []
        for d, order in enumerate(schedule.orders):
            own = [t._replace(kind=t.kind[0]) for t in order if t.kind != "W"]
            self.devices.append(
                _Device([(t, (t.kind, t.microbatch, schedule.piece(d, t))) for t in own])
            )
        self.arrivals: dict[Work, float] = {("F", m, 0): 0.0 for m in range(schedule.microbatches)}
        self.queue = [(0.0, d) for d in range(schedule.devices)]

    def run(self) -> Schedule:
        queue = self.queue
        while queue:
            now, d = heapq.heappop(queue)
            device = self.devices[d]
            if now < device.free or (queue and queue[0] == (now, d)):
                continue
            chosen = self._choose(device, d, now)
            if chosen is not None:
                self._do(*chosen, device, d, now)
        if any(device.fixed or device.pending for device in self.devices):
            raise ScheduleError(
                f"{self.schedule.name}: its F and B in their order need more than {self.limit:g}"
            )
        orders = tuple(tuple(device.order) for device in self.devices)
        return replace(self.schedule, orders=orders)

    def _choose(self, device: _Device, d: int, now: float) -> tuple[Task, Work] | None:
        """What a device does now; None where it waits, for a time at which it looks again."""
        arrival, blocked = float("inf"), False
        if device.fixed:
            work = device.fixed[-1][1]
            arrival = self.arrivals.get(work, float("inf"))
            more = self.costs.activation[work[2]] if work[0] == "F" else 0.0
            blocked = device.held + more > self.limit
            if arrival <= now and not blocked:
                return device.fixed.pop()
        if device.pending and (blocked or self._fills(device, d, now, arrival)):
            return device.pending.popleft()
        if now < arrival < float("inf"):
            heapq.heappush(self.queue, (arrival, d))
        return None

    def _fills(self, device: _Device, d: int, now: float, arrival: float) -> bool:
        """Whether to begin a W before the next F or B arrives."""
        takes = self.costs.weight[device.pending[0][1][2]]
        late = now + takes - arrival
        if late <= 0:
            return True
        if self.policy.idle:
            return device.idle + arrival - device.free > self.policy.idle[d]
        return late <= self.policy.patience * takes

    def _do(self, task: Task, work: Work, device: _Device, d: int, now: float) -> None:
        kind, m, piece = work
        costs = self.costs
        if device.order:
            device.idle += now - device.free
        else:
            device.begins = now
        end = device.free = now + costs.seconds(kind, piece)
        device.order.append(task)
        heapq.heappush(self.queue, (end, d))
        if kind == "F":
            device.held += costs.activation[piece]
            last = piece + 1 == costs.pieces
            self._sent(("B", m, piece) if last else ("F", m, piece + 1), d, end)
        elif kind == "B":
            device.held -= costs.activation[piece] - costs.kept[piece]
            device.pending.append((task._replace(kind="W"), ("W", m, piece)))
            if piece:
                self._sent(("B", m, piece - 1), d, end)
        else:
            device.held -= costs.kept[piece]

    def _sent(self, work: Work, d: int, end: float) -> None:
        other = self.schedule.place(work[1], work[2]).device
        arrival = end + (self.costs.send if other != d else 0.0)
        self.arrivals[work] = arrival
        heapq.heappush(self.queue, (max(arrival, self.devices[other].free), other))
