"""When does each task of a schedule happen, and what lies in memory meanwhile?  `simulate`.

Each device takes its tasks in the order of the table, each as soon as the one before it is done and
what it waits for has arrived. Sending takes no time of a device.

A device's *host link* works beside it, in an order of its own, one transfer at a time. PCI-E could
take one each way at once, but not at twice the speed where devices share a switch; the authors of
PipeOffload therefore count both ways together, and use one stream for them (arXiv 2503.01328).

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

from passes.pipeline.schedule import (
    COMPUTED,
    TRANSFERRED,
    Schedule,
    ScheduleError,
    Task,
    Work,
    waits_for,
)
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
    """A schedule with times. rows: by device, in its order; transfers: likewise, of host links."""

    schedule: Schedule
    costs: StageCosts
    rows: tuple[Row, ...]
    transfers: tuple[Row, ...] = ()

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
        every = (*self.rows, *self.transfers)
        return tuple(
            held_over_time(self.schedule, self.costs, d, [r for r in every if r.device == d])
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
    lanes = _lanes(schedule)
    offloaded = {work[1:] for lane in lanes for _, work, _ in lane if work[0] == "R"}
    done: dict[Work, Row] = {}
    at, free = [0] * len(lanes), [0.0] * len(lanes)
    rows: list[list[Row]] = [[] for _ in lanes]
    waiting: dict[Work, list[int]] = {}
    turn = list(range(len(lanes)))
    while turn:
        lane = turn.pop()
        device = lane % schedule.devices
        while at[lane] < len(lanes[lane]):
            task, work, beside = lanes[lane][at[lane]]
            either = waits_for(*work, schedule.pieces, work[1:] in offloaded)
            start, missing = _arrival(either, beside, device, costs.send, done)
            if missing:
                for other in missing:
                    waiting.setdefault(other, []).append(lane)
                break
            start = max(start, free[lane])
            end = free[lane] = start + costs.seconds(work[0], work[2])
            done[work] = Row(device, start, end, *task)
            rows[lane].append(done[work])
            at[lane] += 1
            turn += waiting.pop(work, [])
    stuck = [(k, lane[at[k]].task) for k, lane in enumerate(lanes) if at[k] < len(lane)]
    if stuck:
        which = ", ".join(f"{task} on device {k % schedule.devices}" for k, task in stuck[:4])
        raise ScheduleError(f"{schedule.name}: nothing ends what these wait for: {which}")
    computed, transferred = rows[: schedule.devices], rows[schedule.devices :]
    return Timeline(
        schedule,
        costs,
        tuple(itertools.chain.from_iterable(computed)),
        tuple(itertools.chain.from_iterable(transferred)),
    )


class _Turn(NamedTuple):
    """What a device or a link does next, and the work beside which it may begin at the earliest."""

    task: Task
    work: Work
    beside: Work | None


def _lanes(schedule: Schedule) -> list[list[_Turn]]:
    """What has an order of its own: the devices, then their host links."""
    if len(schedule.transfers) not in (0, schedule.devices):
        raise ScheduleError(
            f"{schedule.name} has {schedule.devices} devices, but transfers of "
            f"{len(schedule.transfers)}; give each device its own, or give none"
        )
    return [
        *(
            [_Turn(task, _work(schedule, d, task, COMPUTED), None) for task in order]
            for d, order in enumerate(schedule.orders)
        ),
        *(
            [
                _Turn(t, _work(schedule, d, t, TRANSFERRED), b and _work(schedule, d, b, COMPUTED))
                for t, b in order
            ]
            for d, order in enumerate(schedule.transfers)
        ),
    ]


def _work(schedule: Schedule, device: int, task: Task, kinds: tuple[str, ...]) -> Work:
    if task.kind not in kinds:
        raise ScheduleError(f"{task} on device {device}: expected one of {', '.join(kinds)} here")
    return task.kind, task.microbatch, schedule.piece(device, task)


def _arrival(
    wanted: list[tuple[Work, ...]],
    beside: Work | None,
    device: int,
    send: float,
    done: dict[Work, Row],
) -> tuple[float, tuple[Work, ...]]:
    """When all that a task waits for has arrived; or the first of these that has not ended yet."""
    out = 0.0
    if beside is not None:
        if beside not in done:
            return 0.0, (beside,)
        out = done[beside].start
    for either in wanted:
        row = next((done[w] for w in either if w in done), None)
        if row is None:
            return 0.0, either
        out = max(out, row.end + (send if row.device != device else 0.0))
    return out, ()


def held_over_time(
    schedule: Schedule, costs: StageCosts, device: int, rows: Sequence[Row]
) -> tuple[tuple[float, float], ...]:
    """What the activations of a device take: (from this time on, so much).

    Those of a piece are held from the start of F to the end of B, a part of them to the end of W;
    not between the end of an offload and the start of its reload. rows: transfers too.
    """
    change: dict[float, float] = {0.0: 0.0}
    for row in rows:
        piece = schedule.piece(device, row.task)
        whole, kept = costs.activation[piece], costs.kept[piece]
        freed = {"B": whole - kept, "W": kept, "BW": whole, "O": whole}.get(row.kind, 0.0)
        if row.kind in ("F", "R"):
            change[row.start] = change.get(row.start, 0.0) + whole
        if freed:
            change[row.end] = change.get(row.end, 0.0) - freed
    out, held = [], 0.0
    for time in sorted(change):
        held += change[time]
        out.append((time, held))
    return tuple(out)
