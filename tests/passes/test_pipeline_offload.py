"""Offloaded schedules: sound, as fast as without, and the peaks that PipeOffload claims."""

from __future__ import annotations

import csv
import dataclasses
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.pipeline.check import faults
from passes.pipeline.generators import gpipe, interleaved, one_f_one_b, two_bp, zb_h2
from passes.pipeline.offload import offloaded, pipe_offload, spread
from passes.pipeline.schedule import Schedule, ScheduleError, Task, Transfer
from passes.pipeline.stage_costs import StageCosts, even
from passes.pipeline.timeline import Timeline, simulate

FIGURES = Path(__file__).parent.parent / "data" / "figures"


def costs_at(k: float, devices: int, pieces: int) -> StageCosts:
    """F = B = W; k: both ways over the host link, of the time of all three."""
    return even(devices, pieces, 1, 1, 1, transfer=1.5 * k)


def with_and_without(schedule: Schedule, k: float) -> tuple[Timeline, Timeline]:
    costs = costs_at(k, schedule.devices, schedule.pieces)
    return simulate(schedule, costs), simulate(offloaded(schedule, costs), costs)


def share(timeline: Timeline, device: int) -> float:
    """The part of a device's pieces that it offloads."""
    sent = sum(row.kind == "O" and row.device == device for row in timeline.transfers)
    return sent / sum(task.kind == "F" for task in timeline.schedule.orders[device])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_is_sound_and_no_task_begins_later(data: st.DataObject) -> None:
    devices, microbatches = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 13))
    schedule = data.draw(
        st.sampled_from(
            [
                *(spread(devices, microbatches, chunks) for chunks in (1, 2, 3)),
                interleaved(devices, devices * -(-microbatches // devices), 2),
                gpipe(devices, microbatches),
                two_bp(devices, microbatches),
                zb_h2(devices, microbatches),
            ]
        )
    )
    pieces = schedule.pieces

    def some(least: float, most: float) -> tuple[float, ...]:
        number = st.sampled_from([0.0, 0.1, 0.3, 1.0, 1.7]).filter(lambda x: least <= x <= most)
        return tuple(data.draw(st.lists(number, min_size=pieces, max_size=pieces)))

    f, b, w, held, transfer = (some(0, 2) for _ in range(5))
    kept = tuple(x * data.draw(st.sampled_from([0.0, 0.5, 1.0])) for x in held)
    costs = StageCosts(f, b, w, data.draw(st.sampled_from([0.0, 0.2])), held, kept, transfer)
    before, after = simulate(schedule, costs), simulate(offloaded(schedule, costs), costs)
    assert faults(after, max(after.peaks)) == ()
    assert [r.start for r in after.rows] == pytest.approx([r.start for r in before.rows])
    pairs = zip(after.peaks, before.peaks, strict=True)
    assert all(now <= then + 1e-9 for now, then in pairs)


def test_links_that_have_too_much_to_do_and_tasks_of_no_time() -> None:
    """Unequal pieces at random: here reloads are late, or tasks begin at once, if not looked at."""
    rng = random.Random(1)
    for _ in range(600):
        p, m, chunks = rng.randint(1, 4), rng.randint(1, 12), rng.choice((1, 2, 3))
        many = interleaved(p, p * -(-m // p), chunks)
        schedule = rng.choice([spread(p, m, chunks), many, gpipe(p, m), zb_h2(p, m)])

        def some(*numbers: float, pieces: int = schedule.pieces) -> tuple[float, ...]:
            return tuple(rng.choice(numbers) for _ in range(pieces))

        held = some(0.0, 1.0, 2.0)
        times = some(0.0, 0.1, 1.0), some(0.0, 0.3, 1.0), some(0.0, 1.0), rng.choice((0.0, 0.2))
        kept = held if rng.random() < 0.3 else some(0.0)
        costs = StageCosts(*times, held, kept, some(0.0, 0.1, 0.5, 1.7, 4.0))
        before, after = simulate(schedule, costs), simulate(offloaded(schedule, costs), costs)
        pairs = zip(before.rows, after.rows, strict=True)
        assert all(now.start <= then.start + 1e-9 for then, now in pairs)


@pytest.mark.parametrize("devices", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 5, 8, 17])
def test_spread_takes_any_numbers_and_repeats_evenly(devices: int, microbatches: int) -> None:
    for chunks in (1, 2, 3, 4):
        schedule = spread(devices, microbatches, chunks)
        timeline = simulate(schedule, even(devices, devices * chunks, 1, 1, 1))
        assert faults(timeline, max(timeline.peaks)) == ()
        if microbatches >= 2 * devices:
            plain = simulate(one_f_one_b(devices, microbatches), even(devices, devices, 1, 1, 1))
            assert timeline.makespan <= plain.makespan + 3 / chunks
            assert max(timeline.peaks) <= max(plain.peaks)


def test_half_is_offloaded_for_nothing_where_the_link_is_half_as_fast_as_it_should_be() -> None:
    """8 devices, 32 microbatches, 2 chunks, k = 2: a transfer takes as long as F + B + W."""
    before, after = with_and_without(spread(8, 32), k=2)
    assert simulate(pipe_offload(8, 32), after.costs).rows == after.rows
    assert before.makespan == after.makespan == 117
    assert [share(after, d) for d in (0, 3, 7)] == pytest.approx([0.5, 0.5, 0.5], abs=0.05)
    assert (max(before.peaks), max(after.peaks)) == (6.5, 3.0)  # 54 % less


@pytest.mark.parametrize(
    ("devices", "microbatches", "chunks"), [(4, 16, 4), (8, 32, 2), (8, 32, 4), (16, 48, 2)]
)
def test_the_peak_falls_by_more_than_the_part_that_is_offloaded(
    devices: int, microbatches: int, chunks: int
) -> None:
    """At most half of the pieces, k = 1.5."""
    schedule = spread(devices, microbatches, chunks)
    costs = costs_at(1.5, devices, schedule.pieces)
    before, after = simulate(schedule, costs), simulate(offloaded(schedule, costs, 0.5), costs)
    assert before.makespan == pytest.approx(after.makespan)
    sent = max(share(after, d) for d in range(devices))
    assert sent <= 0.5
    assert max(after.peaks) / max(before.peaks) < 1 - 1.05 * sent


def test_all_is_offloaded_where_there_is_time_for_it() -> None:
    """8 devices, 32 microbatches, 2 chunks, k = 1: what is left does not grow with the devices."""
    for devices, microbatches in ((4, 16), (8, 32), (16, 64)):
        before, after = with_and_without(spread(devices, microbatches), k=1)
        assert before.makespan == after.makespan
        assert max(after.peaks) <= 2
        if devices > 4:
            assert share(after, 0) > 0.9


def test_against_1f1b_and_interleaved() -> None:
    """8 devices, 32 microbatches, 2 chunks: makespans and peaks side by side."""
    peaks = {}
    for k in (0.5, 1, 2, 4):
        rows = [with_and_without(s, k) for s in (one_f_one_b(8, 32), interleaved(8, 32, 2))]
        rows.append(with_and_without(spread(8, 32), k))
        assert [after.makespan for _, after in rows] == [117, 106.5, 117]
        assert [max(before.peaks) for before, _ in rows] == [8, 11.5, 6.5]
        peaks[k] = tuple(max(after.peaks) for _, after in rows)
    assert peaks == PEAKS


PEAKS = {0.5: (3, 1.5, 1.5), 1: (4, 4.5, 1.5), 2: (6, 8, 3), 4: (8, 10, 5)}


def test_the_published_claim() -> None:
    """At least half of the activations, with negligible overhead; here for k up to 2."""
    with (FIGURES / "schedule_formulas.csv").open() as file:
        row = next(r for r in csv.DictReader(file) if r["schedule"] == "PipeOffload")
    assert row["peak_activation(worst stage)"].startswith(">= half of activations")
    for k in (1, 1.5, 2):
        before, after = with_and_without(spread(8, 48), k)
        assert after.makespan == pytest.approx(before.makespan)
        assert sum(share(after, d) for d in range(8)) / 8 >= 0.5


def test_nothing_is_offloaded_where_nothing_can_be() -> None:
    schedule = spread(3, 6)
    assert offloaded(schedule, even(3, 6, 1, 1, 1)) is schedule
    assert not any(offloaded(schedule, even(3, 6, 1, 1, 1, transfer=1e3)).transfers)
    assert not any(offloaded(schedule, even(3, 6, 1, 1, 1, transfer=1), most=0).transfers)


def test_what_can_not_be_is_said() -> None:
    with pytest.raises(ScheduleError, match="at least one chunk, not 0"):
        spread(2, 4, 0)
    schedule = pipe_offload(4, 8)
    with pytest.raises(ScheduleError, match="the costs say none"):
        simulate(schedule, even(4, 8, 1, 1, 1))
    with pytest.raises(ScheduleError, match="4 devices, but transfers of 1"):
        simulate(
            dataclasses.replace(schedule, transfers=schedule.transfers[:1]),
            costs_at(1, 4, 8),
        )
    wrong = dataclasses.replace(schedule, transfers=((Transfer(Task("F", 0, 0)),), (), (), ()))
    with pytest.raises(ScheduleError, match="expected one of O, R here"):
        simulate(wrong, costs_at(1, 4, 8))
    with pytest.raises(ScheduleError, match="finite numbers"):
        even(1, 1, 1, 1, 1, transfer=-1)


def test_a_reload_waits_for_its_place_and_the_backward_task_for_it() -> None:
    """By hand: one device, GPipe's order F0 F1 BW1 BW0, the first microbatch goes to the host."""
    costs = even(1, 1, 2, 2, 1, transfer=1)
    o, r, beside = Task("O", 0, 0), Task("R", 0, 0), Task("BW", 1, 0)
    schedule = dataclasses.replace(gpipe(1, 2), transfers=((Transfer(o), Transfer(r, beside)),))
    timeline = simulate(schedule, costs)
    assert [(row.start, row.end) for row in timeline.transfers] == [(2, 3), (4, 5)]
    assert timeline.memory == (((0, 1), (2, 2), (3, 1), (4, 2), (7, 1), (10, 0)),)
    slow = simulate(schedule, dataclasses.replace(costs, transfer=(6.0,)))
    assert [(row.start, row.end) for row in slow.transfers] == [(2, 8), (8, 14)]
    assert slow.makespan == 17
    late = ((Transfer(o), Transfer(r, Task("BW", 0, 0))),)
    with pytest.raises(ScheduleError, match="nothing ends what these wait for: BW0"):
        simulate(dataclasses.replace(schedule, transfers=late), costs)
