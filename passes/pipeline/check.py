"""Can a timeline be so?  `faults(timeline, limit)`: everything that is wrong with it, in words.

It trusts nothing but the rows, the ways and the costs: each task is there once, on the device of
its piece, as long as it takes; a device does one thing at a time, and its host link another one;
nothing begins before what it waits for has arrived; and the activations stay within the limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from passes.pipeline.schedule import COMPUTED, TRANSFERRED, Place, Schedule, Task, waits_for
from passes.pipeline.stage_costs import StageCosts
from passes.pipeline.timeline import Row, Timeline

_NEAR = 1e-9  # of a time: as far as sums that make it up may differ


def faults(timeline: Timeline, limit: float | None = None) -> tuple[str, ...]:
    """All faults of a timeline, none if it is sound. limit: of activations per device."""
    schedule, costs = timeline.schedule, timeline.costs
    found, placed = list[str](), list[Row]()
    for row, kinds in _all(timeline):
        if row.kind in kinds and _piece(schedule, row) is not None:
            placed.append(row)
        else:
            found.append(f"{_said(row)}: no piece of its microbatch lies there")
    computed = [row for row in placed if row.kind in COMPUTED]
    transferred = [row for row in placed if row.kind in TRANSFERRED]
    if transferred and not costs.transfer:
        return (*found, "activations are offloaded, and no cost says how long that takes")
    found += _counts(schedule, placed)
    found += _times(schedule, costs, placed)
    found += [*_collisions(computed), *_collisions(transferred)]
    found += _order(schedule, costs, placed)
    if limit is not None:
        found += _memory(schedule, costs, placed, limit)
    return tuple(found)


def _all(timeline: Timeline) -> Iterator[tuple[Row, tuple[str, ...]]]:
    """All rows, with the kinds that they may be of."""
    for row in timeline.rows:
        yield row, COMPUTED
    for row in timeline.transfers:
        yield row, TRANSFERRED


def _early(time: float, bound: float) -> bool:
    """Whether a time lies before a bound, by more than sums of times may differ."""
    return not time >= bound - _NEAR * abs(bound)


def _piece(schedule: Schedule, row: Row) -> int | None:
    if not 0 <= row.microbatch < schedule.microbatches:
        return None
    way = schedule.ways[schedule.way_of[row.microbatch]]
    place = Place(row.device, row.chunk)
    return way.index(place) if place in way else None


def _said(row: Row) -> str:
    return f"{Task(row.kind, row.microbatch, row.chunk)} on device {row.device} at {row.start:g}"


def _counts(schedule: Schedule, rows: list[Row]) -> Iterator[str]:
    """Each microbatch goes once through every piece, there and back."""
    have = Counter((row.kind, row.microbatch, _piece(schedule, row)) for row in rows)
    for m in range(schedule.microbatches):
        for k in range(schedule.pieces):
            f, b, w, both = (have[kind, m, k] for kind in COMPUTED)
            if f != 1:
                yield f"microbatch {m} goes forward through piece {k} {f} times"
            if (b, w, both) not in ((1, 1, 0), (0, 0, 1)):
                yield f"microbatch {m} on piece {k} has {b} B, {w} W and {both} BW"
            out, back = (have[kind, m, k] for kind in TRANSFERRED)
            if (out, back) not in ((0, 0), (1, 1)):
                yield f"microbatch {m} on piece {k} is offloaded {out} times, reloaded {back}"


def _times(schedule: Schedule, costs: StageCosts, rows: list[Row]) -> Iterator[str]:
    """Every task takes as long as it costs."""
    for row in rows:
        piece = _piece(schedule, row)
        assert piece is not None
        wanted = costs.seconds(row.kind, piece)
        if not (row.start >= 0 and abs(row.end - row.start - wanted) <= _NEAR * row.end):
            yield f"{_said(row)} ends at {row.end:g}, and takes {wanted:g}"


def _collisions(rows: Iterable[Row]) -> Iterator[str]:
    """A device, or a host link, does one thing at a time."""
    by_device: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda r: (r.start, r.end)):
        by_device.setdefault(row.device, []).append(row)
    for own in by_device.values():
        busy = own[0]
        for row in own[1:]:
            if _early(row.start, busy.end):
                yield f"{_said(row)} begins before {_said(busy)} ends at {busy.end:g}"
            busy = max(busy, row, key=lambda r: r.end)


def _order(schedule: Schedule, costs: StageCosts, rows: list[Row]) -> Iterator[str]:
    """Nothing begins before what it waits for has arrived."""
    ends: dict[tuple[str, int, int | None], Row] = {}
    for row in rows:
        ends[row.kind, row.microbatch, _piece(schedule, row)] = row
    offloaded = {work[1:] for work in ends if work[0] in TRANSFERRED}
    for row in rows:
        piece = _piece(schedule, row)
        assert piece is not None
        away = (row.microbatch, piece) in offloaded
        for either in waits_for(row.kind, row.microbatch, piece, schedule.pieces, away):
            done = next((ends[w] for w in either if w in ends), None)
            if done is None:
                yield f"{_said(row)} waits for what is not there"
                continue
            arrives = done.end + (costs.send if done.device != row.device else 0.0)
            if _early(row.start, arrives):
                yield f"{_said(row)} begins before {_said(done)} arrives at {arrives:g}"


def _memory(schedule: Schedule, costs: StageCosts, rows: list[Row], limit: float) -> Iterator[str]:
    """Activations stay within the limit; what is freed at a time makes room for what begins."""
    changes: list[tuple[float, float, int]] = []
    for row in rows:
        piece = _piece(schedule, row)
        assert piece is not None
        whole, kept = costs.activation[piece], costs.kept[piece]
        if row.kind in ("F", "R"):
            changes.append((row.start * (1 + _NEAR), whole, row.device))
        freed = {"B": whole - kept, "W": kept, "BW": whole, "O": whole}.get(row.kind, 0.0)
        changes.append((row.end, -freed, row.device))
    held = [0.0] * schedule.devices
    over: set[int] = set()
    for time, amount, device in sorted(changes):
        held[device] += amount
        if held[device] > limit * (1 + 1e-9) and device not in over:
            over.add(device)
            yield f"device {device} holds {held[device]:g} at {time:g}, above {limit:g}"
