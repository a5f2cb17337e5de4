"""No schedule is shorter than the bound; and often one is as short."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.pipeline import generators
from passes.pipeline.bounds import least_limit, lower_bound
from passes.pipeline.check import faults
from passes.pipeline.greedy import Policy, greedy
from passes.pipeline.recipes import IN_TURN, URGENCIES, Recipe, make
from passes.pipeline.schedule import ScheduleError, Way, straight, there_and_back
from passes.pipeline.stage_costs import StageCosts, even
from passes.pipeline.timeline import simulate

NEAR = 1 + 1e-9


@st.composite
def problems(draw: st.DrawFn) -> tuple[Way, int, StageCosts, float]:
    p, m = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    way = draw(st.sampled_from([straight(p), there_and_back(p), straight(p, 2)]))
    n = len(way)

    def numbers(least: int, most: int) -> tuple[float, ...]:
        one = st.integers(least, most).map(float)
        return tuple(
            draw(st.one_of(one.map(lambda x: [x] * n), st.lists(one, min_size=n, max_size=n)))
        )

    size, part = numbers(1, 3), draw(st.sampled_from([0.0, 0.4, 1.0]))
    kept = tuple(part * x for x in size)
    send = float(draw(st.integers(0, 3)))
    costs = StageCosts(numbers(0, 9), numbers(0, 9), numbers(0, 9), send, size, kept)
    return way, m, costs, least_limit(way, costs) * draw(st.sampled_from([1.0, 1.5, 2.0, 4.0, 9.0]))


@settings(deadline=None, max_examples=150)
@given(problems(), st.sampled_from(sorted(URGENCIES)), st.sampled_from([0.0, 0.5, 1.0]))
def test_no_list_schedule_is_shorter(
    problem: tuple[Way, int, StageCosts, float], pattern: str, patience: float
) -> None:
    way, m, costs, limit = problem
    recipe = Recipe(pattern, (), Policy(patience))
    schedule, makespan = make(recipe, way, m, costs, limit)
    timeline = simulate(schedule, costs)
    assert faults(timeline, limit) == ()
    assert makespan == pytest.approx(timeline.makespan, abs=1e-9)
    assert lower_bound(way, m, costs, limit) <= makespan * NEAR


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_no_published_schedule_is_shorter(p: int, m: int, data: st.DataObject) -> None:
    f, b, w, send = (data.draw(st.integers(0, 9)) for _ in range(4))
    kept = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    made = [of(p, m) for of in (generators.gpipe, generators.one_f_one_b, generators.eager)]
    made += [of(p, m) for of in (generators.two_bp, generators.zb_h1, generators.zb_h2)]
    if m % p == 0:
        made.append(generators.interleaved(p, m, 2))
    for schedule in made:
        costs = even(p, schedule.pieces, f, b, w, send, kept)
        timeline = simulate(schedule, costs)
        bound = lower_bound(schedule.ways[0], m, costs, max(timeline.peaks))
        assert bound <= timeline.makespan * NEAR


@settings(deadline=None, max_examples=60)
@given(problems(), st.data())
def test_no_schedule_in_turn_is_shorter(
    problem: tuple[Way, int, StageCosts, float], data: st.DataObject
) -> None:
    way, m, costs, limit = problem
    p = 1 + max(place.device for place in way)
    if way == straight(p, 2):
        return
    first = tuple(data.draw(st.integers(1, 2 * p)) for _ in range(p))
    try:
        schedule, makespan = make(Recipe(IN_TURN, first, Policy()), way, m, costs, limit)
    except ScheduleError:
        return  # these numbers need more memory, or wait for each other
    timeline = simulate(schedule, costs)
    assert faults(timeline, limit) == ()
    assert makespan == pytest.approx(timeline.makespan, abs=1e-9)
    assert lower_bound(way, m, costs, limit) <= makespan * NEAR


@pytest.mark.parametrize("p", [1, 2, 5, 8])
def test_zero_bubble_schedules_are_the_best_within_their_memory(p: int) -> None:
    # Whatever F, B and W cost, as long as nothing waits but for the first B and the last one.
    for f, b, w, send in ((1, 1, 1, 0), (10, 12, 8, 0), (10, 12, 8, 1)):
        costs, m = even(p, p, f, b, w, send), 3 * p
        made = simulate(generators.zb_h1(p, m), costs)
        assert lower_bound(straight(p), m, costs, p) == pytest.approx(made.makespan)


def test_a_limit_of_one_microbatch_takes_one_after_the_other() -> None:
    costs = even(3, 3, 5, 6, 4, 1, kept=0.0)
    alone = 3 * (5 + 6) + 2 * 2
    bound = lower_bound(straight(3), 4, costs, 1)
    assert bound == pytest.approx(4 * alone + 4)  # and the last W
    schedule = greedy("", (straight(3),), (0,) * 4, costs, 1, lambda kind, m, piece: m)
    assert simulate(schedule, costs).makespan == pytest.approx(bound)


def test_more_memory_bounds_no_more() -> None:
    for way in (straight(4), there_and_back(4)):
        costs = even(4, len(way), 5, 6, 4, 1, kept=0.4)
        bounds = [lower_bound(way, 10, costs, limit) for limit in (1, 1.5, 2, 3, 4, 8, 20)]
        assert bounds == sorted(bounds, reverse=True)


def test_costs_of_other_pieces_are_refused() -> None:
    with pytest.raises(ScheduleError, match="the way has 2 pieces, the costs are of 4"):
        lower_bound(straight(2), 3, even(2, 4, 1, 1, 1), 2)
