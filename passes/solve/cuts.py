"""Which prices look best, after the choices met so far?  The master of a cutting-plane method.

A choice k met on the way, of cost c_k and g_kr bytes over row r, shows that no prices p promise
more than c_k + sum_r p_r g_kr (Kelley, J. SIAM 8(4), 1960). The best prices in view of all of them

    maximise z   such that   z <= c_k + sum_r p_r g_kr  for each k,     p >= 0

are the dual variables of choosing a mixture of the choices (Dantzig and Wolfe, Operations Research
8(1), 1960)

    minimise sum_k c_k m_k   such that   sum_k m_k = 1,   sum_k g_kr m_k <= 0  for each r,   m >= 0

which is solved here by the simplex method: a few dozen columns and rows, started from the mixture
that is one choice with nothing over.

>>> cuts = [Cut(10.0, np.array([4.0])), Cut(20.0, np.array([-1.0]))]
>>> prices, promise = best_prices(cuts, [0])
>>> prices.tolist(), promise
([2.0], 18.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from passes.solve.problem import Costs

_ROUNDS = 500
_SMALL = 1e-10


@dataclass(frozen=True, slots=True)
class Cut:
    """A choice that has been met: its cost, and the bytes it is over each row."""

    cost: float
    over: Costs


def best_prices(cuts: Sequence[Cut], rows: Sequence[int]) -> tuple[Costs, float]:
    """Prices for these rows, and the bound they promise. At least one cut must be over no row."""
    costs = np.array([c.cost for c in cuts])
    over = np.array([c.over[list(rows)] for c in cuts]).reshape(len(cuts), len(rows))
    shift, spread = float(costs.min()), float(np.ptp(costs)) or 1.0
    size = np.abs(over).max(axis=0, initial=0.0)
    size[size == 0] = 1.0
    fits = np.flatnonzero((over <= 0).all(axis=1))
    start = int(fits[costs[fits].argmin()])
    duals = _simplex((costs - shift) / spread, (over / size).T, start)
    prices = np.maximum(-duals[:-1], 0.0) * spread / size
    return prices, float((costs + over @ prices).min())


def _simplex(costs: Costs, over: Costs, start: int) -> Costs:
    """The dual variables (rows, then the sum) of the mixture problem, all numbers about one."""
    rows, count = over.shape
    matrix = np.zeros((rows + 1, count + rows))
    matrix[:rows, :count], matrix[rows, :count] = over, 1.0
    matrix[:rows, count:] = np.eye(rows)
    price = np.concatenate([costs, np.zeros(rows)])
    right = np.zeros(rows + 1)
    right[rows] = 1.0
    basis = [*range(count, count + rows), start]
    duals = np.zeros(rows + 1)
    for turn in range(_ROUNDS):
        square = matrix[:, basis]
        duals = np.linalg.solve(square.T, price[basis])
        gain = price - duals @ matrix
        gain[basis] = 0.0
        better = np.flatnonzero(gain < -_SMALL)
        if not len(better):
            break
        # The steepest column; in long runs the first one, which cannot go round in circles.
        enter = int(better[gain[better].argmin()] if turn < _ROUNDS // 2 else better[0])
        level, slope = np.linalg.solve(square, np.column_stack([right, matrix[:, enter]])).T
        falls = np.flatnonzero(slope > _SMALL)
        if not len(falls):
            break  # cannot be: the mixture's weights are bounded, but rounding may say so
        steps = np.maximum(level[falls], 0.0) / slope[falls]
        ties = falls[steps <= steps.min() + 1e-14]
        leave = min(ties.tolist(), key=lambda i: basis[i])
        basis[leave] = enter
    return duals
