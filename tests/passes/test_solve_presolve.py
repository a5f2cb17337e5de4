"""Presolve keeps the optimum, and what it removed can be found again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from passes.solve.brute import brute_force
from passes.solve.dominance import undominated
from passes.solve.memory import row_times
from passes.solve.presolve import presolve, reduce_again
from passes.solve.problem import INFINITY, Edge, Node, Problem, Use
from passes.solve.reduction import Core, Infeasible
from passes.solve.samples import knotty_problem, random_problem, transformer
from passes.solve.tables import Pool


def best_of(core: Core) -> tuple[float, tuple[int, ...]]:
    """The cheapest choice of a core that keeps its rows, by trying them all."""
    rows = core.rows()
    best: tuple[float, tuple[int, ...]] = (np.inf, ())
    for choice in itertools.product(*(range(n) for n in core.sizes)):
        picks = np.array(choice, dtype=np.intp)
        if rows.over(picks).max(initial=-1.0) <= 0:
            best = min(best, (core.cost(choice), choice))
    return best


def same_optimum(problem: Problem, core: Core, cost: float) -> None:
    found, choice = best_of(core)
    assert found == pytest.approx(cost, rel=1e-12)
    if found < np.inf:
        full = core.expand(choice)
        assert problem.feasible(full)
        assert problem.cost(full) == pytest.approx(cost, rel=1e-12)
        assert core.place(full).tolist() == list(choice)


@pytest.mark.parametrize("make", [random_problem, knotty_problem])
def test_the_optimum_stays(make) -> None:  # type: ignore[no-untyped-def]
    for seed in range(100 if make is random_problem else 15):
        problem = make(seed)
        right = brute_force(problem)
        try:
            core = presolve(problem, Pool())
        except Infeasible:
            assert not right.choice
            continue
        same_optimum(problem, core, right.cost)


def test_the_optimum_of_a_restriction_stays() -> None:
    for seed in range(15):
        problem = knotty_problem(seed)
        pool = Pool()
        core = presolve(problem, pool)
        rng = np.random.default_rng(seed)
        keep = [np.sort(rng.choice(n, rng.integers(1, n + 1), replace=False)) for n in core.sizes]
        nodes = [Node(np.full(len(n.costs), INFINITY), n.uses) for n in problem.nodes]
        for v, labels, kept in zip(core.names, core.labels, keep, strict=True):
            nodes[v].costs[labels[kept]] = problem.nodes[v].costs[labels[kept]]
        for v in set(range(len(nodes))) - set(core.names):
            nodes[v] = problem.nodes[v]
        smaller = Problem("restricted", tuple(nodes), problem.edges, problem.limit)
        try:
            again = reduce_again(core, keep, pool)
        except Infeasible:
            assert not brute_force(smaller).choice
            continue
        same_optimum(smaller, again, brute_force(smaller).cost)


def test_a_chain_without_memory_dissolves() -> None:
    rng = np.random.default_rng(0)
    nodes = tuple(Node(rng.integers(0, 9, 5).astype(float)) for _ in range(50))
    edges = tuple(Edge(i, i + 1, rng.integers(0, 9, (5, 5)).astype(float)) for i in range(49))
    core = presolve(Problem("chain", nodes, edges), Pool())
    assert core.names == ()
    problem = Problem("chain", nodes, edges)
    assert problem.cost(core.expand(())) == core.constant


def test_a_tied_node_moves_into_the_one_it_follows() -> None:
    # b follows a in another order, and holds the memory; the row is tight.
    tie = np.full((3, 3), INFINITY)
    tie[[0, 1, 2], [2, 0, 1]] = 0.0
    a = Node(np.array([1.0, 2.0, 3.0]))
    b = Node(np.array([10.0, 20.0, 30.0]), (Use(0, 2, np.array([7.0, 5.0, 9.0])),))
    problem = Problem("tied", (a, b), (Edge(0, 1, tie),), 8)
    core = presolve(problem, Pool())
    right = brute_force(problem)
    assert problem.cost(core.expand([0] * len(core.names))) == right.cost == 12


def test_a_separable_edge_is_no_edge() -> None:
    table = np.array([[1.0, 4.0], [3.0, 6.0]])
    use = (Use(0, 1, np.array([3.0, 1.0])),)
    nodes = (Node(np.array([0.0, 9.0]), use), Node(np.array([0.0, 9.0]), use))
    core = presolve(Problem("sum", nodes, (Edge(0, 1, table),), 4), Pool())
    assert not any(core.links)


def test_a_row_that_cannot_overflow_is_dropped() -> None:
    problem = transformer(layers=1, tight=0.5)
    assert problem.limit is not None
    roomy = Problem("roomy", problem.nodes, problem.edges, 100 * problem.limit)
    assert len(presolve(problem, Pool()).slack) > 0
    assert len(presolve(roomy, Pool()).slack) == 0


def test_repeated_layers_share_their_tables() -> None:
    def tables(layers: int) -> int:
        core = presolve(transformer(layers), Pool())
        return len({id(t) for around in core.links for t in around.values()})

    assert tables(12) == tables(6)


@pytest.mark.parametrize(
    ("spans", "rows"),
    [
        ([], []),
        ([(0, 5)], [4]),
        ([(0, 2), (2, 4)], [1, 3]),
        ([(0, 9), (3, 5), (5, 9)], [4, 8]),
        ([(1, 4), (2, 4), (3, 3)], [3]),  # an empty interval is nowhere
    ],
)
def test_rows_are_the_fullest_times(spans: list[tuple[int, int]], rows: list[int]) -> None:
    nodes = tuple(Node(np.zeros(1), (Use(b, e, np.ones(1)),)) for b, e in spans)
    assert row_times(Problem("rows", nodes, (), 3)).tolist() == rows


def test_rows_see_every_overflow() -> None:
    for seed in range(50):
        problem = random_problem(seed)
        rng = np.random.default_rng(seed)
        choice = rng.integers(0, [len(n.costs) for n in problem.nodes]).tolist()
        memory = problem.memory(choice)
        at = memory[row_times(problem)]
        assert at.max(initial=0.0) == memory.max(initial=0.0)


def test_dominance_against_its_definition() -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n, m = rng.integers(2, 6, 2)
        unary = rng.integers(0, 5, n).astype(float)
        tables = [rng.integers(0, 4, (n, m)).astype(float) for _ in range(rng.integers(0, 3))]
        usages = [rng.integers(0, 3, n).astype(float) for _ in range(rng.integers(0, 2))]
        for t in tables:
            t[rng.random(t.shape) < 0.2] = np.inf
            t[~np.isfinite(t).any(axis=1), 0] = 1.0

        def beats(a: int, b: int) -> bool:  # whatever the neighbours take, b is no worse than a
            worst = unary[b] - unary[a]  # noqa: B023
            for t in tables:  # noqa: B023
                open_ = [j for j in range(t.shape[1]) if np.isfinite(t[a, j])]
                worst += max(t[b, j] - t[a, j] for j in open_)
            return bool(worst <= 0) and all(u[b] <= u[a] for u in usages)  # noqa: B023

        want = [
            a
            for a in range(n)
            if not any(a != b and beats(a, b) and (b < a or not beats(b, a)) for b in range(n))
        ]
        assert undominated(unary, tables, usages).tolist() == want
