"""The solver against brute force, against the contest's published optimum, and against itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from passes.solve import iopddl
from passes.solve.brute import brute_force
from passes.solve.ilp import solve
from passes.solve.problem import Edge, Node, Problem, ProblemError, Use
from passes.solve.samples import random_problem, transformer

DATA = Path(__file__).parents[1] / "data" / "iopddl"


@pytest.mark.parametrize("block", range(10))
def test_brute_force_agrees(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        problem = random_problem(seed)
        found, right = solve(problem), brute_force(problem)
        assert bool(found.choice) == bool(right.choice), seed
        if right.choice:
            assert problem.feasible(found.choice), seed
            assert found.cost == pytest.approx(right.cost), seed
            assert found.bound <= right.cost + 1e-6, seed
            assert problem.cost(found.choice) == pytest.approx(found.cost), seed


def test_some_random_problems_have_limits_that_bind() -> None:
    bound = 0
    for seed in range(200):
        problem = random_problem(seed)
        free = solve(Problem("free", problem.nodes, problem.edges))
        bound += bool(free.choice) and not problem.feasible(free.choice)
    assert bound >= 40


@pytest.mark.parametrize("tight", [None, 0.7])
def test_a_transformer_step_is_solved_to_the_end(tight: float | None) -> None:
    found = solve(transformer(layers=6, tight=tight))
    assert found.status == "optimal"
    assert found.gap == 0.0


def test_a_start_is_never_lost() -> None:
    for seed in range(40):
        problem = random_problem(seed)
        best = brute_force(problem)
        if best.choice:
            found = solve(problem, starts=[best.choice], work=0.0)
            assert found.cost == pytest.approx(best.cost)


def test_the_contest_s_optimum() -> None:
    found = solve(iopddl.read(DATA / "asplos-2025-iopddl-G.json.gz"))
    assert (found.cost, found.status) == (217039, "optimal")


def test_a_shortage_names_its_nodes() -> None:
    large = np.array([5.0, 7.0])
    nodes = tuple(Node(np.zeros(2), (Use(0, 3, large),), name) for name in ("a", "b"))
    found = solve(Problem("full", nodes, (), 8))
    assert found.status == "infeasible"
    assert found.shortage is not None
    assert found.shortage.short == 2
    assert found.shortage.nodes == (0, 1)


def test_a_malformed_problem_is_refused() -> None:
    node = Node(np.zeros(2))
    with pytest.raises(ProblemError, match="ends at node 7"):
        solve(Problem("bad", (node,), (Edge(0, 7, np.zeros((2, 2))),)))


def test_the_same_answer_in_every_process() -> None:
    code = (
        "from passes.solve.samples import transformer; from passes.solve.ilp import solve;"
        "print(solve(transformer(layers=3, tight=0.5)))"
    )
    texts = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        texts.add(run.stdout)
    assert len(texts) == 1
