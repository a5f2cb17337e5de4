"""Lower bounds, eliminations and prices: each held against all choices of small problems."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest

from passes.solve.buckets import lower_bound
from passes.solve.chains import chain_order
from passes.solve.cuts import Cut, best_prices
from passes.solve.eliminate import minimise, plan_order
from passes.solve.exact import best_choice
from passes.solve.messages import Messages
from passes.solve.presolve import presolve
from passes.solve.prices import PricedCore
from passes.solve.problem import Costs
from passes.solve.reduction import Core
from passes.solve.restrict import Budget, best_within
from passes.solve.samples import knotty_problem
from passes.solve.tables import Pool

Graph = tuple[list[Costs], list[dict[int, Costs]]]
SEEDS = range(60)


def graph(seed: int) -> Graph:
    """Costs per node and symmetric links; each row of a table has a finite entry."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, rng.integers(2, 7))
    unary = [rng.integers(0, 20, n).astype(float) for n in sizes]
    links: list[dict[int, Costs]] = [{} for _ in sizes]
    for u in range(len(sizes)):
        for v in range(u + 1, len(sizes)):
            if rng.random() < 0.6:
                table = rng.integers(0, 20, (sizes[u], sizes[v])).astype(float)
                table[rng.random(table.shape) < 0.15] = np.inf
                table[~np.isfinite(table).any(axis=1)] = 50.0
                table[:, ~np.isfinite(table).any(axis=0)] = 50.0
                links[u][v], links[v][u] = table, np.ascontiguousarray(table.T)
    return unary, links


def edges(links: list[dict[int, Costs]]) -> dict[tuple[int, int], Costs]:
    return {(v, u): t for v, around in enumerate(links) for u, t in around.items() if v < u}


def min_marginals(unary: list[Costs], links: list[dict[int, Costs]]) -> list[Costs]:
    """Per node and choice the least cost of any solution with it."""
    out = [np.full(len(u), np.inf) for u in unary]
    for choice in itertools.product(*(range(len(u)) for u in unary)):
        cost = sum(u[c] for u, c in zip(unary, choice, strict=True))
        cost += sum(t[choice[v], choice[u]] for (v, u), t in edges(links).items())
        for own, c in zip(out, choice, strict=True):
            own[c] = min(own[c], cost)
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_elimination_finds_the_minimum(seed: int) -> None:
    unary, links = graph(seed)
    order = plan_order([len(u) for u in unary], {v: set(a) for v, a in enumerate(links)})
    assert order is not None
    value, choice = minimise(order, unary, edges(links))
    right = min_marginals(unary, links)
    assert value == min(m.min() for m in right)
    if value < np.inf:
        assert all(m[c] == value for m, c in zip(right, choice, strict=True)) or value == sum(
            u[c] for u, c in zip(unary, choice, strict=True)
        ) + sum(t[choice[v], choice[u]] for (v, u), t in edges(links).items())


def test_elimination_of_large_tables_finds_the_minimum() -> None:
    # Tables above the blocking size, on a clique of four.
    rng = np.random.default_rng(0)
    unary = [rng.uniform(size=16) for _ in range(4)]
    pairs = {(u, v): rng.uniform(size=(16, 16)) for u, v in itertools.combinations(range(4), 2)}
    order = plan_order([16] * 4, {v: {u for u in range(4) if u != v} for v in range(4)})
    assert order is not None
    total = sum(u.reshape([-1 if i == v else 1 for i in range(4)]) for v, u in enumerate(unary))
    for (u, v), t in pairs.items():
        total = total + t.reshape([16 if i in (u, v) else 1 for i in range(4)])
    value, choice = minimise(order, unary, pairs)
    assert value == pytest.approx(total.min())
    assert total[tuple(choice)] == pytest.approx(total.min())


def test_an_order_over_budget_is_none() -> None:
    clique = {v: {u for u in range(6) if u != v} for v in range(6)}
    assert plan_order([10] * 6, clique, most_entries=1e5) is None
    assert plan_order([10] * 6, clique, most_work=1e5) is None
    order = plan_order([10] * 6, clique)
    assert order is not None
    assert order.largest == 1e6


@pytest.mark.parametrize("seed", SEEDS)
def test_messages_bound_from_below_and_rise(seed: int) -> None:
    unary, links = graph(seed)
    right = np.concatenate(min_marginals(unary, links))
    messages = Messages(unary, links)
    last = -np.inf
    for _ in range(15):
        bound = messages.sweep()
        assert last - 1e-9 <= messages.before <= bound + 1e-9
        assert bound <= right.min() + 1e-9
        # A choice that looks dear is dear.
        assert (messages.before + messages.reduced() <= right + 1e-9).all()
        last = bound


@pytest.mark.parametrize("seed", range(20))
def test_messages_keep_the_sum(seed: int) -> None:
    unary, links = graph(seed)
    messages = Messages(unary, links)
    for _ in range(3):
        messages.sweep()
    costs, tables = messages.rest([np.arange(len(u)) for u in unary])
    for choice in itertools.product(*(range(len(u)) for u in unary)):
        plain = sum(u[c] for u, c in zip(unary, choice, strict=True))
        plain += sum(t[choice[v], choice[u]] for (v, u), t in edges(links).items())
        moved = sum(u[c] for u, c in zip(costs, choice, strict=True))
        moved += sum(t[choice[v], choice[u]] for (v, u), t in tables)
        assert moved == pytest.approx(plain)


@pytest.mark.parametrize("seed", SEEDS)
def test_compiled_passes_give_the_same_numbers(seed: int) -> None:
    unary, links = graph(seed)
    plain, compiled = (Messages(unary, links, compiled=c) for c in (False, True))
    change = np.random.default_rng(seed).integers(0, 9, len(plain.flat)).astype(float)
    for _ in range(3):
        assert plain.sweep() == compiled.sweep()
        assert plain.before == compiled.before
        assert (plain.flat == compiled.flat).all()
        for messages in (plain, compiled):
            messages.add(change)


@pytest.mark.parametrize("seed", SEEDS)
def test_mini_buckets_bound_from_below(seed: int) -> None:
    unary, links = graph(seed)
    right = min(m.min() for m in min_marginals(unary, links))
    sizes = [len(u) for u in unary]
    bounds = [lower_bound(sizes, unary, edges(links).items(), cap) for cap in (3, 9, 27, 1e9)]
    assert all(b.bound <= right + 1e-9 for b in bounds)
    assert bounds[-1].exact
    assert all(b.bound == pytest.approx(right) for b in bounds if b.exact)


def test_mini_buckets_see_what_chains_cannot() -> None:
    # Three nodes of which no two may agree cheaply, two choices each: a frustrated cycle.
    unary = [np.zeros(2)] * 3
    table = np.eye(2)
    links = [{u: table for u in range(3) if u != v} for v in range(3)]
    messages = Messages(unary, links)
    for _ in range(50):
        messages.sweep()
    assert messages.bound < 0.1
    assert lower_bound([2] * 3, unary, edges(links).items(), 8).bound == 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_search_among_the_promising_knows_what_it_left_out(seed: int) -> None:
    unary, links = graph(seed)
    right = min(m.min() for m in min_marginals(unary, links))
    messages = Messages(unary, links)
    for _ in range(3):
        messages.sweep()
    for tau in (0.0, 1.0, 5.0, np.inf):
        for budget in (Budget(1, 1), Budget(12, 6), Budget(1e9, 1e9)):
            found = best_within(unary, links, messages.reduced(), tau, budget)
            assert found.tau <= tau
            assert found.value >= right - 1e-9
            assert min(found.value, messages.before + found.tau) <= right + 1e-9
    assert found.value == pytest.approx(right)


@pytest.mark.parametrize("seed", range(30))
def test_a_chain_order_is_a_permutation(seed: int) -> None:
    _, links = graph(seed)
    order = chain_order(links)
    assert sorted(order) == list(range(len(links)))


@pytest.mark.parametrize("seed", range(40))
def test_best_prices_against_a_library(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scipy's own making
        linprog = pytest.importorskip("scipy.optimize").linprog
    rng = np.random.default_rng(seed)
    rows, count = int(rng.integers(1, 9)), int(rng.integers(1, 30))
    cuts = [
        Cut(float(rng.integers(0, 1000)) * 1e9, rng.normal(size=rows) * 1e8) for _ in range(count)
    ]
    cuts.append(Cut(3e12, -rng.uniform(0.1, 1, rows) * 1e8))
    prices, promise = best_prices(cuts, list(range(rows)))
    assert (prices >= 0).all()
    # maximise z with z - g p <= c, in units of 1e9 and 1e8
    matrix = [[1.0, *(-c.over / 1e8)] for c in cuts]
    costs = [c.cost / 1e9 for c in cuts]
    right = linprog(
        [-1.0] + [0.0] * rows, matrix, costs, bounds=[(None, None)] + [(0, None)] * rows
    )
    assert promise / 1e9 == pytest.approx(-right.fun, rel=1e-6)


def all_choices(core: Core) -> list[tuple[float, np.ndarray]]:
    rows = core.rows()
    out = []
    for choice in itertools.product(*(range(n) for n in core.sizes)):
        picks = np.array(choice, dtype=np.intp)
        out.append((core.cost(choice), rows.over(picks)))
    return out


@pytest.mark.parametrize("seed", range(12))
def test_priced_bounds_hold_at_all_prices(seed: int) -> None:
    core = presolve(knotty_problem(seed), Pool())
    if not core.names or not len(core.slack):
        return
    every = all_choices(core)
    feasible = min((c for c, over in every if over.max() <= 0), default=np.inf)
    rng = np.random.default_rng(seed)
    priced = PricedCore(core)
    for _ in range(4):
        prices = rng.uniform(0, 3, len(core.slack)) * (rng.random(len(core.slack)) < 0.5)
        priced.set_prices(prices)
        right = min(c + float(prices @ over) for c, over in every)
        assert priced.sweep(2) <= right + 1e-6
        visit = priced.visit(Budget(1e6, 1e6))
        assert visit.value >= right - 1e-6
        assert not visit.exact or visit.value == pytest.approx(right)
        priced.tighten(visit.value, 50)
        assert priced.bound <= feasible + 1e-6


@pytest.mark.parametrize("seed", range(12))
def test_the_exact_finish_is_exact(seed: int) -> None:
    for whole in (True, False):
        core = presolve(knotty_problem(seed, whole=whole), Pool())
        right = min(
            (c for c, over in all_choices(core) if over.max(initial=-1) <= 0), default=np.inf
        )
        found = best_choice(core, hint=None, upper=np.inf, work=20.0)
        assert found.bound == pytest.approx(right)
        assert found.bound <= right + 1e-9
        assert (found.choice is None) == (right == np.inf)
        if found.choice is not None:
            assert core.cost(found.choice) == pytest.approx(right)
            # With no interest in so dear a choice there is nothing to find, or something as dear.
            none = best_choice(core, hint=None, upper=right - 1.0, work=20.0)
            assert none.choice is None or core.cost(none.choice) >= right - 1e-9
