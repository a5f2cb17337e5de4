"""Which schedules have been published, for microbatches that go both ways?

A device holds pieces of both ways, so the weights lie there twice: while one way fills the pipeline
from the first device, the other does from the last. Even microbatches go down, odd ones up.
devices: p below; microbatches: m. Of equal stages and without time for sending, the bubble is, in
time of a device (F, B, W: those of one microbatch on one device):

  dualpipe  (p/2-1)(F+B-W)  where F = B and W is no longer; at most p+1 microbatches under way
  bitpipe   about (p-2)F    where B+W = 2F; at most p under way, or as many as told

*DualPipe* (DeepSeek-AI, arXiv 2412.19437, section 3.2.1, table 2). A device does, so often as it is
far from the middle or the end: F ahead; F of both ways; B W F; then F BW F BW, both ways in turn;
BW F BW; BW of both ways, the later half as B, their W put off; such a W and B; the W left over.
In that table the bubble is (p/2-1)(F&B + B - 3W), where B is the whole backward, and F&B a pair
of tasks that overlap and end as one. Here such a pair is F, then BW, and what F gives is sent
before BW begins. Where F&B takes as long as the two, that makes the bubble smaller by (p/2-1) times
the B of the first line. Where B takes longer than F it lies between.

*BitPipe* (Wu et al., arXiv 2410.19367). Of each way a device holds two pieces, on the way through
all devices and back; that halves the bubble. Forward and backward are not taken apart. In the
figure of the authors' repository (p = m = 4) devices are idle for 4 of 28 units, which is
(p-2)/(3m+p-2), and hold (p+3)/2 to p microbatches. The orders are made by `greedy`: for p and m
even and m >= p they have that bubble if p = 4, and less than twice that up to p = 16. With room for
p/4 microbatches more it is (p-2)/(4m+p-2) where m >= 1.75p: half of (p/2-1)(F+B+W).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from passes.pipeline.greedy import greedy
from passes.pipeline.schedule import (
    Schedule,
    ScheduleError,
    Task,
    Way,
    other_way_round,
    straight,
    there_and_back,
)
from passes.pipeline.stage_costs import even
from passes.pipeline.timeline import simulate

_LATE = ("W", -1)  # the W that has been put off longest, whichever way its microbatch goes


def dualpipe(devices: int, microbatches: int) -> Schedule:
    """DualPipe (DeepSeek-AI, arXiv 2412.19437, section 3.2.1).

    Published for an even number of at least 2p microbatches. For other numbers this is the next
    such schedule without its first microbatches. Raises ScheduleError for an odd number of devices.
    """
    if devices % 2:
        near = f"{devices - 1} and {devices + 1}" if devices > 1 else "2"
        raise ScheduleError(f"DualPipe takes an even number of devices, not {devices}; try {near}")
    each = max(devices, (microbatches + 1) // 2)
    left_out = (each - (microbatches + 1) // 2, each - microbatches // 2)
    orders = tuple(
        tuple(_numbered(_dualpipe(device, devices, each), left_out)) for device in range(devices)
    )
    return Schedule("DualPipe", _both(straight(devices)), _in_turn(microbatches), orders)


def _both(way: Way) -> tuple[Way, Way]:
    return way, other_way_round(way)


def _in_turn(microbatches: int) -> tuple[int, ...]:
    return tuple(k % 2 for k in range(microbatches))


def _dualpipe(device: int, devices: int, each: int) -> Iterator[tuple[str, int]]:
    """The kinds of a device's tasks and their ways, with so many microbatches each way."""
    edge = min(device, devices - 1 - device)  # devices from here to the nearer end
    inner = devices // 2 - 1 - edge  # and to the middle
    near = int(device >= devices // 2)  # the way that begins at the nearer end
    far = 1 - near
    yield from [("F", near)] * (2 * inner)
    yield from [("F", near), ("F", far)] * (edge + 1)
    yield from [("B", far), _LATE, ("F", far)] * inner
    yield from [("F", near), ("BW", far), ("F", far), ("BW", near)] * (each - devices + edge + 1)
    yield from [("BW", far), ("F", far), ("BW", near)] * inner
    for k in range(2 * (edge + 1)):
        yield ("BW" if k <= edge else "B"), (near if k % 2 else far)
    yield from [_LATE, ("B", near)] * inner
    yield from [_LATE] * (edge + 1)


def _numbered(kinds: Iterator[tuple[str, int]], left_out: tuple[int, int]) -> Iterator[Task]:
    """Which microbatches they are, without the first ones of each way."""
    forward, backward = [-n for n in left_out], [-n for n in left_out]
    late = deque[Task]()
    for kind, way in kinds:
        if kind == "W":
            task = late.popleft()
        else:
            count = forward if kind == "F" else backward
            task = Task(kind, 2 * count[way] + way, way)
            count[way] += 1
        if kind == "B":
            late.append(task._replace(kind="W"))
        if task.microbatch >= 0:
            yield task


def bitpipe(devices: int, microbatches: int, under_way: int | None = None) -> Schedule:
    """BitPipe (Wu et al., arXiv 2410.19367): two ways, each down all devices and up again.

    under_way: how many microbatches' activations a device may hold, by default as many as there are
    devices. Raises ScheduleError for fewer than that.
    """
    most = devices if under_way is None else under_way
    if most < devices:
        raise ScheduleError(
            f"BitPipe on {devices} devices needs room for {devices} microbatches, not {most}"
        )
    found = [_bitpipe(devices, microbatches, most, *each) for each in _URGENCIES]
    costs = even(devices, 2 * devices, forward=2, backward=2, weight=2)
    return min(found, key=lambda schedule: simulate(schedule, costs).makespan)


# How much less urgent F is from piece to piece; and how much more urgent B is than its time says,
# in times of F on as many pieces as there are devices. The first is good where there is much room,
# the others where B must make some. Which of them is best for which numbers is not plain.
_URGENCIES = ((1.0, 0.0), (-1.0, 0.5), (0.0, 1.5))


def _bitpipe(devices: int, microbatches: int, most: int, later: float, before: float) -> Schedule:
    """Backward as one task: for `greedy`, a B that leaves nothing to W, which is then dropped."""
    pieces = 2 * devices

    def urgency(kind: str, microbatch: int, piece: int) -> float:
        """When it would be if nothing waited: F takes 1 on a piece, B 2, a pair begins every 4.

        A pair keeps a device busy for 12; but with so much between them, later ones would hardly
        be let in before earlier ones are done.
        """
        begins = 4 * (microbatch // 2)
        if kind == "F":
            return begins + later * piece
        return begins + pieces - before * devices + 2 * (pieces - 1 - piece)

    costs = even(devices, pieces, forward=2, backward=4, weight=0, kept=0)
    ways, way_of = _both(there_and_back(devices)), _in_turn(microbatches)
    schedule = greedy("BitPipe", ways, way_of, costs, most, urgency)
    orders = tuple(
        tuple(t._replace(kind="BW") if t.kind == "B" else t for t in order if t.kind != "W")
        for order in schedule.orders
    )
    return replace(schedule, orders=orders)
