"""What does each device of a pipeline do, in which order?  A table of tasks, without times.

A model is cut into pieces, one after the other; each device holds one or more, its chunks. A *way*
tells where the pieces lie: for each its device and chunk. In most schedules all microbatches go one
way; where devices hold the pieces of both directions, half of them go the other way round.

Tasks of a microbatch on a piece (Qi et al., arXiv 2401.10241, section 2):
  F    forward
  B    backward, for the gradients that the piece before needs
  W    backward, for the gradients of the weights: any time after B
  BW   both as one, where they are not taken apart

Activations can spend the time between F and B in the memory of the host. A device's link to its
host has an order of its own (Wan et al., arXiv 2503.01328):
  O    offload, any time after F
  R    reload, before B or BW: not before the compute task that it goes with has begun

>>> order = (Task("F", 0, 0), Task("BW", 0, 0))
>>> schedule = Schedule("two", (straight(2),), (0,), (order, order))
>>> schedule.devices, schedule.microbatches, schedule.piece(1, order[0])
(2, 1, 1)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

COMPUTED = ("F", "B", "W", "BW")
TRANSFERRED = ("O", "R")


class ScheduleError(ValueError):
    """A schedule that can not be made, or can not be run."""


class Task(NamedTuple):
    """One task of one microbatch on one chunk of a device."""

    kind: str
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + f".{self.chunk}" * (self.chunk > 0)


class Place(NamedTuple):
    """Where a piece of the model lies."""

    device: int
    chunk: int


class Transfer(NamedTuple):
    """A task of a host link. beside: the compute task of the device with which it may begin.

    Without that a reload would begin as soon as the link is free, and take memory for nothing.
    """

    task: Task
    beside: Task | None = None


Way = tuple[Place, ...]


def straight(devices: int, chunks: int = 1) -> Way:
    """Piece after piece on the next device, so many times around."""
    return tuple(Place(d, c) for c in range(chunks) for d in range(devices))


def there_and_back(devices: int) -> Way:
    """Down all devices and up again: the first device holds the first piece and the last."""
    there = [Place(d, 0) for d in range(devices)]
    return (*there, *(Place(d, 1) for d in reversed(range(devices))))


def other_way_round(way: Way) -> Way:
    """The same pieces from the last device to the first, as chunks of their own."""
    devices = 1 + max(place.device for place in way)
    chunks = 1 + max(place.chunk for place in way)
    return tuple(Place(devices - 1 - d, chunks + c) for d, c in way)


@dataclass(frozen=True)
class Schedule:
    """Per device its tasks in order.

    ways: where the pieces lie, for each direction. way_of: per microbatch the way that it goes.
    transfers: per device what its host link does, in order; none of all where nothing is offloaded.
    """

    name: str
    ways: tuple[Way, ...]
    way_of: tuple[int, ...]
    orders: tuple[tuple[Task, ...], ...]
    transfers: tuple[tuple[Transfer, ...], ...] = ()

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return len(self.orders)

    @property
    def microbatches(self) -> int:
        """How many microbatches there are."""
        return len(self.way_of)

    @property
    def pieces(self) -> int:
        """Into how many pieces the model is cut."""
        return len(self.ways[0])

    @cached_property
    def _pieces(self) -> tuple[dict[Place, int], ...]:
        return tuple({place: k for k, place in enumerate(way)} for way in self.ways)

    def piece(self, device: int, task: Task) -> int:
        """Which piece a task of a device works on; ScheduleError where it does not lie there."""
        if 0 <= task.microbatch < self.microbatches:
            found = self._pieces[self.way_of[task.microbatch]].get(Place(device, task.chunk))
            if found is not None:
                return found
        raise ScheduleError(f"{task} on device {device}: no piece of its microbatch lies there")

    def place(self, microbatch: int, piece: int) -> Place:
        """Where a piece lies for a microbatch."""
        return self.ways[self.way_of[microbatch]][piece]

    def tasks(self) -> Iterator[tuple[int, Task]]:
        """All tasks, with their devices."""
        for device, order in enumerate(self.orders):
            for task in order:
                yield device, task


# What is done with the activations of a piece waits for nothing else.
_AFTER = {"W": "B", "O": "F", "R": "O"}

# A task by the piece that it works on: its kind, microbatch and piece.
Work = tuple[str, int, int]


def waits_for(
    kind: str, microbatch: int, piece: int, pieces: int, offloaded: bool = False
) -> list[tuple[Work, ...]]:
    """What a task waits for: of each of these, that one which is in the table.

    offloaded: whether the activations of this microbatch and piece are, in the meantime.
    """
    if kind == "F":
        return [(("F", microbatch, piece - 1),)] if piece else []
    if kind in _AFTER:
        return [((_AFTER[kind], microbatch, piece),)]
    own: tuple[Work, ...] = (("R" if offloaded else "F", microbatch, piece),)
    if piece + 1 == pieces:
        return [own]
    return [own, (("B", microbatch, piece + 1), ("BW", microbatch, piece + 1))]
