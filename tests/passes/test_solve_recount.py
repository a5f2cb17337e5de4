"""Solutions and bounds, checked by a count in exact integers that knows nothing of the search."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.solve.brute import brute_force
from passes.solve.ilp import solve
from passes.solve.problem import INFINITY, Edge, Node, Problem, ProblemError, Use
from passes.solve.recount import recount
from passes.solve.samples import knotty_problem, random_problem


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_every_solution_is_what_it_says_and_no_bound_is_above_the_best(seed: int) -> None:
    problem = random_problem(seed, limit=seed % 3 > 0) if seed % 2 else knotty_problem(seed)
    right, found = brute_force(problem), solve(problem)
    if not found.choice:
        assert not right.choice or not problem.nodes
        return
    cost, peak = recount(problem, found.choice)
    assert isinstance(cost, int)
    assert cost == found.cost
    assert peak == found.peak
    assert problem.limit is None or peak <= problem.limit
    assert found.bound <= recount(problem, right.choice).cost <= cost


def test_it_sees_what_rounding_hides() -> None:
    heavy = Node(np.array([2.0**53]), (Use(0, 1, np.array([2.0**53])),))
    light = Node(np.array([1.0]), (Use(0, 1, np.array([1.0])),))
    problem = Problem("", (heavy, light), ())
    assert problem.cost((0, 0)) == 2**53  # one is lost
    assert recount(problem, (0, 0)) == (2**53 + 1, 2**53 + 1)


def test_memory_counts_half_open_intervals_and_empty_ones_not_at_all() -> None:
    spans = ((0, 2), (2, 4), (1, 1), (3, 2))
    nodes = tuple(Node(np.zeros(1), (Use(a, b, np.array([5.0])),)) for a, b in spans)
    assert recount(Problem("", nodes, ()), (0,) * 4).peak == 5


def test_what_may_not_be_chosen_is_refused() -> None:
    a, b = Node(np.array([1.0, INFINITY])), Node(np.array([0.0, 0.0]))
    table = np.array([[0.0, INFINITY], [0.0, 0.0]])
    problem = Problem("", (a, b), (Edge(0, 1, table),))
    assert recount(problem, (0, 0)).cost == 1
    for choice, message in (
        ((1, 0), "choice 1 of node 0 may not be chosen"),
        ((0, 1), "choices 0 and 1 of nodes 0 and 1"),
        ((0, 2), "choice 2 of node 1, which has 2"),
        ((0,), "1 choices for 2 nodes"),
    ):
        with pytest.raises(ProblemError, match=message):
            recount(problem, choice)


def test_an_interrupted_search_gives_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = next(p for p in map(knotty_problem, range(99)) if brute_force(p).choice)
    start = brute_force(problem).choice

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("passes.solve.ilp.presolve", interrupt)
    found = solve(problem, starts=[start])
    assert (found.stopped, found.status, found.choice) == ("interrupted", "feasible", start)
    assert found.bound <= found.cost
    with pytest.raises(KeyboardInterrupt):  # nothing yet
        solve(problem)
