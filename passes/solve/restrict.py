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
# How much to widen or narrow the choices after one try, and how often.
_STEP, _TRIES = 1.25, 4


@dataclass(frozen=True, slots=True)
class Budget:
    """Most table entries in all, and most in one table."""

    work: float
    largest: float


@dataclass(frozen=True, slots=True)
class Found:
    """A choice per node, its value, the tau up to which all choices were looked at, work spent.

    kept: how many choices that left; a good place for the next search to begin.
    """

    choice: Indices
    value: float
    tau: float
    work: float
    kept: int


def best_within(
    unary: Sequence[Costs],
    links: Links,
    reduced: Costs,
    tau: float,
    budget: Budget,
    kept: int | None = None,
) -> Found:
    """The best choice with all reduced costs at most tau, or at most a smaller tau that fits."""
    starts = np.cumsum([0, *(len(u) for u in unary)])
    levels = np.sort(reduced[reduced <= tau])
    # One choice per node always fits; among equals the first.
    keep = [np.array([int(reduced[a:b].argmin())]) for a, b in itertools.pairwise(starts)]
    best, order, size = -1.0, _plan(keep, links, budget), len(keep)
    low, high = len(keep), len(levels) + 1  # of choices kept: fits, does not
    middle = len(levels) if kept is None or kept * _STEP >= len(levels) else kept
    for _ in range(2 * _TRIES if kept is None else _TRIES):
        if not low < middle < high:
            break
        level = tau if middle == len(levels) else float(levels[middle - 1])
        tried, plan = _at(reduced, starts, level, links, budget)
        if plan is None:
            high = middle
            middle = int(min(middle / _STEP, (low * high) ** 0.5) if kept else (low * high) ** 0.5)
        else:
            best, keep, order, size = level, tried, plan, middle
            low = middle
            middle = int(min(middle * _STEP, len(levels)) if kept else (low * high) ** 0.5)
    assert order is not None, "one choice per node needs no table"
    value, choice = _eliminate(unary, links, keep, order)
    return Found(choice, value, best, order.work, size)


def _at(
    reduced: Costs, starts: Indices, tau: float, links: Links, budget: Budget
) -> tuple[list[Picks], Order | None]:
    """The choices kept at this tau, and an order for them if it fits."""
    kept = np.flatnonzero(reduced <= tau)
    ends = np.searchsorted(kept, starts)
    keep = [kept[a:b] - s for (a, b), s in zip(itertools.pairwise(ends), starts, strict=False)]
    return keep, _plan(keep, links, budget)


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
