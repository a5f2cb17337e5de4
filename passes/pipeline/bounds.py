"""What can no schedule take less than?  `lower_bound`: of the makespan, for one way and a limit.

A device is not done before it has worked for as long as its tasks take. Besides, it is idle where
it waits for another device and has nothing else to do meanwhile; and it has no more to do than lies
in its memory. Times of these events are looked at, x_k of piece k (c: sending, between devices):

  f_k  the first F begins         f_k+1 >= f_k + F_k + c
  b_k  the first B begins         b_k-1 >= b_k + B_k + c      b_last >= f_last + F_last
  g_k  the last F begins          g_k+1 >= g_k + F_k + c
  l_k  the last B ends            l_k-1 >= l_k + c + B_k-1    l_last >= g_last + F_last + B_last
  e_d  device d is done           e_d >= l_k + W_k

A device begins with its first piece, at s_d; its first B is of its last piece, its last B of its
first one. Its work is done between these events, and outside of them there is little:

  before the first B     no more F than the limit holds at once
  after the last B       no more W than the limit holds at once, besides that B's activations
  after the last F       no more B and W than the limit holds at once

so that each pair of events is at least the work apart that does not fit outside. With memory for A
microbatches, F number n + A follows B number n: from a device's first F to its last one there are
at least (m - 1) // A round trips from an F to the B of the same microbatch.

*The bound*: D_ij is the longest path from s_i to e_j. The makespan T has e_j - s_j <= T, so around
each cycle of devices the D_ij come to at most T each: T is at least the greatest mean of a cycle
(Karp, Discrete Mathematics 23(3), 1978). Besides, the activations of all microbatches together are
held for long enough that the limit gives T another bound: their area in time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from passes.pipeline.schedule import ScheduleError, Way
from passes.pipeline.stage_costs import StageCosts

_ROOM = 1e-9  # of the limit: as far as sums of activations may differ
_SURE = 1e-9  # of the bound: as far as sums of times may differ

_Item = tuple[float, float, int]  # seconds, memory, and how many there are
_Event = tuple[str, int]


def least_limit(way: Way, costs: StageCosts) -> float:
    """What the activations of one microbatch take on the device where they take most.

    At the end of its forward tasks a microbatch holds all of its pieces on the first device.
    """
    held: dict[int, float] = {}
    for place, size in zip(way, costs.activation, strict=True):
        held[place.device] = held.get(place.device, 0.0) + size
    return max(held.values())


def lower_bound(way: Way, microbatches: int, costs: StageCosts, limit: float) -> float:
    """No schedule in which all microbatches go this way has a smaller makespan."""
    if costs.pieces != len(way):
        raise ScheduleError(f"the way has {len(way)} pieces, the costs are of {costs.pieces}")
    if not microbatches:
        return 0.0
    events = _Events(way, microbatches, costs, limit * (1 + _ROOM))
    paths = [events.longest_from(d) for d in range(events.devices)]
    return (1 - _SURE) * max(_greatest_mean(paths), *events.areas())


def round_trip(way: Way, costs: StageCosts, piece: int) -> float:
    """From the begin of F of a piece to the end of B of the same microbatch there."""
    there = sum(costs.forward[piece:]) + sum(costs.backward[piece:])
    return there + 2 * sum(_send(way, costs, k) for k in range(piece, len(way) - 1))


def _send(way: Way, costs: StageCosts, piece: int) -> float:
    """What it takes from a piece to the next."""
    return costs.send if way[piece].device != way[piece + 1].device else 0.0


class _Events:
    """The events and how far apart they are at least."""

    def __init__(self, way: Way, microbatches: int, costs: StageCosts, limit: float) -> None:
        self.way, self.microbatches, self.costs, self.limit = way, microbatches, costs, limit
        self.devices = 1 + max(place.device for place in way)
        self.own: list[list[int]] = [[] for _ in range(self.devices)]
        for k, place in enumerate(way):
            self.own[place.device].append(k)
        self.apart: dict[_Event, list[tuple[_Event, float]]] = {}
        self._chains()
        for d, own in enumerate(self.own):
            self._work(d, own)
            self._round_trips(own)

    def _link(self, first: _Event, second: _Event, seconds: float) -> None:
        self.apart.setdefault(first, []).append((second, seconds))

    def _chains(self) -> None:
        """From piece to piece."""
        costs, last = self.costs, len(self.way) - 1
        for k in range(last):
            send = _send(self.way, costs, k)
            for event in "fg":
                self._link((event, k), (event, k + 1), costs.forward[k] + send)
            self._link(("b", k + 1), ("b", k), costs.backward[k + 1] + send)
            self._link(("l", k + 1), ("l", k), costs.backward[k] + send)
        self._link(("f", last), ("b", last), costs.forward[last])
        self._link(("g", last), ("l", last), costs.forward[last] + costs.backward[last])
        for k, place in enumerate(self.way):
            self._link(("l", k), ("e", place.device), costs.weight[k])

    def _work(self, device: int, own: list[int]) -> None:
        """Events of a device are as far apart as the work that does not fit outside of them."""
        costs, m, low, high = self.costs, self.microbatches, own[0], own[-1]
        work = m * sum(costs.forward[k] + costs.backward[k] + costs.weight[k] for k in own)
        forward = [(costs.forward[k], costs.activation[k], m) for k in own]
        weight = [(costs.weight[k], costs.kept[k], m - (k == low)) for k in own]
        both = [
            (costs.backward[k] + costs.weight[k], costs.activation[k], m - (k == high)) for k in own
        ]
        kept = [(costs.weight[k], costs.kept[k], m - (k == high)) for k in own]
        rest = self.limit - costs.activation[high]
        before = {("f", low): 0.0, ("b", high): _most(forward, self.limit)}
        after = {
            ("e", device): 0.0,
            ("l", low): costs.weight[low] + _most(weight, self.limit - costs.activation[low]),
            ("g", high): costs.forward[high] + both[-1][0] + _most([*both, *kept], rest),
        }
        for first, done in before.items():
            for second, left in after.items():
                # All F may be done before the first B where the limit holds them all.
                if (first[0], second[0]) != ("b", "g") or not self._all_fit(own):
                    self._link(first, second, work - done - left)

    def _all_fit(self, own: list[int]) -> bool:
        return self.microbatches * sum(self.costs.activation[k] for k in own) <= self.limit

    def _round_trips(self, own: list[int]) -> None:
        """The last F of a device's piece follows so many round trips of others there."""
        for k in own:
            size = self.costs.activation[k]
            together = math.floor(self.limit / size) if size > 0 else self.microbatches
            if together < 1:
                continue
            trips = (self.microbatches - 1) // together
            self._link(
                ("f", k),
                ("g", k),
                trips * (round_trip(self.way, self.costs, k) + self._freed(k, together)),
            )
            self._link(("f", k), ("g", k), (self.microbatches - 1) * self.costs.forward[k])

    def _freed(self, piece: int, together: int) -> float:
        """From the end of B number n to F number n + A: n W must end, or one B more."""
        spare = self.limit - together * self.costs.activation[piece]
        if spare >= self.costs.kept[piece]:
            return 0.0
        return min(self.costs.weight[piece], self.costs.backward[piece])

    def longest_from(self, device: int) -> list[float]:
        """The longest paths from a device's begin to each device's end."""
        pieces = range(len(self.way))
        far: dict[_Event, float] = {("f", self.own[device][0]): 0.0}
        order: list[_Event] = [("f", k) for k in pieces]
        order += [("b", k) for k in reversed(pieces)]
        order += [("g", k) for k in pieces]
        order += [("l", k) for k in reversed(pieces)]
        for event in order:
            if event in far:
                for other, seconds in self.apart.get(event, ()):
                    far[other] = max(far.get(other, -math.inf), far[event] + seconds)
        return [far.get(("e", d), -math.inf) for d in range(self.devices)]

    def areas(self) -> Iterable[float]:
        """Per device: what its activations take in time and memory, by the limit."""
        costs = self.costs
        for own in self.own:
            area = sum(
                costs.activation[k] * round_trip(self.way, self.costs, k)
                + costs.kept[k] * costs.weight[k]
                for k in own
            )
            yield self.microbatches * area / self.limit if self.limit > 0 else 0.0


def _most(items: Sequence[_Item], room: float) -> float:
    """The most work whose activations there is room for; whole tasks where all take as much."""
    sizes = {size for _, size, count in items if count}
    if len(sizes) == 1 and (size := min(sizes)) > 0:
        fit = max(0.0, room) / size
        room = math.floor(fit + _ROOM) * size if fit < 1e15 else room  # else whole as it is
    out = 0.0
    for seconds, size, count in sorted(items, key=_dear):
        if size <= 0:
            out += seconds * count
        elif room > 0:
            part = min(float(count), room / size)
            out += seconds * part
            room -= size * part
    return out


def _dear(item: _Item) -> float:
    seconds, size, _ = item
    return -seconds / size if size > 0 else -math.inf


def _greatest_mean(paths: list[list[float]]) -> float:
    """The greatest mean of a cycle: over its end, of the least that parts of a walk bring in."""
    count = len(paths)
    walks = [[0.0] * count]  # by length: the heaviest walk that ends there, from anywhere
    for _ in range(count):
        walks.append([max(walks[-1][i] + paths[i][j] for i in range(count)) for j in range(count)])
    means = [
        min((walks[count][j] - walks[n][j]) / (count - n) for n in range(count))
        for j in range(count)
        if walks[count][j] > -math.inf
    ]
    return max(means, default=0.0)
