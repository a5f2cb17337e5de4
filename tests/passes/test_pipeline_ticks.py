"""Ticks against the simulator with tasks of one unit each, and slots against what lies there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.pipeline import both_ways, generators, vee
from passes.pipeline.schedule import Schedule, ScheduleError, Task, straight
from passes.pipeline.stage_costs import even
from passes.pipeline.ticks import all_needs, in_ticks, seconds, slots
from passes.pipeline.timeline import simulate

SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": generators.gpipe,
    "1f1b": generators.one_f_one_b,
    "eager": generators.eager,
    "interleaved": partial(generators.interleaved, chunks=2),
    "2bp": generators.two_bp,
    "zb_h1": generators.zb_h1,
    "zb_h2": generators.zb_h2,
    "v_half": vee.v_half,
    "zb_v": vee.zb_v,
}


def taken_apart(schedule: Schedule) -> Schedule:
    """Each BW as a B and a W."""
    orders = tuple(
        tuple(task._replace(kind=kind) for task in order for kind in task.kind)
        for order in schedule.orders
    )
    return replace(schedule, orders=orders)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("devices", [2, 3, 4])
def test_ticks_are_the_times_of_tasks_that_take_one_unit_each(name: str, devices: int) -> None:
    schedule = SCHEDULES[name](devices, 2 * devices)
    ticks = in_ticks(schedule, all_needs(schedule.pieces))
    unit = schedule.pieces // schedule.devices
    costs = even(devices, schedule.pieces, unit, unit, unit)
    timeline = simulate(taken_apart(schedule), costs)
    wanted = {(row.device, row.task): row.start for row in timeline.rows}
    found = {(d, task): t for d, own in enumerate(ticks.rows) for t, task in enumerate(own) if task}
    assert found == wanted
    assert ticks.count == timeline.latency == seconds(ticks, costs)


def test_a_tick_lasts_as_long_as_its_longest_task() -> None:
    ticks = in_ticks(generators.one_f_one_b(2, 2), all_needs(2))
    # F0 F1 .. B0 W0 .. B1 W1
    # .. F0 B0 W0 F1 B1 W1 ..
    assert seconds(ticks, even(2, 2, 1, 10, 100)) == 1 + 1 + 10 + 100 + 100 + 10 + 100 + 100


def test_tasks_with_nothing_to_do_take_no_tick() -> None:
    needs = {key: found for key, found in all_needs(2).items() if key != (0, "W")}
    ticks = in_ticks(generators.one_f_one_b(2, 2), needs)
    assert [str(task or "..") for task in ticks.rows[0]] == [
        "F0",
        "F1",
        "..",
        "B0",
        "..",
        "..",
        "B1",
    ]


def test_what_can_not_be_in_ticks() -> None:
    with pytest.raises(ScheduleError, match="go 2 ways"):
        in_ticks(both_ways.dualpipe(4, 8), all_needs(8))
    order = (Task("BW", 0, 0), Task("F", 0, 0))
    stuck = Schedule("turned", (straight(1),), (0,), (order,))
    with pytest.raises(ScheduleError, match="nothing ends what these wait for: B0 on device 0"):
        in_ticks(stuck, all_needs(1))


spans = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 8)), max_size=20)


@given(spans)
def test_as_many_slots_as_values_at_the_fullest_time(drawn: list[tuple[int, int]]) -> None:
    values = [(begin, begin + length) for begin, length in drawn]
    chosen = slots(values)
    fullest = 0
    for tick in range(21):
        lying = [slot for (a, b), slot in zip(values, chosen, strict=True) if a < tick <= b]
        assert len(set(lying)) == len(lying)
        fullest = max(fullest, len(lying))
    assert len(set(chosen)) == fullest
    assert set(chosen) == set(range(fullest))
