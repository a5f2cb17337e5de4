"""All orders of small schedules, by brute force: the exact search finds the best of them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.pipeline.check import faults
from passes.pipeline.exact import solve
from passes.pipeline.greedy import greedy
from passes.pipeline.schedule import Schedule, ScheduleError, Task, straight, there_and_back
from passes.pipeline.stage_costs import StageCosts, even
from passes.pipeline.timeline import Timeline, simulate

COSTS = [
    (1, 1, 1, 0, 1.0),
    (5, 6, 4, 1, 1.0),
    (5, 6, 4, 1, 0.4),
    (2, 7, 3, 2, 0.5),
    (3, 1, 5, 0, 0.0),
]
NEAR = 1 + 1e-6


def start(costs: StageCosts, microbatches: int, limit: float, vee: bool = False) -> Timeline:
    pieces = costs.pieces
    way = there_and_back(pieces // 2) if vee else straight(pieces)
    way_of = (0,) * microbatches
    # The last microbatch first: none that is good.
    return simulate(greedy("", (way,), way_of, costs, limit, lambda kind, m, piece: -m), costs)


def orders(chains: tuple[tuple[Task, ...], ...]) -> Iterator[tuple[Task, ...]]:
    """All orders of tasks in which each chain keeps its own."""
    if not any(chains):
        yield ()
    for k, chain in enumerate(chains):
        if chain:
            for rest in orders((*chains[:k], chain[1:], *chains[k + 1 :])):
                yield (chain[0], *rest)


def any_order(microbatches: int) -> list[tuple[Task, ...]]:
    tasks = (tuple(Task(kind, m, 0) for kind in "FBW") for m in range(microbatches))
    return list(orders(tuple(tasks)))


def in_order(microbatches: int) -> list[tuple[Task, ...]]:
    """Those in which the tasks of each kind come in the order of the microbatches."""
    right = list(range(microbatches))
    return [
        order
        for order in any_order(microbatches)
        if all([t.microbatch for t in order if t.kind == kind] == right for kind in "FBW")
    ]


def brute_force(
    own: list[tuple[Task, ...]], costs: StageCosts, microbatches: int, limit: float
) -> float:
    best, way_of = float("inf"), (0,) * microbatches
    for pair in itertools.product(own, repeat=2):
        try:
            timeline = simulate(Schedule("", (straight(2),), way_of, pair), costs)
        except ScheduleError:
            continue
        if timeline.makespan < best and max(timeline.peaks) <= limit * (1 + 1e-9):
            best = timeline.makespan
    return best


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("limit", [1, 1.5, 2])
def test_the_best_of_all_orders_of_two(cost: tuple[float, ...], limit: float) -> None:
    f, b, w, send, kept = cost
    costs = even(2, 2, f, b, w, send, kept)
    right = brute_force(any_order(2), costs, 2, limit)
    exact = solve(start(costs, 2, limit), limit, 0.0, 10.0)
    assert exact.timeline is not None
    assert faults(exact.timeline, limit) == ()
    assert exact.timeline.makespan == pytest.approx(right)
    assert exact.bound == pytest.approx(right)
    # It is enough to look at those in which each kind keeps the order of the microbatches.
    assert brute_force(in_order(2), costs, 2, limit) == right


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("limit", [1.4, 2, 3])
def test_the_best_of_all_orders_of_three(cost: tuple[float, ...], limit: float) -> None:
    f, b, w, send, kept = cost
    costs = even(2, 2, f, b, w, send, kept)
    right = brute_force(in_order(3), costs, 3, limit)
    exact = solve(start(costs, 3, limit), limit, 0.0, 10.0)
    assert exact.timeline is not None
    assert faults(exact.timeline, limit) == ()
    assert exact.timeline.makespan == pytest.approx(right)
    assert exact.bound == pytest.approx(right)


def test_larger_ones_are_proven_as_well() -> None:
    for p, m, limit, vee in ((3, 6, 6, False), (4, 8, 8, False), (4, 8, 4, False), (3, 4, 3, True)):
        costs = even(p, 2 * p if vee else p, 10, 12, 8, 1, 0.4)
        exact = solve(start(costs, m, limit, vee), limit, 0.0, 10.0)
        assert exact.timeline is not None
        assert faults(exact.timeline, limit) == ()
        assert exact.timeline.makespan == pytest.approx(exact.bound)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_times_that_are_no_whole_numbers(data: st.DataObject) -> None:
    p, m = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    vee = data.draw(st.booleans())
    n = 2 * p if vee else p
    numbers = st.lists(st.floats(0.01, 9), min_size=n, max_size=n).map(tuple)
    costs = StageCosts(*(data.draw(numbers) for _ in range(3)), 0.3, (1.0,) * n, (0.41,) * n)
    limit = data.draw(st.sampled_from([2.0, 2.5, 4.0]))
    before = start(costs, m, limit, vee)
    exact = solve(before, limit, 0.0, 0.1)
    assert exact.bound <= before.makespan * NEAR
    if exact.timeline is not None:
        assert faults(exact.timeline, limit) == ()
        assert exact.bound <= exact.timeline.makespan * NEAR


def test_without_work_what_is_known_is_said() -> None:
    costs = even(4, 4, 5, 6, 4, 1)
    exact = solve(start(costs, 8, 4), 4, 120.0, 0.0)
    assert exact.bound >= 120.0


def test_ctrl_c_stays_what_it_was() -> None:
    """OR-tools would leave a handler behind that ends the process."""
    code = (
        "import os, signal\n"
        "from passes.pipeline.exact import solve\n"
        "from passes.pipeline.generators import zb_h1\n"
        "from passes.pipeline.stage_costs import even\n"
        "from passes.pipeline.timeline import simulate\n"
        "solve(simulate(zb_h1(2, 3), even(2, 2, 5, 6, 4)), 2, 0.0, 0.1)\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "interrupted\n", done.stderr
