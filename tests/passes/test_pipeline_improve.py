"""W put in anew, and single tasks moved: what comes out is sound, and no longer than before."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.pipeline import generators
from passes.pipeline.check import faults
from passes.pipeline.greedy import Policy, greedy
from passes.pipeline.improve import improve
from passes.pipeline.refill import refill
from passes.pipeline.schedule import Schedule, ScheduleError, straight, there_and_back
from passes.pipeline.stage_costs import even
from passes.pipeline.timeline import simulate

ROOM = 1 + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_refilled_and_moved(data: st.DataObject) -> None:
    p, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    f, b, w, send = (data.draw(st.integers(0, 9)) for _ in range(4))
    kept = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    way = data.draw(st.sampled_from([straight(p), there_and_back(p)]))
    limit = data.draw(st.sampled_from([1.0, 2.0, 2.5, p, 2 * p]))
    costs = even(p, len(way), f, b, w, send, kept)
    drawn = data.draw(st.integers(0, 99))
    schedule = greedy(
        "", (way,), (0,) * m, costs, limit, lambda kind, k, piece: drawn * (k + piece) % 7
    )
    before = simulate(schedule, costs)
    assert faults(before, limit) == ()
    moved = simulate(improve(schedule, costs, limit, 20_000), costs)
    assert faults(moved, limit) == ()
    assert moved.makespan <= before.makespan * ROOM
    idle = data.draw(st.sampled_from([(), (0.0,) * p, (9.0,) * p]))
    policy = Policy(data.draw(st.sampled_from([0.0, 0.5, 1.0])), idle=idle)
    again = simulate(refill(schedule, costs, limit, policy), costs)
    assert faults(again, limit) == ()


def without_w(schedule: Schedule) -> list[list[tuple[str, int]]]:
    return [[(t.kind[0], t.microbatch) for t in o if t.kind != "W"] for o in schedule.orders]


@pytest.mark.parametrize("of", [generators.one_f_one_b, generators.zb_h2, generators.two_bp])
def test_f_and_b_keep_their_order(of: object) -> None:
    schedule = of(4, 9)  # type: ignore[operator]
    refilled = refill(schedule, even(4, 4, 5, 6, 4, 1), 8, Policy())
    assert without_w(refilled) == without_w(schedule)
    assert sum(len(order) for order in refilled.orders) == 3 * 4 * 9


def test_an_order_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ScheduleError, match="need more than 2"):
        refill(generators.one_f_one_b(4, 9), even(4, 4, 5, 6, 4), 2, Policy())


def test_a_schedule_with_b_and_w_as_one_can_be_moved_too() -> None:
    costs = even(4, 4, 5, 6, 4, 1)
    schedule = generators.gpipe(4, 6)
    late = schedule.orders[3]
    # The last device does all its F first, in an order in which the others wait for it.
    orders = (*schedule.orders[:3], (*late[5:6], *late[:5], *late[6:]))
    before = simulate(replace(schedule, orders=orders), costs)
    moved = simulate(improve(before.schedule, costs, 6, 100_000), costs)
    assert faults(moved, 6) == ()
    assert {row.kind for row in moved.rows} == {"F", "BW"}
    assert moved.makespan <= before.makespan


def test_allowed_idle_time_is_used_before_a_w_that_lasts_too_long() -> None:
    costs = even(8, 8, 29.7, 29.4, 19.9, 0.5, 0.4)
    schedule = generators.zb_h2(8, 24)
    spans = [
        simulate(refill(schedule, costs, 16, Policy(idle=(allowed,) * 8)), costs).makespan
        for allowed in (6.0, 300.0)
    ]
    assert spans[0] < 1.004 * 24 * (29.7 + 29.4 + 19.9)
    assert spans[0] < spans[1]
