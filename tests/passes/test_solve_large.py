"""What large problems are solved by, on small ones whose answer brute force knows."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

from passes.solve import ilp, kernels
from passes.solve.ascent import Ascent, peaks
from passes.solve.brute import brute_force
from passes.solve.meter import Meter, Stop
from passes.solve.presolve import presolve
from passes.solve.problem import Problem, Solution
from passes.solve.reduction import Core, Infeasible
from passes.solve.samples import knotty_problem, transformer
from passes.solve.tables import Pool
from passes.solve.trees import Trees

SEEDS = range(40)


def fits(seed: int) -> tuple[Problem, Core, Solution] | None:
    """A problem, its core, and the right answer; None where there is none or no core."""
    problem = knotty_problem(seed)
    right = brute_force(problem)
    try:
        core = presolve(problem, Pool())
    except Infeasible:
        return None
    return (problem, core, right) if right.choice and core.edges and len(core.slack) else None


FITTING = [found for found in map(fits, SEEDS) if found is not None]


def test_there_is_something_to_test() -> None:
    assert len(FITTING) > 10


@pytest.mark.parametrize("number", range(len(FITTING)))
def test_an_ascent_bounds_from_below_and_keeps_what_is_better(number: int) -> None:
    problem, core, right = FITTING[number]
    ascent = Ascent(core, Meter(problem, 1e9, None, None))
    best = core.place(right.choice)
    for theta in (1.0, 0.5):
        try:
            ascent.climb(60, theta, right.cost)
        except Stop:
            assert ascent.meter.cost == right.cost  # proven
            return
        assert ascent.bound <= right.cost + 1e-6 * abs(right.cost)
        kept = ascent.kept(right.cost + 1.0)
        assert all(c < 0 or c in own for c, own in zip(best, kept, strict=True))


def test_ascents_come_near() -> None:
    """Most of what a price can do: over all problems the gap that is left is small."""
    gaps = []
    for problem, core, right in FITTING:
        meter = Meter(problem, 1e9, None, None)
        ascent = Ascent(core, meter)
        try:
            for theta in (1.0, 0.5, 0.25):
                ascent.climb(200, theta, right.cost)
        except Stop:
            assert meter.cost == right.cost
            gaps.append(0.0)
        else:
            gaps.append((right.cost - ascent.bound) / abs(right.cost))
    assert np.median(gaps) < 0.1


@pytest.mark.parametrize("number", range(len(FITTING)))
def test_trees_keep_the_limit_and_the_count(number: int) -> None:
    """Whatever they try, the choice fits, and cost and memory are what they are said to be."""
    problem, core, right = FITTING[number]
    meter = Meter(problem, 1e9, None, None)
    ascent = Ascent(core, meter)
    start = core.place(right.choice)
    if (start < 0).any():
        pytest.skip("presolve keeps another of equal choices")
    trees = Trees(core, ascent.messages.graph, ascent.plain, start, meter)
    memory = np.random.default_rng(number).uniform(0, 5, len(ascent.plain))
    for _ in range(6):
        with contextlib.suppress(Stop):
            trees.improve(1, memory)
        assert trees.cost == pytest.approx(core.cost(trees.choice))
        assert trees.over == pytest.approx(core.rows().over(trees.choice))
        assert problem.feasible(core.expand(trees.choice))
        assert trees.cost >= right.cost - 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_trees_find_the_best_of_a_tree(seed: int) -> None:
    """A chain without a limit is minimised by the first tree that has all of it."""
    rng = np.random.default_rng(seed)
    sizes = [3, 4, 2, 5, 3]
    unary = tuple(rng.integers(0, 9, n).astype(float) for n in sizes)
    links: list[dict[int, Any]] = [{} for _ in sizes]
    for v in range(4):
        table = rng.integers(0, 9, (sizes[v], sizes[v + 1])).astype(float)
        links[v][v + 1], links[v + 1][v] = table, table.T.copy()
    every = tuple(np.arange(n) for n in sizes)
    none = np.zeros(0)
    core = Core(
        tuple(range(5)), every, unary, tuple(links), 0.0, ((),) * 5, none,
        np.zeros(0, np.intp), (), 5,
    )  # fmt: skip
    meter = Meter(Problem("chain", (), ()), 1e9, None, None)
    graph = Ascent(core, meter).messages.graph
    best = min(core.cost(c) for c in np.ndindex(*sizes))
    choice = np.array([n - 1 for n in sizes], dtype=np.intp)
    trees = Trees(core, graph, np.concatenate(unary), choice, meter)
    meter.cost = -np.inf  # nothing is offered
    trees.improve(1, np.zeros(sum(sizes)))
    assert trees.cost == best


@pytest.mark.skipif(kernels.njit is None, reason="numba is not there to be compared with")
def test_plain_python_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, core, right = FITTING[0]

    def run() -> tuple[Any, ...]:
        ascent = Ascent(core, Meter(problem, 1e9, None, None))
        ascent.meter.offer = lambda choice: False  # type: ignore[method-assign]
        ascent.climb(20, 1.0, right.cost + 1.0)
        start = core.place(right.choice)
        trees = Trees(core, ascent.messages.graph, ascent.plain, start, ascent.meter)
        trees.improve(2, ascent.memory())
        return ascent.bound, ascent.prices.tolist(), trees.choice.tolist(), trees.over.tolist()

    compiled = run()
    names = ("send", "choose", "price", "_next_random", "_grow", "_minimise", "_change", "_place")
    for name in names:
        monkeypatch.setattr(kernels, name, getattr(kernels, name).py_func)
    monkeypatch.setattr("passes.solve.ascent.choose", kernels.choose)
    monkeypatch.setattr("passes.solve.ascent.price", kernels.price)
    monkeypatch.setattr("passes.solve.trees.improve", kernels.improve.py_func)  # type: ignore[attr-defined]
    with np.errstate(over="ignore"):
        assert run() == compiled


def test_peaks_are_the_worst_rows_of_stretches() -> None:
    over = np.array([1.0, 3.0, -1.0, 0.0, 2.0, 5.0, 4.0, -2.0, 1.0])
    assert peaks(over) == [5, 1, 8]
    assert peaks(-np.abs(over)) == []


@pytest.mark.parametrize("number", range(0, len(FITTING), 3))
def test_a_solve_that_takes_all_for_large_tells_no_lie(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ilp, "_LARGE", 0)
    monkeypatch.setattr(ilp, "_SMALL", 0)
    problem, _, right = FITTING[number]
    found = ilp.solve(problem, work=2.0)
    assert found.bound <= right.cost + 1e-6 * abs(right.cost)
    if found.choice:
        assert problem.feasible(found.choice)
        assert problem.cost(found.choice) == found.cost >= right.cost
        assert found.status != "optimal" or found.cost == right.cost


def test_a_large_solve_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ilp, "_LARGE", 20)
    monkeypatch.setattr(ilp, "_SMALL", 20)
    problem = transformer(2, tight=0.3)
    one, two = (ilp.solve(problem, work=3.0) for _ in range(2))
    assert one == two
    assert one.choice
