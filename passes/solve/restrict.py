"""What is the best choice among the promising ones?  Exact elimination on a restricted problem.

Messages give each choice a reduced cost: how far above the bound a solution with it must lie at
least. Keeping only choices with a reduced cost of at most tau leaves few per node, and with tau
small enough the elimination tables fit any budget. The answer is a good one; and it is *the*
minimum when tau is not less than its distance from the bound: whatever was left out costs as much.

>>> costs = [np.array([0.0, 4.0]), np.array([3.0, 0.0])]
>>> links = [{1: np.array([[0.0, 2.0], [0.0, 0.0]])}, {0: np.array([[0.0, 0.0], [2.0, 0.0]])}]
>>> best_within(costs, links, np.array([0.0, 4.0, 3.0, 0.0]), 3.5, Budget(10, 10)).choice.tolist()
[0, 1]
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from passes.solve.eliminate import Order, minimise, plan_order
from passes.solve.memory import Indices
from passes.solve.problem import Costs
from passes.solve.tables import Picks

Links = Sequence[Mapping[int, Costs]]
_TRIES = 7


@dataclass(frozen=True, slots=True)
class Budget:
    """Most table entries in all, and most in one table."""

    work: float
    largest: float


@dataclass(frozen=True, slots=True)
class Found:
    """A choice per node, its value, the tau up to which all choices were looked at, work spent."""

    choice: Indices
    value: float
    tau: float
    work: float


def best_within(
    unary: Sequence[Costs], links: Links, reduced: Costs, tau: float, budget: Budget
) -> Found:
    """The best choice with all reduced costs at most tau, or at most a smaller tau that fits."""
    starts = np.cumsum([0, *(len(u) for u in unary)])
    parts = [reduced[a:b] for a, b in itertools.pairwise(starts)]
    keep = [np.flatnonzero(r <= tau) for r in parts]
    order = _plan(keep, links, budget)
    if order is None:
        tau, keep, order = _smaller(parts, links, tau, budget)
    value, choice = _eliminate(unary, links, keep, order)
    return Found(choice, value, tau, order.work)


def _smaller(
    parts: Sequence[Costs], links: Links, tau: float, budget: Budget
) -> tuple[float, list[Picks], Order]:
    """The largest tau found that fits, by bisection over how many choices it keeps."""
    levels = np.sort(np.concatenate([r[r <= tau] for r in parts]))
    # One choice per node always fits; among equals the first.
    best_keep = [np.array([int(r.argmin())]) for r in parts]
    best = -1.0, best_keep, _plan(best_keep, links, budget)
    low, high = len(parts), len(levels)
    for _ in range(_TRIES):
        middle = int((low * high) ** 0.5)
        level = float(levels[min(middle, len(levels) - 1)])
        keep = [np.flatnonzero(r <= level) for r in parts]
        order = _plan(keep, links, budget)
        if order is None:
            high = middle
        else:
            low, best = middle, (level, keep, order)
    assert best[2] is not None, "one choice per node needs no table"
    return best[0], best[1], best[2]


def _plan(keep: Sequence[Picks], links: Links, budget: Budget) -> Order | None:
    """An order for the nodes with several choices left, None when it goes over the budget."""
    sizes = [len(k) for k in keep]
    around = {v: {u for u in links[v] if sizes[u] > 1} for v, size in enumerate(sizes) if size > 1}
    return plan_order(sizes, around, budget.work, budget.largest)


def _eliminate(
    unary: Sequence[Costs], links: Links, keep: Sequence[Picks], order: Order
) -> tuple[float, Indices]:
    """Minimise over the kept choices; nodes with one only add to their neighbours' costs."""
    value, costs = 0.0, []
    tables: dict[tuple[int, int], Costs] = {}
    free = [len(k) > 1 for k in keep]
    for v, around in enumerate(links):
        own = unary[v][keep[v]]
        for u, table in around.items():
            if free[v] and free[u]:
                if v < u:
                    tables[v, u] = table[keep[v][:, None], keep[u]]
            elif free[v]:
                own = own + table[keep[v], keep[u][0]]
            elif v < u and not free[u]:
                own = own + table[keep[v][0], keep[u][0]]
        costs.append(own)
        if not free[v]:
            value += float(own[0])
    least, picks = minimise(order, costs, tables)
    choice = [int(k[max(i, 0)]) for k, i in zip(keep, picks, strict=True)]
    return value + least, np.array(choice, dtype=np.intp)
