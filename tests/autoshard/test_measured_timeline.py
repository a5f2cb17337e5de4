"""Measured timelines of a controller: they can be so, and show work of several stages at once."""

from __future__ import annotations

import dataclasses
import itertools
import json
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.controller import Controller
from autoshard.in_stages import Staged, in_stages
from autoshard.measured_timeline import (
    Measured,
    NotMeasured,
    Span,
    _in_order,
    _read,
    busy_together,
    measured,
)
from autoshard.timeline_text import lines
from autoshard.timeline_trace import as_trace
from passes.pipeline import both_ways, generators
from passes.pipeline.schedule import Schedule, Work, waits_for
from passes.pipeline.stage_costs import even
from passes.pipeline.timeline import Row, simulate


@cache
def staged(count: int, microbatches: int, rows: int, width: int) -> tuple[Staged, list[Any]]:
    """Eight dense layers, in microbatches of so many rows."""

    def step(weights: list[Any], x: Any) -> Any:
        def loss(weights: list[Any]) -> Any:
            y = x
            for w in weights:
                y = jnp.tanh(y @ w)
            return jnp.mean(y**2)

        value, grads = jax.value_and_grad(loss)(weights)
        return [w - 0.1 * g for w, g in zip(weights, grads, strict=True)], value

    args = [jnp.eye(width)] * 8, jnp.ones((microbatches * rows, width))
    made = in_stages(step, args, {}, {}, microbatches=microbatches, count=count)
    return made, jax.tree.leaves(args)


def controller(
    schedule: Schedule, rows: int, width: int, each: int = 1
) -> tuple[Controller, list[Any]]:
    made, flat = staged(schedule.pieces, schedule.microbatches, rows, width)
    n = schedule.devices
    devices = [jax.devices()[d * each : (d + 1) * each] for d in range(n)]
    return Controller(made.traced, made.loop, made.stages, schedule, devices, ahead=100), flat


CASES = {
    "B and W as one": (generators.one_f_one_b(4, 8), 1),
    "two devices for each stage": (generators.zb_h1(2, 6), 2),
    "both ways, in chunks": (both_ways.bitpipe(2, 4), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_a_measured_timeline_can_be_so(case: str) -> None:
    """The table's tasks in its order, one at a time; none before what it waits for has ended."""
    schedule, each = CASES[case]
    run, flat = controller(schedule, rows=8, width=64, each=each)
    found = measured(run, flat)
    timeline = found.timeline
    assert [(r.device, r.task) for r in timeline.rows] == list(schedule.tasks())
    ends = dict[Work, float]()
    for r in timeline.rows:
        assert r.start <= r.end
        # Nobody waits for the W of a BW: B ends at some time within it.
        ends[r.kind, r.microbatch, schedule.piece(r.device, r.task)] = (
            r.start if r.kind == "BW" else r.end
        )
    for r in timeline.rows:
        piece = schedule.piece(r.device, r.task)
        for either in waits_for(r.kind, r.microbatch, piece, schedule.pieces):
            assert all(ends[w] <= r.start for w in either if w in ends)
    for a, b in itertools.pairwise(timeline.rows):
        assert a.device != b.device or a.end <= b.start
    table = simulate(schedule, even(schedule.pieces, schedule.pieces, 1, 1, 1))
    assert all(have <= peak for have, peak in zip(timeline.peaks, table.peaks, strict=True))
    assert found.called < 0
    assert found.returned > found.called

    is_written_and_printed(found)


def is_written_and_printed(found: Measured) -> None:
    events = json.loads(as_trace([found.predicted, found.timeline]))["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names[1] == f"{names[0]}, measured"
    tasks = [[e["name"] for e in events if e["ph"] == "X" and e["pid"] == pid] for pid in (0, 1)]
    assert tasks[0] == tasks[1]
    last = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X" and e["pid"] == 1)
    assert last == pytest.approx(1000 * max(r.end for r in found.timeline.rows))  # microseconds
    assert len(lines(found.timeline, 100)) == 1 + found.timeline.schedule.devices


@given(st.lists(st.tuples(*[st.integers(0, 3), *[st.integers(0, 12)] * 2]), max_size=8))
def test_time_together_is_counted_tick_by_tick(drawn: list[tuple[int, int, int]]) -> None:
    schedule = generators.one_f_one_b(4, 8)
    timeline = simulate(schedule, even(4, 4, 1, 1, 1))
    rows = tuple(Row(d, min(a, b), max(a, b), "F", k, 0) for k, (d, a, b) in enumerate(drawn))
    timeline = dataclasses.replace(timeline, rows=rows)
    for stages in (1, 2, 3):
        ticks = sum(
            len({r.device for r in rows if r.start <= t < r.end}) >= stages for t in range(12)
        )
        assert busy_together(timeline, stages) == ticks


def test_devices_that_work_on_the_same_stage_do_not_count() -> None:
    schedule = both_ways.dualpipe(2, 4)
    timeline = simulate(schedule, even(2, 2, 1, 1, 1))
    at = {(way, piece): p for way in (0, 1) for piece, p in enumerate(schedule.ways[way])}
    micro = [schedule.way_of.index(way) for way in (0, 1)]

    def row(way: int, piece: int) -> Row:
        return Row(at[way, piece].device, 0, 1, "F", micro[way], at[way, piece].chunk)

    same, apart = (row(0, 0), row(1, 0)), (row(0, 0), row(0, 1))
    assert same[0].device != same[1].device
    assert busy_together(dataclasses.replace(timeline, rows=same)) == 0
    assert busy_together(dataclasses.replace(timeline, rows=apart)) == 1


def test_numbers_of_runs_that_pass_their_end() -> None:
    low, high = -(1 << 31), (1 << 31) - 1
    runs = {low + 1: Span(7, 8), high: Span(3, 4), high - 1: Span(1, 2), low: Span(5, 6)}
    assert [span.start for span in _in_order(runs)] == [1, 3, 5, 7]
    unsigned = {0: Span(3, 4), (1 << 32) - 1: Span(1, 2), 1: Span(5, 6)}
    assert [span.start for span in _in_order(unsigned)] == [1, 3, 5]


def test_a_profile_without_operations() -> None:
    with pytest.raises(NotMeasured, match="records no operations of cpu devices with the programs"):
        _read({})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "most"), [(generators.gpipe(4, 16), 0.8), (generators.one_f_one_b(4, 16), 1.0)]
)
def test_stages_work_at_once_and_the_call_is_back_before(schedule: Schedule, most: float) -> None:
    """By the machine's own clock, though others use it too: one of a few steps has to show it.

    GPipe holds all microbatches, so that nothing has to be waited for. 1F1B's last forward task
    waits, for its memory, till only the last four backward ones are left of the first stage.
    """
    run, flat = controller(schedule, rows=256, width=1024)
    table = simulate(schedule, even(4, 4, 1, 1, 1))
    seen = []
    for _ in range(5):
        found = measured(run, flat)
        assert max(found.highest) == max(table.peaks)
        for have in (found.highest, found.timeline.peaks):
            assert all(n <= peak for n, peak in zip(have, table.peaks, strict=True))
        seen.append(said(found))
        if seen[-1][0] < most and seen[-1][1] > 0.1:
            break
    else:
        pytest.fail(f"part of the step that the call took, and with two stages at work: {seen}")


def said(found: Measured) -> tuple[float, float]:
    timeline = found.timeline
    return found.returned_after, busy_together(timeline) / timeline.latency
