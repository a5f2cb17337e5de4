"""Which order comes about when each device takes the most urgent task that it can?  `greedy`.

List scheduling (Graham, SIAM J. Appl. Math. 17(2), 1969), one device at a time, the one that is
free first. It takes, of the F and B that have arrived, the most urgent one; where it has none it
fills the time with W; and where F would exceed the memory, W come first, to make room.

*Memory*: a microbatch that has begun must be able to end. F is taken only where what the oldest
microbatch on the device still has to go through fits beside it; then that one always gets on. This
needs devices that agree on which one is the oldest: where microbatches overtake each other, or come
from both ends, devices can wait for each other if the limit is tight.

*Idle time*: a W that is begun before the next F or B arrives may end after it. Whether that is
good depends on what the device can still afford: it waits as long as its idle time, with the wait,
stays within what its policy allows (Qi et al., arXiv 2401.10241, section 3.1, who ask the same of
the stage that is idle longest).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from passes.pipeline.schedule import Schedule, ScheduleError, Task, Way, Work
from passes.pipeline.stage_costs import StageCosts

Urgency = Callable[[str, int, int], float]

_ROOM = 1e-9  # of the limit: as far as sums of activations may differ


@dataclass(frozen=True, slots=True)
class Policy:
    """What a device does where it is not clear what is best.

    patience: of the time of a W, how much of it may be missing for one to be begun before the next
    F or B arrives: 0 where it must fit, 1 where a device is never idle. ahead: how many
    microbatches may be under way on each piece at most, by the piece; none for any number.
    idle: per device how long it may be idle, all in all, rather than begin a W that lasts too long;
    then patience no longer counts; none for no such allowance.
    """

    patience: float = 1.0
    ahead: tuple[int, ...] = ()
    idle: tuple[float, ...] = ()


def greedy(
    name: str,
    ways: Sequence[Way],
    way_of: Sequence[int],
    costs: StageCosts,
    limit: float,
    urgency: Urgency,
    policy: Policy = Policy(),
) -> Schedule:
    """A schedule in which devices take the task of least urgency value first.

    limit: of activations per device. Raises ScheduleError where not all microbatches get through.
    """
    return timed_greedy(name, ways, way_of, costs, limit, urgency, policy)[0]


def timed_greedy(
    name: str,
    ways: Sequence[Way],
    way_of: Sequence[int],
    costs: StageCosts,
    limit: float,
    urgency: Urgency,
    policy: Policy = Policy(),
) -> tuple[Schedule, float]:
    """Likewise, with its makespan, which is known then without simulating."""
    run = _Greedy(ways, way_of, costs, limit, urgency, policy)
    done = run.run(name)
    return done, max(device.free - device.begins for device in run.devices)


class _Device:
    """What lies before a device, and what it has done."""

    def __init__(self, lanes: int) -> None:
        self.free = self.held = self.idle = self.begins = 0.0
        self.coming: list[tuple[float, int, float, Work]] = []  # by the time of arrival
        self.ready: list[list[tuple[float, Work]]] = [[] for _ in range(lanes)]
        self.pending: deque[Work] = deque()
        self.begun: dict[int, float] = {}  # what a microbatch will still take, the oldest first
        self.order: list[Task] = []


class _Greedy:
    def __init__(
        self,
        ways: Sequence[Way],
        way_of: Sequence[int],
        costs: StageCosts,
        limit: float,
        urgency: Urgency,
        policy: Policy,
    ) -> None:
        self.ways, self.way_of, self.costs, self.policy = ways, way_of, costs, policy
        self.urgency = urgency
        self.limit = limit * (1 + _ROOM)
        # A lane for each chunk and direction: tasks of one lane differ in their microbatch alone.
        lanes = 2 * (1 + max(place.chunk for way in ways for place in way))
        count = 1 + max(place.device for way in ways for place in way)
        self.devices = [_Device(lanes) for _ in range(count)]
        self.under_way: dict[tuple[int, int], int] = {}  # by way and piece
        self.rest = [self._rests(way) for way in ways]
        self.queue: list[tuple[float, int]] = []

    def _rests(self, way: Way) -> list[float]:
        """What a microbatch takes of a device after a piece: the pieces that it comes to there."""
        out, later = [0.0] * len(way), dict[int, float]()
        for k in reversed(range(len(way))):
            out[k] = later.get(way[k].device, 0.0)
            later[way[k].device] = out[k] + self.costs.activation[k]
        return out

    def run(self, name: str) -> Schedule:
        for m in range(len(self.way_of)):
            self._arrives(("F", m, 0), 0.0)
        queue, devices = self.queue, self.devices
        while queue:
            now, d = heapq.heappop(queue)
            if queue and queue[0] == (now, d):
                continue
            device = devices[d]
            if now < device.free:
                continue
            work = self._choose(device, d, now)
            if work is not None:
                self._do(work, device, d, now)
        if sum(len(device.order) for device in devices) < 3 * len(self.way_of) * self.costs.pieces:
            raise ScheduleError(
                f"within {self.limit:g} of activations per device not all microbatches get "
                "through: raise it, or use an urgency by which they come in order"
            )
        orders = tuple(tuple(device.order) for device in devices)
        return Schedule(name, tuple(self.ways), tuple(self.way_of), orders)

    def _arrives(self, work: Work, time: float) -> None:
        kind, m, piece = work
        d, chunk = self.ways[self.way_of[m]][piece]
        device = self.devices[d]
        lane = 2 * chunk + (kind == "B")
        heapq.heappush(device.coming, (time, lane, self.urgency(kind, m, piece), work))
        heapq.heappush(self.queue, (max(time, device.free), d))

    def _choose(self, device: _Device, d: int, now: float) -> Work | None:
        """What a device does now; None where it waits, for a time at which it looks again."""
        coming = device.coming
        while coming and coming[0][0] <= now:
            _, lane, urgent, work = heapq.heappop(coming)
            heapq.heappush(device.ready[lane], (urgent, work))
        chosen, blocked = self._most_urgent(device)
        if chosen is not None:
            return chosen
        arrival = coming[0][0] if coming else float("inf")
        if device.pending and (blocked or self._fills(device, d, now, arrival)):
            return device.pending.popleft()
        if coming:
            heapq.heappush(self.queue, (arrival, d))
        return None

    def _most_urgent(self, device: _Device) -> tuple[Work | None, bool]:
        """The most urgent task that may begin, taken out; and whether there are F that may not."""
        best: tuple[float, Work] | None = None
        from_lane, blocked = 0, False
        for k, lane in enumerate(device.ready):
            if not lane or (best is not None and best <= lane[0]):
                continue
            found: tuple[float, Work] | None = lane[0]
            if k % 2 == 0 and not self._may_begin(device, lane[0][1]):
                found = self._of_oldest(device, lane)
                blocked = blocked or found is None
            if found is not None and (best is None or found < best):
                best, from_lane = found, k
        if best is None:
            return None, blocked
        lane = device.ready[from_lane]
        if best == lane[0]:
            heapq.heappop(lane)
        else:
            lane.remove(best)
            heapq.heapify(lane)
        return best[1], blocked

    def _of_oldest(
        self, device: _Device, lane: list[tuple[float, Work]]
    ) -> tuple[float, Work] | None:
        """The F of the oldest microbatch under way, for which there is room where others wait."""
        oldest = next(iter(device.begun), None)
        entry = next((entry for entry in lane if entry[1][1] == oldest), None)
        return entry if entry is not None and self._may_begin(device, entry[1]) else None

    def _fills(self, device: _Device, d: int, now: float, arrival: float) -> bool:
        """Whether to begin a W before the next F or B arrives."""
        takes = self.costs.weight[device.pending[0][2]]
        late = now + takes - arrival
        if late <= 0:
            return True
        if self.policy.idle:
            return device.idle + arrival - device.free > self.policy.idle[d]
        return late <= self.policy.patience * takes

    def _may_begin(self, device: _Device, work: Work) -> bool:
        _, m, piece = work
        way = self.way_of[m]
        most = self.policy.ahead
        if most and self.under_way.get((way, piece), 0) >= most[piece]:
            return False
        after = device.held + self.costs.activation[piece]
        # The oldest one under way here needs room to go on; if this is it, so does this one.
        oldest = next(iter(device.begun), m)
        rest = self.rest[way][piece] if oldest == m else device.begun[oldest]
        return after + rest <= self.limit

    def _do(self, work: Work, device: _Device, d: int, now: float) -> None:
        kind, m, piece = work
        way = self.way_of[m]
        costs = self.costs
        if device.order:
            device.idle += now - device.free
        else:
            device.begins = now
        end = device.free = now + costs.seconds(kind, piece)
        device.order.append(Task(kind, m, self.ways[way][piece].chunk))
        heapq.heappush(self.queue, (end, d))
        if kind == "F":
            device.held += costs.activation[piece]
            self.under_way[way, piece] = self.under_way.get((way, piece), 0) + 1
            rest = self.rest[way][piece]
            device.begun.pop(m, None) if rest <= 0 else device.begun.update({m: rest})
            last = piece + 1 == costs.pieces
            self._sent(("B", m, piece) if last else ("F", m, piece + 1), d, end)
        elif kind == "B":
            device.held -= costs.activation[piece] - costs.kept[piece]
            self.under_way[way, piece] -= 1
            device.pending.append(("W", m, piece))
            if piece:
                self._sent(("B", m, piece - 1), d, end)
        else:
            device.held -= costs.kept[piece]

    def _sent(self, work: Work, d: int, end: float) -> None:
        other = self.ways[self.way_of[work[1]]][work[2]].device
        self._arrives(work, end + (self.costs.send if other != d else 0.0))
