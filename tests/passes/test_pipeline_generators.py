"""Published schedules of one way: their closed forms, the authors' runs, and what they promise."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.pipeline.check import faults
from passes.pipeline.generators import (
    eager,
    gpipe,
    interleaved,
    one_f_one_b,
    two_bp,
    zb_h1,
    zb_h2,
)
from passes.pipeline.schedule import Schedule, ScheduleError
from passes.pipeline.stage_costs import StageCosts, even
from passes.pipeline.timeline import simulate

FIGURES = Path(__file__).parents[1] / "data" / "figures"
STRAIGHT = (gpipe, one_f_one_b, eager, two_bp, zb_h1, zb_h2)
Generator = Callable[[int, int], Schedule]

few = settings(deadline=None, max_examples=60)
devices = st.integers(1, 9)
ticks = st.integers(1, 9)  # whole numbers: sums are exact


def rows(name: str) -> list[dict[str, str]]:
    with open(FIGURES / name, newline="") as file:
        return list(csv.DictReader(file))


FORMULAS = {row["schedule"]: row["bubble_time"] for row in rows("schedule_formulas.csv")}


def formula(name: str, **values: float) -> float:
    """The published bubble, with numbers for its letters."""
    text = FORMULAS[name].replace(")(", ")*(")
    return float(eval(re.sub(r"(\d)([A-Z])", r"\1*\2", text), {}, values))


def bubble(schedule: Schedule, costs: StageCosts) -> float:
    """In time of a device."""
    timeline = simulate(schedule, costs)
    return timeline.makespan - max(timeline.busy)


@few
@given(devices, st.integers(1, 30), ticks, ticks, ticks)
def test_gpipe_s_bubble(p: int, m: int, f: int, b: int, w: int) -> None:
    # B is the whole backward there.
    assert bubble(gpipe(p, m), even(p, p, f, b, w)) == formula("GPipe", p=p, F=f, B=b + w)


@few
@given(devices, st.integers(0, 20), ticks, ticks, ticks)
def test_1f1b_s_bubble(p: int, more: int, f: int, b: int, w: int) -> None:
    right = formula("1F1B / PipeDream-Flush", p=p, F=f, B=b, W=w)
    for generator in (one_f_one_b, eager):
        assert bubble(generator(p, p + more), even(p, p, f, b, w)) == right


@few
@given(devices, st.integers(1, 4), st.sampled_from([1, 2, 4]), ticks, ticks, ticks)
def test_interleaved_s_bubble_and_memory(
    p: int, turns: int, v: int, f: int, b: int, w: int
) -> None:
    timeline = simulate(interleaved(p, turns * p, v), even(p, p * v, f, b, w))
    right = formula("Interleaved 1F1B (v chunks)", p=p, v=v, F=f, B=b, W=w)
    assert timeline.makespan - max(timeline.busy) == right
    if turns > 1:
        assert timeline.peaks[0] == pytest.approx(p * (1 + (p - 1) / (p * v)))


@few
@given(devices, st.integers(0, 9), ticks, ticks, ticks)
def test_zb_h1_s_bubble(p: int, more: int, f: int, b: int, w: int) -> None:
    w = min(w, f)  # else what is late for W delays B
    costs = even(p, p, f, b, w)
    assert bubble(zb_h1(p, p + more), costs) == formula("ZB-H1", p=p, F=f, B=b, W=w)


@few
@given(devices, st.integers(0, 9), ticks, ticks, ticks)
def test_zb_h2_s_bubble(p: int, more: int, f: int, b: int, w: int) -> None:
    w = min(w, f, b)
    costs = even(p, p, f, b, w)
    assert bubble(zb_h2(p, 2 * p + more), costs) == formula("ZB-H2", p=p, F=f, B=b, W=w)


@pytest.mark.parametrize("generator", [one_f_one_b, zb_h1, zb_h2])
def test_the_authors_runs(generator: Generator) -> None:
    name = generator(2, 4).name
    runs = [row for row in rows("zb_reference_runs.csv") if row["schedule"] == name]
    assert len(runs) == 9
    for run in runs:
        p, m = int(run["p"]), int(run["m"])
        f, b, w = (2 * float(run[f"{kind}_chunk"]) for kind in "FBW")  # two chunks per stage
        timeline = simulate(generator(p, m), even(p, p, f, b, w, float(run["T_comm"])))
        cost = next(value for key, value in run.items() if key.startswith("cost"))
        assert timeline.makespan == float(cost)
        assert timeline.makespan - max(timeline.busy) == float(run["bubble_time"])
        assert timeline.bubble == pytest.approx(float(run["bubble_rate"]), abs=5e-5)


@few
@given(devices, st.integers(0, 9), ticks, ticks, ticks, st.sampled_from([0.0, 0.25, 1.0]))
def test_memory_per_stage(p: int, more: int, f: int, b: int, w: int, kept: float) -> None:
    costs = even(p, p, f, b, w, kept=kept)
    stages = range(1, p + 1)
    first = simulate(one_f_one_b(p, p + more), costs).peaks
    assert first == tuple(p - i + 1 for i in stages)
    first = simulate(zb_h1(p, p + more), costs).peaks
    assert first == tuple(p - i + 1 + (i - 1) * kept for i in stages)
    first = simulate(zb_h2(p, 2 * p + more), costs).peaks
    assert first == tuple(2 * p - 2 * i + 1 + (2 * i - 2) * kept for i in stages)
    if kept == 1:
        assert set(first) == {2 * p - 1}


@few
@given(devices, st.integers(1, 20), st.data())
def test_any_number_of_microbatches_and_any_costs_are_sound(
    p: int, m: int, data: st.DataObject
) -> None:
    def each() -> tuple[float, ...]:
        return tuple(data.draw(st.lists(st.integers(0, 5).map(float), min_size=p, max_size=p)))

    activation = each()
    send = float(data.draw(st.integers(0, 3)))
    costs = StageCosts(each(), each(), each(), send, activation, tuple(a / 2 for a in activation))
    for generator in STRAIGHT:
        timeline = simulate(generator(p, m), costs)
        assert not faults(timeline, max(timeline.peaks))


@few
@given(devices, st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
def test_interleaved_is_sound(p: int, turns: int, v: int, send: int) -> None:
    timeline = simulate(interleaved(p, turns * p, v), even(p, p * v, 3, 4, 2, send))
    assert not faults(timeline, max(timeline.peaks))


@pytest.mark.parametrize(("p", "m", "near"), [(4, 1, 4), (4, 7, 8), (4, 9, 8), (3, 10, 9)])
def test_interleaved_says_how_many_microbatches_it_takes(p: int, m: int, near: int) -> None:
    with pytest.raises(ScheduleError, match=rf"multiple of {p} .*not {m}; the nearest is {near}$"):
        interleaved(p, m, 2)


@few
@given(st.integers(2, 9), st.integers(1, 20), ticks, ticks, ticks, st.integers(1, 4))
def test_eager_1f1b_hides_what_is_sent(
    p: int, more: int, f: int, b: int, w: int, send: int
) -> None:
    costs = even(p, p, f, b, w, send / 2)
    plain, ahead = (simulate(g(p, p + more), costs) for g in (one_f_one_b, eager))
    assert ahead.makespan < plain.makespan
    assert ahead.peaks[0] == min(2 * p - 1, p + more)


@pytest.mark.parametrize(("p", "m"), [(4, 4), (4, 8), (8, 8), (8, 16), (16, 16)])
@pytest.mark.parametrize("times", [(1, 1, 1), (5, 6, 4), (2, 2, 1)])
def test_2bp_gains_at_most_what_its_paper_says(p: int, m: int, times: tuple[int, int, int]) -> None:
    costs = even(p, p, *times)
    plain, split = (simulate(g(p, m), costs) for g in (one_f_one_b, two_bp))
    assert 1 < plain.makespan / split.makespan <= 1.70
    assert split.peaks == (m,) * p  # nothing is freed before W


@few
@given(devices, st.integers(0, 9), ticks, ticks, ticks)
def test_2bp_is_as_fast_as_zb_h1(p: int, more: int, f: int, b: int, w: int) -> None:
    costs = even(p, p, f, b, min(w, f))
    assert bubble(two_bp(p, p + more), costs) == bubble(zb_h1(p, p + more), costs)
