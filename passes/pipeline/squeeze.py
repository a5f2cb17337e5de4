"""How does a pattern of one microbatch become a schedule?  Repeated, then squeezed.

Time is counted in slots here, and every task takes one. A pattern gives the slots of F and B of one
microbatch; the next one does the same a period later, as long as its tasks take on a device, and W
take free slots (Qi et al., arXiv 2405.15362, section 3). What stays free lies at both ends, and is
squeezed out there (section 3.4). A task moves to the earliest slot

    that is free, after what it waits for, and after the same task of the microbatch before it,
    so that its device never holds more pieces than the limit (each from F to W)

once through the tasks in their order:

  warm-up    until the first microbatch is through; F, B and W move
  cool-down  from the start of the last microbatch; F and B move, while W always take the first free
             slots after their B

The middle stays as it is, but for gaps that no longer have a reason. A move changes what a device
holds, and which W are pending, between the new slot and the old one or a little later; so only
these slots are counted again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from passes.pipeline.schedule import ScheduleError, Task, Way

_Count = tuple[str, int, int]  # of a slot: what is done in it, and what is held and pending then


def squeeze(
    way: Way, pattern: Sequence[int], microbatches: int, limit: int
) -> tuple[tuple[Task, ...], ...]:
    """Per device its tasks in order. pattern: slots of F of each piece, then of B, last to first.

    limit: how many pieces a device may hold. Raises ScheduleError where there is nothing to do, or
    where the pattern holds more.
    """
    if not way or microbatches < 1:
        raise ScheduleError(
            f"a schedule needs a device and a microbatch, and got {len(way)} pieces on devices and "
            f"{microbatches} microbatches"
        )
    grid = _Grid(way, pattern, microbatches, limit)
    most = max(max(line.held) for line in grid.lines)
    if most > limit:
        raise ScheduleError(f"the pattern holds {most} pieces, above the limit of {limit}")
    grid.warm_up(grid.slots[-1][0])
    grid.close_up()
    # Few microbatches: where the last one begins before the first is through, what comes after both
    # is squeezed first. That was never longer than to squeeze all at once, and sometimes shorter.
    grid.cool_down(max(grid.slots[0][-1], grid.slots[-1][0]))
    grid.close_up()
    grid.cool_down(grid.slots[0][-1])
    return tuple(tuple(grid.order(device)) for device in range(len(grid.lines)))


class _Grid:
    """All tasks in their slots. slots: of F and B, by stop in the pattern and microbatch."""

    def __init__(self, way: Way, pattern: Sequence[int], microbatches: int, limit: int) -> None:
        self.stops = [("F", place) for place in way] + [("B", place) for place in reversed(way)]
        devices = 1 + max(place.device for place in way)
        chunks = len(way) // devices
        period = 3 * chunks
        length = max(pattern) + (period + chunks) * microbatches  # if all W came last, too
        self.lines = [_Line(length, limit) for _ in range(devices)]
        self.slots = [[slot + period * m for m in range(microbatches)] for slot in pattern]
        for stop, (kind, place) in enumerate(self.stops):
            for m, slot in enumerate(self.slots[stop]):
                self.lines[place.device].put(kind, (stop, m), slot)
        for line in self.lines:
            line.put_w()

    def warm_up(self, end: int) -> None:
        """Tasks before this slot move ahead, among W that stay where they are."""
        for slot in range(end):
            for line in self.lines:
                task = line.tasks[slot]
                if task is not None:
                    self._moved(task, line.advance(slot, self._after(*task)))
                elif line.kinds[slot] == "W":
                    line.advance_w(slot)

    def cool_down(self, start: int) -> None:
        """Tasks from this slot on move ahead, and W are put anew each time."""
        for line in self.lines:
            line.put_w()
        for slot in range(start, len(self.lines[0].kinds)):
            for line in self.lines:
                task = line.tasks[slot]
                if task is not None:
                    self._moved(task, line.advance_anew(slot, self._after(*task)))

    def close_up(self) -> None:
        """Every task moves ahead as far as the orders of all devices allow."""
        free = [0] * len(self.lines)
        for slot in range(len(self.lines[0].kinds)):
            for device, line in enumerate(self.lines):
                if not line.kinds[slot]:
                    continue
                task, new = line.tasks[slot], free[device]
                if task is not None:
                    new = max(new, self._after(*task))
                    self._moved(task, new)
                line.swap(slot, new)
                free[device] = new + 1
        for line in self.lines:
            line.count()

    def _after(self, stop: int, m: int) -> int:
        """The first slot after what a task waits for."""
        arrives = self.slots[stop - 1][m] if stop else -1
        return 1 + max(arrives, self.slots[stop][m - 1] if m else -1)

    def _moved(self, task: tuple[int, int], slot: int) -> None:
        stop, m = task
        self.slots[stop][m] = slot

    def order(self, device: int) -> Iterator[Task]:
        """The tasks of a device, W in the order of their B."""
        pending = deque[Task]()
        line = self.lines[device]
        for kind, at in zip(line.kinds, line.tasks, strict=True):
            if at is not None:
                task = Task(kind, at[1], self.stops[at[0]][1].chunk)
                yield task
                if kind == "B":
                    pending.append(task._replace(kind="W"))
            elif kind == "W":
                yield pending.popleft()


class _Line:
    """The slots of one device.

    kinds: F, B, W, or nothing. tasks: of F and B, the stop and the microbatch. held, pending: after
    each slot, how many pieces lie there, and for how many B the W has not been done.
    """

    def __init__(self, length: int, limit: int) -> None:
        self.limit = limit
        self.kinds = [""] * length
        self.tasks: list[tuple[int, int] | None] = [None] * length
        self.held = [0] * length
        self.pending = [0] * length

    def put(self, kind: str, task: tuple[int, int], slot: int) -> None:
        """Put F or B into a slot."""
        assert self.tasks[slot] is None, "the pattern has two tasks in one slot"
        self.kinds[slot], self.tasks[slot] = kind, task

    def put_w(self) -> None:
        """Put every W into the first free slot after its B."""
        self._take(0, self._with_w_anew(0))

    def count(self) -> None:
        """Count what is held and pending."""
        held = pending = 0
        for slot, kind in enumerate(self.kinds):
            held += (kind == "F") - (kind == "W")
            pending += (kind == "B") - (kind == "W")
            self.held[slot], self.pending[slot] = held, pending

    def advance(self, slot: int, first: int) -> int:
        """Move F or B to the earliest slot that is possible, from `first` on; which one?"""
        forward = self.kinds[slot] == "F"
        new = slot
        for earlier in reversed(range(first, slot)):
            if forward and self.held[earlier] >= self.limit:
                break
            if not self.kinds[earlier]:
                new = earlier
        changes = self.held if forward else self.pending
        for between in range(new, slot):
            changes[between] += 1
        self.swap(slot, new)
        return new

    def advance_w(self, slot: int) -> None:
        """Move W to the earliest slot that leaves enough B before all W."""
        new = slot
        for earlier in reversed(range(slot)):
            if not self.pending[earlier]:
                break
            if not self.kinds[earlier]:
                new = earlier
        for between in range(new, slot):
            self.held[between] -= 1
            self.pending[between] -= 1
        self.swap(slot, new)

    def advance_anew(self, slot: int, first: int) -> int:
        """Move F or B likewise, also where W are now, when all W are put anew; which slot?"""
        for new in range(first, slot):
            if self.tasks[new] is None:
                self.swap(slot, new)
                counts = self._settled(new, slot)
                if counts:
                    self._take(new, counts)
                    return new
                self.swap(slot, new)
        return slot

    def swap(self, slot: int, new: int) -> None:
        """Exchange what is in two slots."""
        kinds, tasks = self.kinds, self.tasks
        kinds[slot], kinds[new] = kinds[new], kinds[slot]
        tasks[slot], tasks[new] = tasks[new], tasks[slot]

    def _with_w_anew(self, start: int) -> Iterator[_Count]:
        """Slots from this one on, where W take the first that are free."""
        held, pending = (self.held[start - 1], self.pending[start - 1]) if start else (0, 0)
        for slot in range(start, len(self.kinds)):
            kind = self.kinds[slot]
            if kind == "F":
                held += 1
            elif kind == "B":
                pending += 1
            elif pending:
                kind, held, pending = "W", held - 1, pending - 1
            else:
                kind = ""
            yield kind, held, pending

    def _settled(self, start: int, end: int) -> list[_Count]:
        """The slots that a move from the end to the start changes; none where it is not allowed."""
        out = []
        for slot, count in enumerate(self._with_w_anew(start), start):
            _, held, pending = count
            if held > self.limit:
                return []
            out.append(count)
            if slot >= end and pending == self.pending[slot]:
                break
        return out

    def _take(self, start: int, counts: Iterable[_Count]) -> None:
        for slot, count in enumerate(counts, start):
            self.kinds[slot], self.held[slot], self.pending[slot] = count
