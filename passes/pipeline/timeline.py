"""When does each task of a schedule happen, and what lies in memory meanwhile?  `simulate`.

Each device takes its tasks in the order of the table, each as soon as the one before it is done and
what it waits for has arrived. Sending takes no time of a device.

*makespan*: the longest that any device is at it, from its first task to its last. In training that
is what a step takes: a device begins the next one when it is done, for nothing of a step waits for
all devices (Qi et al., arXiv 2401.10241, section 4, on the optimizer's synchronization).
*bubble*: 1 - work of the busiest device / makespan.

>>> from passes.pipeline.generators import one_f_one_b
>>> from passes.pipeline.stage_costs import even
>>> timeline = simulate(one_f_one_b(4, 8), even(4, 4, 1, 1, 1))
>>> timeline.makespan, round(timeline.bubble, 4), timeline.peaks
(33.0, 0.2727, (4.0, 3.0, 2.0, 1.0))
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from passes.pipeline.schedule import Schedule, ScheduleError, Task, Work, waits_for
from passes.pipeline.stage_costs import StageCosts


class Row(NamedTuple):
    """One task and its time."""

    device: int
    start: float
    end: float
    kind: str
    microbatch: int
    chunk: int

    @property
    def task(self) -> Task:
        """The task."""
        return Task(self.kind, self.microbatch, self.chunk)


@dataclass(frozen=True)
class Timeline:
    """A schedule with times. rows: by device, in its order."""

    schedule: Schedule
    costs: StageCosts
    rows: tuple[Row, ...]

    @cached_property
    def spans(self) -> tuple[float, ...]:
        """Per device the time from its first task to its last."""
        first = [float("inf")] * self.schedule.devices
        last = [0.0] * self.schedule.devices
        for row in self.rows:
            first[row.device] = min(first[row.device], row.start)
            last[row.device] = max(last[row.device], row.end)
        return tuple(max(0.0, b - a) for a, b in zip(first, last, strict=True))

    @property
    def makespan(self) -> float:
        """The longest that a device is at it."""
        return max(self.spans, default=0.0)

    @property
    def latency(self) -> float:
        """From the first task of all to the last."""
        start = min((row.start for row in self.rows), default=0.0)
        return max((row.end for row in self.rows), default=0.0) - start

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Per device how long it works."""
        out = [0.0] * self.schedule.devices
        for row in self.rows:
            out[row.device] += row.end - row.start
        return tuple(out)

    @property
    def bubble(self) -> float:
        """The part of the makespan that even the busiest device is idle; 0 of nothing."""
        if not self.makespan:
            return 0.0
        return max(0.0, 1 - max(self.busy) / self.makespan)

    @cached_property
    def peaks(self) -> tuple[float, ...]:
        """Per device the most that its activations take."""
        return tuple(max((held for _, held in line), default=0.0) for line in self.memory)

    @cached_property
    def memory(self) -> tuple[tuple[tuple[float, float], ...], ...]:
        """Per device what its activations take from a time on, each time that it changes."""
        return tuple(
            held_over_time(self.schedule, self.costs, d, [r for r in self.rows if r.device == d])
            for d in range(self.schedule.devices)
        )

    @property
    def sends(self) -> int:
        """How often something is sent from one device to another."""
        out = 0
        for way in self.schedule.way_of:
            places = self.schedule.ways[way]
            out += 2 * sum(a.device != b.device for a, b in itertools.pairwise(places))
        return out


def simulate(schedule: Schedule, costs: StageCosts) -> Timeline:
    """Times for all tasks; ScheduleError where some wait for each other, or for what is missing."""
    if costs.pieces != schedule.pieces:
        raise ScheduleError(
            f"{schedule.name} has {schedule.pieces} pieces, the costs are of {costs.pieces}"
        )
    works = [[_work(schedule, d, t) for t in order] for d, order in enumerate(schedule.orders)]
    ends: dict[Work, tuple[float, int]] = {}
    at, free = [0] * schedule.devices, [0.0] * schedule.devices
    rows: list[list[Row]] = [[] for _ in works]
    waiting: dict[Work, list[int]] = {}
    turn = list(range(schedule.devices))
    while turn:
        device = turn.pop()
        while at[device] < len(works[device]):
            work = kind, microbatch, piece = works[device][at[device]]
            start, missing = _arrival(work, device, schedule.pieces, costs.send, ends)
            if missing:
                for other in missing:
                    waiting.setdefault(other, []).append(device)
                break
            start = max(start, free[device])
            end = free[device] = start + costs.seconds(kind, piece)
            ends[work] = end, device
            chunk = schedule.orders[device][at[device]].chunk
            rows[device].append(Row(device, start, end, kind, microbatch, chunk))
            at[device] += 1
            turn += waiting.pop(work, [])
    stuck = [(d, order[at[d]]) for d, order in enumerate(schedule.orders) if at[d] < len(order)]
    if stuck:
        which = ", ".join(f"{task} on device {d}" for d, task in stuck[:4])
        raise ScheduleError(f"{schedule.name}: nothing ends what these wait for: {which}")
    return Timeline(schedule, costs, tuple(row for own in rows for row in own))


def _work(schedule: Schedule, device: int, task: Task) -> Work:
    return task.kind, task.microbatch, schedule.piece(device, task)


def _arrival(
    work: Work, device: int, pieces: int, send: float, ends: dict[Work, tuple[float, int]]
) -> tuple[float, tuple[Work, ...]]:
    """When all that a task waits for has arrived; or the first of these that has not ended yet."""
    out = 0.0
    for either in waits_for(*work, pieces):
        done = next((ends[w] for w in either if w in ends), None)
        if done is None:
            return 0.0, either
        out = max(out, done[0] + (send if done[1] != device else 0.0))
    return out, ()


def held_over_time(
    schedule: Schedule, costs: StageCosts, device: int, rows: Sequence[Row]
) -> tuple[tuple[float, float], ...]:
    """What the activations of a device take: (from this time on, so much).

    Those of a piece are held from the start of F to the end of B, a part of them to the end of W.
    """
    change: dict[float, float] = {0.0: 0.0}
    for row in rows:
        piece = schedule.piece(device, row.task)
        whole, kept = costs.activation[piece], costs.kept[piece]
        freed = {"F": 0.0, "B": whole - kept, "W": kept, "BW": whole}[row.kind]
        if row.kind == "F":
            change[row.start] = change.get(row.start, 0.0) + whole
        change[row.end] = change.get(row.end, 0.0) - freed
    out, held = [], 0.0
    for time in sorted(change):
        held += change[time]
        out.append((time, held))
    return tuple(out)
