"""Problems of the shape we solve: how close, how much effort, and always the same answer."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from passes.solve.ilp import solve
from passes.solve.problem import Problem, Solution
from passes.solve.samples import transformer


def report(problem: Problem, found: Solution, began: float) -> None:
    print(
        f"\n{problem.name}: {len(problem.nodes)} nodes, {found.status}, gap {found.gap:.1e},"
        f" {found.work:.2f} units, {time.process_time() - began:.2f} s of processor time"
    )


def least_peak(problem: Problem) -> float:
    """The peak when every node takes its smallest choice."""
    choice = [int(n.uses[0].usages.argmin()) for n in problem.nodes]
    return float(problem.memory(choice).max())


@pytest.mark.parametrize(
    ("layers", "mesh", "gap", "work"),
    [(4, (8,), 0.0, 0.3), (4, (4, 2), 0.0, 0.3), (4, (2, 2, 2), 0.0, 1.0), (28, (4, 2), 1e-3, 2.5)],
)
def test_without_a_limit(layers: int, mesh: tuple[int, ...], gap: float, work: float) -> None:
    problem = transformer(layers, mesh)
    began = time.process_time()
    found = solve(problem)
    report(problem, found, began)
    assert found.gap <= gap
    assert found.work <= work


@pytest.mark.parametrize(
    ("layers", "share", "gap", "work"),
    [(2, 0.5, 0.0, 2.5), (4, 0.2, 0.0, 2.5), (4, 0.05, 0.0, 2.5), (28, 0.1, 1e-3, 4.0)],
)
def test_where_the_limit_binds(layers: int, share: float, gap: float, work: float) -> None:
    free = transformer(layers)
    roomy = solve(free)
    least = least_peak(free)
    limit = least + share * (roomy.peak - least)
    problem = dataclasses.replace(free, limit=limit, name=f"{free.name}, limit at {share}")
    began = time.process_time()
    found = solve(problem)
    report(problem, found, began)
    assert problem.feasible(found.choice)
    assert found.bound <= found.cost
    assert found.cost >= roomy.bound
    assert found.gap <= gap
    assert found.work <= work


def test_effort_grows_with_the_layers_and_no_faster() -> None:
    effort = []
    for layers in (6, 12, 24):
        began = time.process_time()
        problem = transformer(layers)
        found = solve(problem)
        report(problem, found, began)
        assert found.gap <= 1e-3
        effort.append(found.work)
    assert effort[2] <= 8 * effort[0]


def test_less_memory_never_costs_less() -> None:
    free = transformer(layers=2)
    peak, least = solve(free).peak, least_peak(free)
    costs = []
    for share in (1.0, 0.5, 0.2, 0.0):
        found = solve(dataclasses.replace(free, limit=least + share * (peak - least)))
        assert found.status == "optimal"
        costs.append(found.cost)
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


def test_too_little_memory_names_the_largest_first() -> None:
    free = transformer(layers=2)
    least = least_peak(free)
    found = solve(dataclasses.replace(free, limit=least / 2))
    assert found.status == "infeasible"
    assert found.shortage is not None
    assert found.shortage.needed == pytest.approx(least)
    assert found.shortage.smallest == tuple(sorted(found.shortage.smallest, reverse=True))
    assert sum(found.shortage.smallest) == pytest.approx(found.shortage.needed)
    assert free.nodes[found.shortage.nodes[0]].label == "logits"


def test_the_problem_is_left_as_it_was() -> None:
    problem = transformer(layers=1, tight=0.5)
    arrays = [n.costs for n in problem.nodes] + [e.costs for e in problem.edges]
    before = [a.copy() for a in arrays]
    solve(problem)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


def test_the_same_answer_whatever_the_hash_seed() -> None:
    code = (
        "import dataclasses\n"
        "from passes.solve.samples import transformer, knotty_problem\n"
        "from passes.solve.ilp import solve\n"
        "free = transformer(3)\n"
        "peak = solve(free).peak\n"
        "print(solve(dataclasses.replace(free, limit=0.5 * peak)))\n"
        "print([solve(knotty_problem(s)) for s in range(5)])\n"
    )
    texts = set()
    for seed in ("0", "1", "77"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        texts.add(run.stdout)
    assert len(texts) == 1
