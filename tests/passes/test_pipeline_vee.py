"""V-Min, V-Half and ZB-V: beside the authors' own runs, by their closed forms, and always sound."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.pipeline.check import faults
from passes.pipeline.fill import fill
from passes.pipeline.generators import gpipe, zb_h1
from passes.pipeline.schedule import Schedule, ScheduleError, there_and_back
from passes.pipeline.squeeze import squeeze
from passes.pipeline.stage_costs import StageCosts, even
from passes.pipeline.timeline import Timeline, simulate
from passes.pipeline.vee import v_half, v_min, zb_v

Make = Callable[[int, int], Schedule]

FIGURES = Path(__file__).parent.parent / "data" / "figures" / "zb_reference_runs.csv"

# By name: how it is made, and how many microbatches it holds.
VEES: dict[str, tuple[Make, Callable[[int], int]]] = {
    "V-Min": (v_min, lambda p: (p + 4) // 3),
    "V-Half": (v_half, lambda p: (p + 2) // 2),
    "ZB-V": (zb_v, lambda p: p),
}


def published() -> list[list[str]]:
    with FIGURES.open() as file:
        return [row for row in csv.reader(file) if row[6] in VEES]


def even_pieces(p: int, f: float, b: float, w: float, send: float = 0.0) -> StageCosts:
    """Costs of two pieces per device that cost so much each."""
    return even(p, 2 * p, 2 * f, 2 * b, 2 * w, send)


def sound(schedule: Schedule, costs: StageCosts, limit: float | None = None) -> Timeline:
    timeline = simulate(schedule, costs)
    assert not faults(timeline, limit)
    return timeline


@pytest.mark.parametrize("row", published(), ids=lambda row: "-".join(row[:7]))
def test_never_longer_than_the_authors_runs_nor_more_in_memory(row: list[str]) -> None:
    p, m = int(row[0]), int(row[1])
    costs = even_pieces(p, *map(float, row[2:6]))
    made = zb_v(p, m, costs) if row[6] == "ZB-V" else VEES[row[6]][0](p, m)
    assert made.name == row[6]
    timeline = sound(made, costs, VEES[row[6]][1](p))
    if row[7].startswith("ERR"):
        assert timeline.makespan <= 304  # 240 of them are work
        return
    assert timeline.makespan <= float(row[7])
    assert 2 * max(timeline.peaks) <= float(row[10])


def test_all_rows_of_the_authors_runs_are_there() -> None:
    assert Counter(row[6] for row in published()) == {"V-Min": 10, "V-Half": 10, "ZB-V": 10}


@pytest.mark.parametrize("p", range(2, 17))
@pytest.mark.parametrize("name", VEES)
def test_memory_and_bubble_have_closed_forms(name: str, p: int) -> None:
    make, held = VEES[name]
    bubble = {
        "V-Min": 4 * p - (5 if p % 3 else 7),
        "V-Half": 3 * p - (4 if p % 2 else 7) if p > 2 else 1,
        "ZB-V": 0,
    }[name]
    for m in (2 * p, 2 * p + 3):
        timeline = simulate(make(p, m), even_pieces(p, 1, 1, 1))
        assert max(timeline.peaks) == held(p)
        assert timeline.makespan == 6 * m + bubble


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 11), st.integers(1, 25), st.data())
def test_always_sound(p: int, m: int, data: st.DataObject) -> None:
    seconds = st.integers(1, 9).map(float)
    f, b, w = data.draw(st.tuples(seconds, seconds, seconds))
    send, kept = data.draw(st.sampled_from([0.0, 0.5, 3.0])), data.draw(st.sampled_from([1.0, 0.3]))
    costs = even(p, 2 * p, f, b, w, send, kept)
    for make, held in VEES.values():
        sound(make(p, m), costs, held(p))
    fitted = sound(zb_v(p, m, costs), costs, p)
    assert fitted.makespan <= simulate(zb_v(p, m), costs).makespan


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 12), st.data())
def test_pieces_may_differ(p: int, m: int, data: st.DataObject) -> None:
    times = st.lists(st.floats(0, 9), min_size=2 * p, max_size=2 * p).map(tuple)
    parts = st.lists(st.floats(0, 1), min_size=2 * p, max_size=2 * p)
    activation = data.draw(times)
    kept = tuple(a * x for a, x in zip(activation, data.draw(parts), strict=True))
    f, b, w, send = (data.draw(each) for each in (times, times, times, st.floats(0, 9)))
    costs = StageCosts(f, b, w, send, activation, kept)
    sound(zb_v(p, m, costs), costs)


@pytest.mark.parametrize("name", VEES)
def test_the_bubble_does_not_grow_with_the_microbatches(name: str) -> None:
    make, _ = VEES[name]
    for p in (3, 4, 7):
        spans = [simulate(make(p, m), even_pieces(p, 1, 1, 1)).makespan for m in range(1, 4 * p)]
        assert all(a < b for a, b in itertools.pairwise(spans))
        assert spans[-1] - spans[2 * p] == 6 * (4 * p - 2 - 2 * p)


def test_few_microbatches_wait_for_nothing_but_one_another() -> None:
    for p in (1, 2, 5):
        for make, _ in VEES.values():
            assert simulate(make(p, 1), even_pieces(p, 1, 1, 1)).makespan == 4 * p + 1 + (p == 1)


def test_squeezing_keeps_the_middle() -> None:
    order = v_half(6, 40).orders[2]
    period = [(t.kind, t.chunk) for t in order[90:96]]
    assert sorted(period) == [(kind, c) for kind in "BFW" for c in (0, 1)]
    assert [(t.kind, t.chunk) for t in order[96:120]] == 4 * period


def test_squeezing_fills_a_gap_only_within_the_limit() -> None:
    way = there_and_back(1)
    for limit, kinds in ((4, "FFBBFFBB"), (3, "FFBBFWFB"), (2, "FFBBWFWF")):
        order = squeeze(way, (0, 1, 2, 3), 2, limit)[0]
        assert "".join(task.kind for task in order[:8]) == kinds
    with pytest.raises(ScheduleError, match="holds 2 pieces, above the limit of 1"):
        squeeze(way, (0, 1, 2, 3), 2, 1)


def test_w_are_put_where_they_make_nothing_late() -> None:
    costs = even(3, 3, 4, 4, 4)
    schedule = zb_h1(3, 9)
    last = tuple(tuple(sorted(order, key=lambda t: t.kind == "W")) for order in schedule.orders)
    late = dataclasses.replace(schedule, orders=last)
    filled = fill(late, costs, limit=3)
    assert simulate(filled, costs).makespan <= simulate(schedule, costs).makespan
    assert max(simulate(late, costs).peaks) == 9
    sound(filled, costs, 3)


def test_what_can_not_be_made_is_refused() -> None:
    for p, m in ((0, 4), (4, 0), (4, -1)):
        for make, _ in VEES.values():
            with pytest.raises(ScheduleError, match="needs a device and a microbatch"):
                make(p, m)
    with pytest.raises(ScheduleError, match="has 8 pieces, two each, and the costs are of 4"):
        zb_v(4, 8, even(4, 4, 1, 1, 1))
    with pytest.raises(ScheduleError, match="need more room than 2 pieces"):
        fill(zb_h1(3, 9), even(3, 3, 1, 1, 1), limit=2)
    with pytest.raises(ScheduleError, match="BW"):
        fill(gpipe(3, 9), even(3, 3, 1, 1, 1), limit=9)
