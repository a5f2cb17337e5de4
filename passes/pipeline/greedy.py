"""Which order comes about when each device takes the most urgent task that it can?  `greedy`.

List scheduling (Graham, SIAM J. Appl. Math. 17(2), 1969), one device at a time, the one that is
free first. It takes, of the F and B that have arrived, the most urgent one; where it has none it
fills the time with W; and where F would exceed the memory, W come first, to make room.

*Memory*: a microbatch that has begun must be able to end. F is taken only where what the oldest
microbatch on the device still has to go through fits beside it; then that one always gets on.
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
    """

    patience: float = 1.0
    ahead: tuple[int, ...] = ()


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

    limit: of activations per device. Raises ScheduleError where no microbatch fits.
    """
    return _Greedy(ways, way_of, costs, limit, urgency, policy).run(name)


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
        devices = 1 + max(place.device for way in ways for place in way)
        self.free = [0.0] * devices
        self.held = [0.0] * devices
        self.pending: list[deque[Work]] = [deque() for _ in range(devices)]
        self.ready: list[list[tuple[float, float, Work]]] = [[] for _ in range(devices)]
        self.orders: list[list[Task]] = [[] for _ in range(devices)]
        self.ends: dict[Work, float] = {}
        self.under_way: dict[tuple[int, int], int] = {}  # by way and piece
        # What a microbatch takes of a device after a piece: the pieces that it comes to there.
        self.rest = [self._rests(way) for way in ways]
        self.begun: list[dict[int, float]] = [{} for _ in range(devices)]
        self.queue: list[tuple[float, int]] = []

    def _rests(self, way: Way) -> list[float]:
        out, later = [0.0] * len(way), dict[int, float]()
        for k in reversed(range(len(way))):
            out[k] = later.get(way[k].device, 0.0)
            later[way[k].device] = out[k] + self.costs.activation[k]
        return out

    def run(self, name: str) -> Schedule:
        for m in range(len(self.way_of)):
            self._arrives(("F", m, 0), 0.0)
        left = 3 * len(self.way_of) * self.costs.pieces
        while self.queue:
            now, device = heapq.heappop(self.queue)
            if now < self.free[device]:
                continue
            work = self._choose(device, now)
            if work is not None:
                self._do(work, device, now)
                left -= 1
        if left:
            raise ScheduleError(f"no microbatch fits within {self.limit:g} of activations")
        orders = tuple(tuple(order) for order in self.orders)
        return Schedule(name, tuple(self.ways), tuple(self.way_of), orders)

    def _arrives(self, work: Work, time: float) -> None:
        device = self._device(work)
        self.ready[device].append((time, self.urgency(*work), work))
        heapq.heappush(self.queue, (max(time, self.free[device]), device))

    def _device(self, work: Work) -> int:
        return self.ways[self.way_of[work[1]]][work[2]].device

    def _choose(self, device: int, now: float) -> Work | None:
        """What a device does now; None where it waits, for a time at which it looks again."""
        best: tuple[float, float, Work] | None = None
        blocked, next_arrival = False, float("inf")
        for entry in self.ready[device]:
            time, urgent, work = entry
            if time > now:
                next_arrival = min(next_arrival, time)
            elif work[0] == "F" and not self._may_begin(device, work):
                blocked = True
            elif best is None or (urgent, work) < best[1:]:
                best = entry
        if best is not None:
            self.ready[device].remove(best)
            return best[2]
        pending = self.pending[device]
        if pending:
            takes = self.costs.weight[pending[0][2]]
            late = now + takes - next_arrival
            if blocked or late <= self.policy.patience * takes:
                return pending.popleft()
        if next_arrival < float("inf"):
            heapq.heappush(self.queue, (next_arrival, device))
        return None

    def _may_begin(self, device: int, work: Work) -> bool:
        _, m, piece = work
        way = self.way_of[m]
        most = self.policy.ahead
        if most and self.under_way.get((way, piece), 0) >= most[piece]:
            return False
        after = self.held[device] + self.costs.activation[piece]
        begun = self.begun[device]
        # The oldest one under way here needs room to go on; if this is it, so does this one.
        oldest = next(iter(begun), m)
        rest = self.rest[way][piece] if oldest == m else begun[oldest]
        return after + rest <= self.limit

    def _do(self, work: Work, device: int, now: float) -> None:
        kind, m, piece = work
        way = self.way_of[m]
        costs = self.costs
        end = self.free[device] = now + costs.seconds(kind, piece)
        self.ends[work] = end
        self.orders[device].append(Task(kind, m, self.ways[way][piece].chunk))
        heapq.heappush(self.queue, (end, device))
        if kind == "F":
            self.held[device] += costs.activation[piece]
            self.under_way[way, piece] = self.under_way.get((way, piece), 0) + 1
            rest = self.rest[way][piece]
            self.begun[device].pop(m, None) if rest <= 0 else self.begun[device].update({m: rest})
            last = piece + 1 == costs.pieces
            self._sent(("B", m, piece) if last else ("F", m, piece + 1), device, end)
            if not last and ("B", m, piece + 1) in self.ends:
                raise AssertionError("backward before forward")
        elif kind == "B":
            self.held[device] -= costs.activation[piece] - costs.kept[piece]
            self.under_way[way, piece] -= 1
            self.pending[device].append(("W", m, piece))
            if piece:
                self._sent(("B", m, piece - 1), device, end)
        else:
            self.held[device] -= costs.kept[piece]

    def _sent(self, work: Work, device: int, end: float) -> None:
        self._arrives(work, end + (self.costs.send if self._device(work) != device else 0.0))
