"""How many activations lie on a device, and when may more begin?  `InFlight`.

A device runs its tasks in the order in which they are started, and an array has its memory from the
start of the task that makes it, long before that runs. Who starts tasks ahead of the work would so
hold more than the table says, which counts from the time that a task runs. The count here is of
activations by microbatch and piece, from the start of F (or of a reload) to the time that W (or an
offload) is known to be done. Before F is started it waits for those tasks that free what is missing
to the table's own peak:

  held(d) <= peak(d)     at any time, on each device d

and before any task until fewer than `ahead` tasks of the device are started and not done, for what
tasks send each other takes memory too.

It never waits for what has not been started: tasks are started in the order of the table's times,
and at the time of an F the table holds no more than its peak.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Begun:
    """A task or an offload that may not be done yet. done: arrays that are there once it is.

    key: microbatch and piece. frees: how many activations are let go with it.
    """

    key: Hashable
    done: Sequence[Any]
    frees: int
    is_task: bool

    def is_done(self) -> bool:
        """Whether it is, without waiting."""
        return all(x.is_ready() for x in self.done)


class InFlight:
    """Counts of one step. limits: per device the most that may lie there.

    held: per device, now; highest: the most so far.
    """

    def __init__(self, limits: Sequence[float], ahead: int) -> None:
        self.limits, self.ahead = tuple(limits), max(1, ahead)
        self.held = [0] * len(self.limits)
        self.highest = [0] * len(self.limits)
        self.begun: list[list[Begun]] = [[] for _ in self.limits]

    def room_for_task(self, device: int) -> None:
        """Wait until a device may be given one more task."""
        while len(tasks := [b for b in self.begun[device] if b.is_task]) >= self.ahead:
            self._wait(device, tasks[0])

    def take(self, device: int) -> None:
        """Count the activations of one microbatch and piece, once there is room for them."""
        for b in [b for b in self.begun[device] if b.is_done()]:
            self._wait(device, b)
        while self.held[device] + 1 > self.limits[device]:
            freeing = next((b for b in self.begun[device] if b.frees), None)
            if freeing is None:
                break
            self._wait(device, freeing)
        self.held[device] += 1
        self.highest[device] = max(self.highest[device], self.held[device])

    def started(
        self, device: int, key: Hashable, done: Sequence[Any], frees: bool, is_task: bool = True
    ) -> None:
        """A task has been started, or an offload. frees: whether activations go with it."""
        self.begun[device].append(Begun(key, done, int(frees), is_task))

    def nothing_to_do(self, device: int, key: Hashable) -> None:
        """A task that frees has no equations: activations go with the last one that has some."""
        last = next((b for b in reversed(self.begun[device]) if b.key == key), None)
        if last is None:
            self.held[device] -= 1
        else:
            last.frees += 1

    def _wait(self, device: int, b: Begun) -> None:
        for x in b.done:
            x.block_until_ready()
        self.held[device] -= b.frees
        self.begun[device].remove(b)
