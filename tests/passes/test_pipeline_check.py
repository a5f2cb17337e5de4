"""The validator: sound timelines have no fault, and what is broken in any way has one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.pipeline.check import faults
from passes.pipeline.generators import eager, gpipe, interleaved, one_f_one_b, two_bp, zb_h1, zb_h2
from passes.pipeline.offload import offloaded, spread
from passes.pipeline.stage_costs import StageCosts, even
from passes.pipeline.timeline import Row, Timeline, simulate

MAKERS = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "eager": eager,
    "2bp": two_bp,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "interleaved": lambda p, m: interleaved(p, p * -(-m // p), 2),
    "spread": spread,
    "spread in three": lambda p, m: spread(p, m, 3),
}
COSTS = {
    "equal": lambda p, k: even(p, k, 1, 1, 1, transfer=1),
    "with sends": lambda p, k: even(p, k, 1, 1.3, 0.7, send=0.2, kept=0.4, transfer=0.7),
    "unequal": lambda p, k: StageCosts(
        *(tuple(x + 0.1 * (i % 3) for i in range(k)) for x in (1, 1.5, 0.5)),
        send=0.1,
        activation=tuple(1 + 0.5 * (i % 2) for i in range(k)),
        kept=tuple(0.3 for _ in range(k)),
        transfer=tuple(0.4 for _ in range(k)),
    ),
}


def some_timeline(data: st.DataObject, transfers: bool | None = None, least: int = 1) -> Timeline:
    p, m = data.draw(st.integers(least, 5)), data.draw(st.integers(1, 9))
    schedule = MAKERS[data.draw(st.sampled_from(sorted(MAKERS)))](p, m)
    costs = COSTS[data.draw(st.sampled_from(sorted(COSTS)))](p, schedule.pieces)
    if data.draw(st.booleans()) if transfers is None else transfers:
        schedule = offloaded(schedule, costs)
    return simulate(schedule, costs)


def replaced(timeline: Timeline, old: Row, *new: Row) -> Timeline:
    """The timeline with others in the place of a row."""

    def without(rows: tuple[Row, ...]) -> tuple[Row, ...]:
        return tuple(x for row in rows for x in (new if row is old else (row,)))

    return dataclasses.replace(
        timeline, rows=without(timeline.rows), transfers=without(timeline.transfers)
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_sound_ones_have_none(data: st.DataObject) -> None:
    timeline = some_timeline(data)
    assert faults(timeline) == faults(timeline, max(timeline.peaks)) == ()
    # Nor has a timeline that begins later: only what lies between times counts.
    late = dataclasses.replace(
        timeline,
        rows=tuple(r._replace(start=r.start + 7, end=r.end + 7) for r in timeline.rows),
        transfers=tuple(r._replace(start=r.start + 7, end=r.end + 7) for r in timeline.transfers),
    )
    assert faults(late, max(timeline.peaks)) == ()


Break = Callable[[st.DataObject, Timeline, Row], Timeline]


def removed(data: st.DataObject, timeline: Timeline, row: Row) -> Timeline:
    return replaced(timeline, row)


def doubled(data: st.DataObject, timeline: Timeline, row: Row) -> Timeline:
    end = 1 + max(r.end for r in timeline.rows)  # where the device and its link are idle
    late = row._replace(start=end, end=end + row.end - row.start)
    return replaced(timeline, row, late, row)


def longer_or_shorter(data: st.DataObject, timeline: Timeline, row: Row) -> Timeline:
    by = data.draw(st.sampled_from([0.5, 0.99, 1.01, 2.0]))
    return replaced(timeline, row, row._replace(end=row.start + by * (row.end - row.start)))


def another_microbatch(data: st.DataObject, timeline: Timeline, row: Row) -> Timeline:
    others = [k for k in range(-1, timeline.schedule.microbatches + 1) if k != row.microbatch]
    return replaced(timeline, row, row._replace(microbatch=data.draw(st.sampled_from(others))))


def another_chunk(data: st.DataObject, timeline: Timeline, row: Row) -> Timeline:
    chunks = timeline.schedule.pieces // timeline.schedule.devices
    others = [c for c in range(-1, chunks + 1) if c != row.chunk]
    return replaced(timeline, row, row._replace(chunk=data.draw(st.sampled_from(others))))


def another_device(data: st.DataObject, timeline: Timeline, row: Row) -> Timeline:
    others = [d for d in range(-1, timeline.schedule.devices + 1) if d != row.device]
    return replaced(timeline, row, row._replace(device=data.draw(st.sampled_from(others))))


def another_kind(data: st.DataObject, timeline: Timeline, row: Row) -> Timeline:
    others = [k for k in ("F", "B", "W", "BW", "O", "R", "X") if k != row.kind]
    return replaced(timeline, row, row._replace(kind=data.draw(st.sampled_from(others))))


def before_all(data: st.DataObject, timeline: Timeline, row: Row) -> Timeline:
    early = row._replace(start=-0.5, end=row.end - row.start - 0.5)
    return replaced(timeline, row, early)


def no_number(data: st.DataObject, timeline: Timeline, row: Row) -> Timeline:
    x = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    return replaced(timeline, row, row._replace(start=x, end=x))


def at_the_same_time(data: st.DataObject, timeline: Timeline, row: Row) -> Timeline:
    """In the middle of another task of the same device, or of the same link."""
    rows = timeline.rows if row in timeline.rows else timeline.transfers
    others = [r for r in rows if r.device == row.device and r is not row]
    if not others:
        return removed(data, timeline, row)
    start = (lambda r: (r.start + r.end) / 2)(data.draw(st.sampled_from(others)))
    return replaced(timeline, row, row._replace(start=start, end=start + row.end - row.start))


BREAKS: tuple[Break, ...] = (
    removed,
    doubled,
    longer_or_shorter,
    another_microbatch,
    another_chunk,
    another_device,
    another_kind,
    before_all,
    no_number,
    at_the_same_time,
)


@pytest.mark.parametrize("broken", BREAKS, ids=lambda b: b.__name__)
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_broken_row_is_found(broken: Break, data: st.DataObject) -> None:
    timeline = some_timeline(data)
    rows = (*timeline.rows, *timeline.transfers)
    if broken is at_the_same_time:  # in one that is as long as another, both could change places
        rows = tuple(r for r in rows if r.end > r.start)
    row = rows[data.draw(st.integers(0, len(rows) - 1))]
    assert faults(broken(data, timeline, row))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_task_before_its_input_is_found(data: st.DataObject) -> None:
    """Every F but the first piece's, and all that comes after F, waits for something."""
    timeline = some_timeline(data)
    waiting = [
        row
        for row in (*timeline.rows, *timeline.transfers)
        if row.kind != "F" or timeline.schedule.piece(row.device, row.task) > 0
    ]
    row = data.draw(st.sampled_from(waiting))
    schedule, costs = timeline.schedule, timeline.costs
    first = timeline.rows  # its own forward task, or that of the piece before
    piece = schedule.piece(row.device, row.task) - (row.kind == "F")
    device, chunk = schedule.place(row.microbatch, piece)
    done = next(
        r for r in first if tuple(r)[3:] == ("F", row.microbatch, chunk) and r.device == device
    )
    arrives = done.end + costs.send * (device != row.device)
    start = arrives - data.draw(st.sampled_from([1e-6, 0.01, 0.3]))
    early = row._replace(start=start, end=start + row.end - row.start)
    # What else lies there is taken away from the answer: no matter whether the device is busy.
    found = faults(replaced(timeline, row, early))
    assert any("arrives at" in fault and str(row.task) in fault for fault in found)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_two_tasks_that_change_places_are_found(data: st.DataObject) -> None:
    """F and the backward task of one piece, each at the other's time."""
    timeline = some_timeline(data)
    a = data.draw(st.sampled_from([r for r in timeline.rows if r.kind == "F"]))
    b = next(
        r
        for r in timeline.rows
        if r.kind in ("B", "BW")
        and (r.device, r.microbatch, r.chunk) == (a.device, a.microbatch, a.chunk)
    )
    changed = replaced(timeline, a, a._replace(start=b.start, end=b.start + a.end - a.start))
    changed = replaced(changed, b, b._replace(start=a.start, end=a.start + b.end - b.start))
    assert faults(changed)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_limit_below_the_peak_is_found(data: st.DataObject) -> None:
    timeline = some_timeline(data)
    peak = max(timeline.peaks)
    (first, *_) = faults(timeline, peak * data.draw(st.sampled_from([0.0, 0.5, 0.999])))
    assert "above" in first
    assert faults(timeline, peak * 1.001) == ()


def offloaded_timeline() -> Timeline:
    costs = even(4, 8, 1, 1, 1, transfer=1)
    return simulate(offloaded(spread(4, 8), costs), costs)


def test_broken_transfers_are_found_and_named() -> None:
    timeline = offloaded_timeline()
    out = next(r for r in timeline.transfers if r.kind == "O")
    back = next(r for r in timeline.transfers if r.kind == "R" and r.task[1:] == out.task[1:])
    reads = next(r for r in timeline.rows if r.kind == "BW" and r.task[1:] == out.task[1:])

    def said(old: Row, *new: Row) -> str:
        return " / ".join(faults(replaced(timeline, old, *new)))

    def at(row: Row, start: float) -> Row:
        return row._replace(start=start, end=start + row.end - row.start)

    assert "is offloaded 1 times, reloaded 0" in said(back)
    assert "is offloaded 0 times, reloaded 1" in said(out)
    assert "is offloaded 2 times, reloaded 1" in said(out, out, at(out, 1e3))
    assert f"begins before {out.task}" in said(back, at(back, out.start))
    assert f"{reads.task} on device 0" in said(back, at(back, reads.start))
    assert "begins before F" in said(out, at(out, 0.0))
    others = [r for r in timeline.transfers if r.device == 0 and r.start > out.end]
    assert f"begins before {others[0].task}" in said(out, at(out, others[0].start + 0.1))
    none = dataclasses.replace(timeline, costs=even(4, 8, 1, 1, 1))
    assert "no cost says how long" in " / ".join(faults(none))
    wrong_list = dataclasses.replace(timeline, rows=(*timeline.rows, out))
    assert "no piece of its microbatch lies there" in " / ".join(faults(wrong_list))


def test_a_reload_that_is_too_early_costs_memory() -> None:
    timeline = offloaded_timeline()
    peak = max(timeline.peaks)
    hasty = dataclasses.replace(
        timeline.schedule,
        transfers=tuple(
            tuple(t._replace(beside=None) for t in order) for order in timeline.schedule.transfers
        ),
    )
    early = simulate(hasty, timeline.costs)
    assert faults(early) == ()
    assert max(early.peaks) > peak
    assert faults(early, peak)


def test_a_huge_time_hides_no_fault() -> None:
    """How near times must be to each other is a matter of those times alone."""
    timeline = simulate(one_f_one_b(2, 3), even(2, 2, 1, 1, 1))
    last = max(timeline.rows, key=lambda r: r.end)
    timeline = replaced(timeline, last, last._replace(start=1e9, end=1e9 + 2))
    assert faults(timeline) == ()
    first = timeline.rows[1]
    assert faults(replaced(timeline, first, first._replace(start=0.5, end=1.5)))
