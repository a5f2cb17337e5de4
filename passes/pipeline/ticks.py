"""Which task does each device do in which tick, where all devices take turns together?

In one program for all devices, these send to one another in every tick, whether they have something
to send or not. A tick has one task for each device, or none; what it makes is there in the next
tick, on every device. Each device keeps the order of the schedule, and does each task as soon as
what it needs is there. A BW is a B and a W, in a tick each, so that all ticks are about as long.

A tick lasts as long as the longest of its tasks; `seconds` is what a step takes so.

>>> from passes.pipeline.generators import one_f_one_b
>>> needs = all_needs(2)
>>> for row in in_ticks(one_f_one_b(2, 2), needs).rows:
...     print(" ".join(str(task or "..") for task in row))
F0 F1 .. B0 W0 .. B1 W1
.. F0 B0 W0 F1 B1 W1 ..
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from passes.pipeline.schedule import Schedule, ScheduleError, Task
from passes.pipeline.stage_costs import StageCosts

PieceTask = tuple[int, str]  # a piece and a kind: "F", "B" or "W"
Needs = Mapping[PieceTask, Collection[PieceTask]]


@dataclass(frozen=True)
class Ticks:
    """A schedule in ticks. rows: per device and tick its task, None for none."""

    schedule: Schedule
    rows: tuple[tuple[Task | None, ...], ...]

    @property
    def count(self) -> int:
        """How many ticks there are."""
        return len(self.rows[0])


def all_needs(pieces: int) -> Needs:
    """What each task needs in a chain of pieces: what the piece before makes, and its own."""
    needs: dict[PieceTask, list[PieceTask]] = {}
    for k in range(pieces):
        needs[k, "F"] = [(k - 1, "F")] if k else []
        needs[k, "B"] = [(k, "F"), *([(k + 1, "B")] if k + 1 < pieces else [])]
        needs[k, "W"] = [(k, "B")]
    return needs


def in_ticks(schedule: Schedule, needs: Needs) -> Ticks:
    """The ticks of a schedule. needs: by task those that make what it takes.

    A task that is not among them has nothing to do, and takes no tick. Raises ScheduleError where
    microbatches go both ways, and where nothing ends what a task waits for.
    """
    if len(schedule.ways) > 1:
        raise ScheduleError(f"{schedule.name}: microbatches go {len(schedule.ways)} ways, not one")
    left = [_apart(schedule, d, order, needs) for d, order in enumerate(schedule.orders)]
    done: dict[tuple[PieceTask, int], int] = {}
    rows: list[list[Task | None]] = [[] for _ in left]
    at, tick = [0] * len(left), 0
    while any(at[d] < len(own) for d, own in enumerate(left)):
        now = []
        for d, own in enumerate(left):
            work, task = own[at[d]] if at[d] < len(own) else ((0, ""), None)
            ready = task is not None and all(
                done.get((w, task.microbatch), tick) < tick for w in needs[work]
            )
            rows[d].append(task if ready else None)
            if task is not None and ready:
                now.append((work, task.microbatch))
                at[d] += 1
        if not now:
            stuck = ", ".join(
                f"{own[at[d]][1]} on device {d}" for d, own in enumerate(left) if at[d] < len(own)
            )
            raise ScheduleError(f"{schedule.name}: nothing ends what these wait for: {stuck}")
        done.update(dict.fromkeys(now, tick))
        tick += 1
    return Ticks(schedule, tuple(map(tuple, rows)))


def _apart(
    schedule: Schedule, device: int, order: Iterable[Task], needs: Needs
) -> list[tuple[PieceTask, Task]]:
    """The tasks of a device that have something to do, each BW as its B and its W."""
    out = []
    for task in order:
        piece = schedule.piece(device, task)
        out += [((piece, k), task._replace(kind=k)) for k in task.kind if (piece, k) in needs]
    return out


def seconds(ticks: Ticks, costs: StageCosts) -> float:
    """What a step takes where each tick lasts as long as the longest of its tasks."""
    piece = ticks.schedule.piece
    return sum(
        max(costs.seconds(t.kind, piece(d, t)) if t else 0.0 for d, t in enumerate(column))
        for column in zip(*ticks.rows, strict=True)
    )


def slots(spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """A slot for each value, so that two never lie in one at the same time: as few as can be.

    spans: of each value the tick that makes it and the last that reads it. Within a tick all is
    read before anything is written. Taken in the order of their beginnings, each span gets a slot
    that is free: so many as there are values at the fullest time, and no coloring of an interval
    graph has fewer.

    >>> slots([(0, 3), (1, 2), (2, 4), (3, 5)])
    (0, 1, 1, 0)
    """
    out = [0] * len(spans)
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # last read, slot
    made = 0
    for k in sorted(range(len(spans)), key=lambda k: (spans[k], k)):
        begin, end = spans[k]
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            heapq.heappush(free, made)
            made += 1
        out[k] = heapq.heappop(free)
        heapq.heappush(busy, (end, out[k]))
    return tuple(out)
