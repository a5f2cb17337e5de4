"""DualPipe and BitPipe: sound for any numbers, and how near they come to what is published."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.pipeline.both_ways import bitpipe, dualpipe
from passes.pipeline.check import faults
from passes.pipeline.generators import interleaved, one_f_one_b
from passes.pipeline.schedule import Schedule, ScheduleError, Task, waits_for
from passes.pipeline.stage_costs import StageCosts, even
from passes.pipeline.timeline import Timeline, simulate

FIGURES = Path(__file__).parents[1] / "data" / "figures"

few = settings(deadline=None, max_examples=40)
pairs = st.integers(1, 6).map(lambda half: 2 * half)  # of devices
ticks = st.integers(1, 9)


def bubble(timeline: Timeline) -> float:
    return timeline.makespan - max(timeline.busy)


def table_2(p: int, f: float, b: float, w: float, f_and_b: float) -> float:
    """What DeepSeek-V3 gives for the bubble; b: the whole backward."""
    with open(FIGURES / "schedule_formulas.csv", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["schedule"] == "DualPipe")
    assert row["bubble_time"] == "(PP/2-1)(F&B + B - 3W)"
    assert row["peak_activation(worst stage)"] == "(PP+1)"
    return (p / 2 - 1) * (f_and_b + b - 3 * w)


# The bubble


@few
@given(pairs, st.integers(0, 8), ticks, st.integers(0, 9))
def test_dualpipe_s_bubble(p: int, more: int, f: int, w: int) -> None:
    w = min(w, f)
    timeline = simulate(dualpipe(p, 2 * p + 2 * more), even(p, p, f, f, w))
    assert bubble(timeline) == (p / 2 - 1) * (2 * f - w)
    assert timeline.latency == timeline.makespan
    # Pairs that end as one would cost a B more for each of half the devices.
    whole = f + w
    assert bubble(timeline) == table_2(p, f, whole, w, f + whole) - (p / 2 - 1) * f


@few
@given(pairs, st.integers(0, 8), ticks, ticks, ticks)
def test_dualpipe_s_bubble_where_backward_takes_longer(
    p: int, more: int, f: int, b: int, w: int
) -> None:
    f, w = min(f, b), min(f, b, w)
    found = bubble(simulate(dualpipe(p, 2 * p + 2 * more), even(p, p, f, b, w)))
    assert (p / 2 - 1) * (f + b - w) <= found <= table_2(p, f, b + w, w, f + b + w)


@few
@given(pairs, st.integers(0, 8), ticks, st.integers(0, 9))
def test_dualpipe_s_order_is_the_published_one(p: int, more: int, f: int, w: int) -> None:
    # Its pairs ended as one have the bubble of the table, to the tick.
    w, m = min(w, f), 2 * p + 2 * more
    costs = even(p, p, f, f, w)
    busy = m * (2 * f + w)
    assert in_pairs(dualpipe(p, m), costs) - busy == table_2(p, f, f + w, w, 2 * f + w)


def in_pairs(schedule: Schedule, costs: StageCosts) -> float:
    """How long it takes where F and the BW after it begin together and end as one.

    On the two devices in the middle the first such pair is none, as in the authors' code.
    """
    middle = schedule.devices // 2
    todo = [_pairs(order, d in (middle - 1, middle)) for d, order in enumerate(schedule.orders)]
    ends: dict[tuple[str, int, int], float] = {}
    free = [0.0] * schedule.devices
    while any(todo):
        for d, left in enumerate(todo):
            while left:
                works = [(t.kind, t.microbatch, schedule.piece(d, t)) for t in left[0]]
                wanted = [w for work in works for w in waits_for(*work, schedule.pieces)]
                there = [[ends[w] for w in either if w in ends] for either in wanted]
                if not all(there):
                    break
                start = max([free[d], *(min(times) for times in there)])
                free[d] = start + sum(costs.seconds(kind, piece) for kind, _, piece in works)
                ends |= dict.fromkeys(works, free[d])
                del left[0]
    return max(free)


def _pairs(order: tuple[Task, ...], middle: bool) -> list[tuple[Task, ...]]:
    out: list[tuple[Task, ...]] = []
    for task in order:
        if task.kind == "BW" and out and [t.kind for t in out[-1]] == ["F"]:
            if not middle:
                out[-1] += (task,)
                continue
            middle = False
        out.append((task,))
    return out


def test_bitpipe_s_bubble_and_memory_are_those_of_its_figure() -> None:
    # Read off BitPipe-v.svg of wuhouming/BitPipe; the unit of time is F of one piece.
    timeline = simulate(bitpipe(4, 4), even(4, 8, 2, 2, 2))
    assert timeline.makespan == 28
    assert max(timeline.busy) == 24
    assert timeline.bubble == pytest.approx((4 - 2) / (3 * 4 + 4 - 2))
    assert timeline.peaks == (3.5, 4, 4, 3.5)


@pytest.mark.parametrize("p", [4, 6, 8, 10, 12, 16])
def test_bitpipe_s_bubble_of_other_sizes(p: int) -> None:
    costs = even(p, 2 * p, 2, 2, 2)
    for m in (p, p + 2, 2 * p - 2, 2 * p, 3 * p, 4 * p):
        found = simulate(bitpipe(p, m), costs)
        assert bubble(found) < 2 * 2 * (p - 2)
        assert max(found.peaks) <= p
        if p == 4:
            assert bubble(found) == 2 * (p - 2)
        if m in (p, 2 * p) and p >= 8:
            assert bubble(found) <= 1.15 * 2 * (p - 2)


@pytest.mark.parametrize("p", [4, 6, 8, 10, 12, 16])
def test_bitpipe_s_bubble_with_more_memory(p: int) -> None:
    f, backward = 2, 4
    more = -(-p // 4)
    for m in (2 * p, 3 * p, 4 * p):
        found = simulate(bitpipe(p, m, p + more), even(p, 2 * p, f, 2, 2))
        assert bubble(found) == (p / 2 - 1) * (f + backward) / 2
        assert found.bubble == pytest.approx((p - 2) / (4 * m + p - 2))
        assert max(found.peaks) <= p + more
        # Still less than interleaved 1F1B holds with as many chunks.
        assert max(found.peaks) <= max(simulate(interleaved(p, m, 2), found.costs).peaks)


# What is gained by it


def gains(p: int, m: int, send: float = 0.0) -> tuple[float, float]:
    """Over 1F1B, and over interleaved 1F1B with two chunks."""
    whole, halves = even(p, p, 2, 2, 2, send), even(p, 2 * p, 2, 2, 2, send)
    found = simulate(bitpipe(p, m), halves).makespan
    plain = simulate(one_f_one_b(p, m), whole).makespan
    return plain / found, simulate(interleaved(p, m, 2), halves).makespan / found


# 8 devices, 16 microbatches: the authors' script for GPT. Likewise twice as many as devices.
@pytest.mark.parametrize(("p", "m"), [(8, 16), (4, 8), (16, 32)])
def test_bitpipe_gains_what_its_paper_says(p: int, m: int) -> None:
    assert all(1.05 <= gain <= 1.28 for gain in gains(p, m))


# Their script for BERT, and their figure: 1F1B is left behind by more than the paper measured.
@pytest.mark.parametrize(("p", "m"), [(8, 8), (4, 4)])
def test_bitpipe_gains_more_with_few_microbatches(p: int, m: int) -> None:
    plain, chunks = gains(p, m)
    assert 1.28 < plain <= 1.5
    assert 1.05 <= chunks <= 1.28


def test_at_its_turn_bitpipe_sends_nothing() -> None:
    p, m = 8, 16
    assert simulate(bitpipe(p, m), even(p, 2 * p, 2, 2, 2)).sends == m * 2 * (2 * p - 2)
    assert simulate(interleaved(p, m, 2), even(p, 2 * p, 2, 2, 2)).sends == m * 2 * (2 * p - 1)
    assert all(1 < gain <= 1.28 for gain in gains(p, m, send=0.1))


# Soundness


@few
@given(pairs, st.integers(1, 30), st.data())
def test_dualpipe_is_sound(p: int, m: int, data: st.DataObject) -> None:
    schedule = dualpipe(p, m)
    timeline = simulate(schedule, even(p, p, 1, 1, 1))
    assert not faults(timeline, p + 1)
    if m >= 2 * p:
        assert set(timeline.peaks) == {p + 1}
    assert not faults(simulate(schedule, drawn(p, data)))
    assert weights(schedule) == 2


@few
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 3), st.data())
def test_bitpipe_is_sound(p: int, m: int, more: int, data: st.DataObject) -> None:
    schedule = bitpipe(p, m, p + more)
    assert not faults(simulate(schedule, even(p, 2 * p, 1, 1, 1)), p + more)
    assert not faults(simulate(schedule, drawn(2 * p, data)))
    assert weights(schedule) == 4
    assert bitpipe(p, m) == bitpipe(p, m, p)


def drawn(pieces: int, data: st.DataObject) -> StageCosts:
    each = st.lists(st.integers(0, 5).map(float), min_size=pieces, max_size=pieces).map(tuple)
    held = data.draw(each)
    send = float(data.draw(st.integers(0, 3)))
    return StageCosts(*(data.draw(each) for _ in "FBW"), send, held, held)


def weights(schedule: Schedule) -> int:
    """How many pieces a device holds; all the same."""
    held = Counter(place.device for way in schedule.ways for place in way)
    assert len(set(held.values())) == 1
    return held[0]


@few
@given(pairs, st.integers(1, 30), ticks, ticks, ticks)
def test_dualpipe_is_never_slower_than_1f1b(p: int, m: int, f: int, b: int, w: int) -> None:
    f, w = min(f, b), min(f, b, w)
    costs = even(p, p, f, b, w)
    assert simulate(dualpipe(p, m), costs).makespan <= simulate(one_f_one_b(p, m), costs).makespan


@pytest.mark.parametrize(("p", "near"), [(1, "2"), (5, "4 and 6")])
def test_dualpipe_takes_an_even_number_of_devices(p: int, near: str) -> None:
    with pytest.raises(ScheduleError, match=f"even number of devices, not {p}; try {near}$"):
        dualpipe(p, 20)


def test_bitpipe_needs_room() -> None:
    with pytest.raises(ScheduleError, match="needs room for 8 microbatches, not 7"):
        bitpipe(8, 16, 7)
