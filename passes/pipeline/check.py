"""Can a timeline be so?  `faults(timeline, limit)`: everything that is wrong with it, in words.

It trusts nothing but the rows, the ways and the costs: each task is there once, on the device of
its piece, as long as it takes; a device does one thing at a time; nothing begins before what it
waits for has arrived; and the activations stay within the limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from passes.pipeline.schedule import Place, Schedule, Task, waits_for
from passes.pipeline.stage_costs import StageCosts
from passes.pipeline.timeline import Row, Timeline

_NEAR = 1e-9  # of the latest end: as far as sums of times may differ


def faults(timeline: Timeline, limit: float | None = None) -> tuple[str, ...]:
    """All faults of a timeline, none if it is sound. limit: of activations per device."""
    schedule, costs, rows = timeline.schedule, timeline.costs, timeline.rows
    near = _NEAR * max((abs(row.end) for row in rows), default=0.0)
    placed = [row for row in rows if _piece(schedule, row) is not None]
    astray = [row for row in rows if _piece(schedule, row) is None]
    found = [f"{_said(row)}: no piece of its microbatch lies there" for row in astray]
    found += _counts(schedule, placed)
    found += _times(schedule, costs, placed, near)
    found += _collisions(placed, near)
    found += _order(schedule, costs, placed, near)
    if limit is not None:
        found += _memory(schedule, costs, placed, limit, near)
    return tuple(found)


def _piece(schedule: Schedule, row: Row) -> int | None:
    if not (0 <= row.microbatch < schedule.microbatches and row.kind in ("F", "B", "W", "BW")):
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
            f, b, w, both = (have[kind, m, k] for kind in ("F", "B", "W", "BW"))
            if f != 1:
                yield f"microbatch {m} goes forward through piece {k} {f} times"
            if (b, w, both) not in ((1, 1, 0), (0, 0, 1)):
                yield f"microbatch {m} on piece {k} has {b} B, {w} W and {both} BW"


def _times(schedule: Schedule, costs: StageCosts, rows: list[Row], near: float) -> Iterator[str]:
    """Every task takes as long as it costs."""
    for row in rows:
        piece = _piece(schedule, row)
        assert piece is not None
        wanted = costs.seconds(row.kind, piece)
        if row.start < 0 or abs(row.end - row.start - wanted) > near:
            yield f"{_said(row)} ends at {row.end:g}, and takes {wanted:g}"


def _collisions(rows: list[Row], near: float) -> Iterator[str]:
    """A device does one thing at a time."""
    by_device: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda r: (r.start, r.end)):
        by_device.setdefault(row.device, []).append(row)
    for own in by_device.values():
        busy = own[0]
        for row in own[1:]:
            if row.start < busy.end - near:
                yield f"{_said(row)} begins before {_said(busy)} ends at {busy.end:g}"
            busy = max(busy, row, key=lambda r: r.end)


def _order(schedule: Schedule, costs: StageCosts, rows: list[Row], near: float) -> Iterator[str]:
    """Nothing begins before what it waits for has arrived."""
    ends: dict[tuple[str, int, int | None], Row] = {}
    for row in rows:
        ends[row.kind, row.microbatch, _piece(schedule, row)] = row
    for row in rows:
        piece = _piece(schedule, row)
        assert piece is not None
        for either in waits_for(row.kind, row.microbatch, piece, schedule.pieces):
            done = next((ends[w] for w in either if w in ends), None)
            if done is None:
                yield f"{_said(row)} waits for what is not there"
                continue
            arrives = done.end + (costs.send if done.device != row.device else 0.0)
            if row.start < arrives - near:
                yield f"{_said(row)} begins before {_said(done)} arrives at {arrives:g}"


def _memory(
    schedule: Schedule, costs: StageCosts, rows: list[Row], limit: float, near: float
) -> Iterator[str]:
    """Activations stay within the limit; what is freed at a time makes room for what begins."""
    changes: list[tuple[float, float, int]] = []
    for row in rows:
        piece = _piece(schedule, row)
        assert piece is not None
        whole, kept = costs.activation[piece], costs.kept[piece]
        if row.kind == "F":
            changes.append((row.start + near, whole, row.device))
        freed = {"F": 0.0, "B": whole - kept, "W": kept, "BW": whole}[row.kind]
        changes.append((row.end, -freed, row.device))
    held = [0.0] * schedule.devices
    over: set[int] = set()
    for time, amount, device in sorted(changes):
        held[device] += amount
        if held[device] > limit * (1 + 1e-9) and device not in over:
            over.add(device)
            yield f"device {device} holds {held[device]:g} at {time:g}, above {limit:g}"
