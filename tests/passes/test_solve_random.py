"""Small problems whose answer brute force knows: the solver's claims, one by one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.solve.brute import brute_force
from passes.solve.ilp import solve
from passes.solve.meter import Meter, Progress, Stop
from passes.solve.problem import INFINITY, Edge, Node, Problem, ProblemError, Use
from passes.solve.samples import knotty_problem, random_problem


def agree(problem: Problem, **options: object) -> None:
    """The solver's status, cost and bound are those of brute force."""
    right = brute_force(problem)
    told: list[Progress] = []
    found = solve(problem, progress=told.append, **options)  # type: ignore[arg-type]
    assert found.status == right.status
    if right.choice:
        assert problem.feasible(found.choice)
        assert problem.cost(found.choice) == found.cost
        assert found.cost == pytest.approx(right.cost, rel=1e-9)
        assert found.peak == problem.memory(found.choice).max(initial=0.0)
        # Every bound on the way was one, and no cost on the way was a lie.
        doubt = 1e-9 * (1 + abs(right.cost))
        assert all(p.bound <= right.cost + doubt for p in told)
        assert all(p.cost >= right.cost - doubt for p in told)


@pytest.mark.parametrize("block", range(6))
def test_brute_force_agrees_where_presolve_helps(block: int) -> None:
    for seed in range(5000 + 50 * block, 5050 + 50 * block):
        agree(random_problem(seed, limit=seed % 3 > 0))


@pytest.mark.parametrize("block", range(6))
def test_brute_force_agrees_where_it_does_not(block: int) -> None:
    for seed in range(9000 + 10 * block, 9010 + 10 * block):
        agree(knotty_problem(seed))


def test_costs_may_be_fractions() -> None:
    for seed in range(20):
        agree(knotty_problem(seed, whole=False))


def test_the_knotty_ones_bind_and_some_do_not_fit() -> None:
    binding = nothing = 0
    for seed in range(40):
        problem = knotty_problem(seed)
        right = brute_force(problem)
        free = solve(dataclasses.replace(problem, limit=None))
        binding += bool(right.choice) and free.cost < right.cost
        nothing += not right.choice
    assert binding >= 15
    assert nothing >= 3


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_small_problem(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 3), max_size=5))
    number = st.sampled_from([0.0, 1.0, 2.0, 7.0, -3.0, INFINITY])

    def numbers(count: int) -> np.ndarray:
        return np.array(data.draw(st.lists(number, min_size=count, max_size=count)))

    nodes = []
    for n in sizes:
        spans = data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=2))
        bytes_ = st.lists(st.integers(0, 5).map(float), min_size=n, max_size=n)
        uses = tuple(Use(b, e, np.array(data.draw(bytes_))) for b, e in spans)
        nodes.append(Node(numbers(n), uses))
    edges = []
    if sizes:
        ends = st.integers(0, len(sizes) - 1)
        for u, v in data.draw(st.lists(st.tuples(ends, ends), max_size=6)):  # loops and doubles too
            edges.append(Edge(u, v, numbers(sizes[u] * sizes[v]).reshape(sizes[u], sizes[v])))
    limit = data.draw(st.sampled_from([None, 0, 3, 6.0]))
    agree(Problem("drawn", tuple(nodes), tuple(edges), limit))


def test_the_answer_is_never_dearer_than_a_feasible_start() -> None:
    for seed in range(30):
        problem = knotty_problem(seed)
        right = brute_force(problem)
        if not right.choice:
            continue
        rng = np.random.default_rng(seed)
        sizes = [len(n.costs) for n in problem.nodes]
        starts = [tuple(rng.integers(0, sizes).tolist()) for _ in range(5)]
        good = [problem.cost(s) for s in starts if problem.feasible(s)]
        hasty = solve(problem, starts=starts, work=0.0)  # stops as soon as it may
        assert hasty.cost <= min(good, default=np.inf)
        assert solve(problem, starts=[right.choice], work=0.0).cost == right.cost
        agree(problem, starts=starts)


def test_a_start_that_is_no_choice_is_refused() -> None:
    problem = random_problem(1)
    with pytest.raises(ProblemError, match="a start has 0 choices"):
        solve(problem, starts=[()])
    with pytest.raises(ProblemError, match="takes choice 9 of node 0"):
        solve(problem, starts=[[9] * len(problem.nodes)])


def test_nothing_to_decide() -> None:
    assert solve(Problem("empty", (), ())).status == "optimal"
    assert solve(Problem("one", (Node(np.array([4.0])),), ())).choice == (0,)


def test_a_forbidden_pair_stays_forbidden_among_savings() -> None:
    # INFINITY less a saving is a finite number, and still no choice.
    saving = Node(np.array([-5e17]))
    edge = Edge(0, 1, np.array([[INFINITY]]))
    assert solve(Problem("no", (saving, saving), (edge,))).status == "infeasible"


def test_a_shortage_counts_what_excludes_one_another() -> None:
    # Each node could take 1 byte, but then its neighbour must take 8.
    pair = np.array([[INFINITY, 0.0], [0.0, INFINITY]])
    nodes = tuple(Node(np.zeros(2), (Use(0, 4, np.array([1.0, 8.0])),), n) for n in "ab")
    found = solve(Problem("either", nodes, (Edge(0, 1, pair),), 5))
    assert found.status == "infeasible"
    assert found.shortage is not None
    assert (found.shortage.needed, found.shortage.short) == (9.0, 4.0)
    assert found.shortage.smallest == (1.0, 1.0)


def test_a_time_limit_ends_the_search_and_is_told() -> None:
    for seed in range(40):
        problem = knotty_problem(seed)
        found = solve(problem, time_limit=0.0)
        assert found.stopped in ("time", "proven")
        if found.stopped == "time":
            assert found.status in ("feasible", "unknown")
            return
    pytest.fail("no solve was stopped")


def test_a_small_gap_ends_only_a_search_without_a_limit() -> None:
    problem = Problem("one", (Node(np.array([1000.0, 2000.0])),), ())
    for work, seconds, stopped in ((None, None, "good"), (None, 3600.0, ""), (99.0, None, "")):
        meter = Meter(problem, work, seconds, None)
        meter.offer((0,))
        meter.raise_bound(998.0)  # 0.2 %
        if stopped:
            with pytest.raises(Stop, match=stopped):
                meter.spend(50.0)
        else:
            meter.spend(50.0)
            assert meter.work_left() > 10


@pytest.mark.parametrize("share", [0.5, 1.0, 1.5])
def test_a_cutoff_ends_a_search_that_can_not_beat_it_and_no_other(share: float) -> None:
    ended = 0
    for seed in range(40):
        problem = knotty_problem(seed)
        right = brute_force(problem)
        if not right.choice:
            continue
        free = solve(dataclasses.replace(problem, limit=None))
        cutoff = free.cost + share * (right.cost - free.cost)
        found = solve(problem, cutoff=cutoff)
        if found.stopped == "cutoff":
            ended += 1
            assert cutoff <= found.bound <= right.cost
            assert not found.choice or problem.feasible(found.choice)
        else:
            assert (found.status, found.cost) == ("optimal", right.cost)
        if cutoff > right.cost:
            assert found.stopped != "cutoff"
    assert bool(ended) == (share < 1)  # at the optimum itself "proven" comes first
