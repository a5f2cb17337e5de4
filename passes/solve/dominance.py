"""Which choices of one node can be left out, whatever its neighbours choose?

Choice b dominates choice a when going from a to b can never cost more and never takes more memory:

    cost[b] - cost[a] + sum over edges e of max_j (C_e[b, j] - C_e[a, j])  <=  0
    usage[b] <= usage[a]   for each of the node's uses

The relation is transitive, so all dominated choices may go at once; of equal ones the first stays.
Where a's own best column of every edge already makes b worse, b does not dominate a: that dismisses
nearly all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from passes.solve.problem import Costs
from passes.solve.tables import Picks

_CHUNK = 1 << 20  # entries of a temporary array


def undominated(unary: Costs, tables: Sequence[Costs], usages: Sequence[Costs]) -> Picks:
    """The choices to keep, in order. Each row of a table must have a finite entry.

    >>> undominated(np.array([0.0, 2.0, 1.0]), [np.array([[5.0, 0], [0, 5], [4, 9]])], []).tolist()
    [0, 1]
    """
    count = len(unary)
    at_best = np.repeat(unary[:, None], count, axis=1)  # [b, a]: b's cost at a's best columns
    for table in tables:
        at_best += table[:, table.argmin(axis=1)]
    maybe = (at_best <= at_best.diagonal()).T  # [a, b]: b may dominate a
    np.fill_diagonal(maybe, False)
    for usage in usages:
        maybe &= usage[None, :] <= usage[:, None]
    a, b = np.nonzero(maybe)
    if not len(a):
        return np.arange(count)
    most = np.array([_worst(t, a, b) for t in tables])
    with np.errstate(invalid="ignore"):  # infinitely worse on one edge, better on another: no
        alive = np.flatnonzero(unary[b] - unary[a] + most.sum(axis=0) <= 0)
    dominates: npt.NDArray[np.bool_] = np.zeros((count, count), dtype=bool)
    dominates[a[alive], b[alive]] = True
    first = np.tri(count, dtype=bool)  # [a, b]: b is not after a
    return np.flatnonzero(~(dominates & (~dominates.T | first)).any(axis=1))


def _worst(table: Costs, a: Picks, b: Picks) -> Costs:
    """max_j table[b, j] - table[a, j] per pair; columns where both are infinite say nothing."""
    out = np.empty(len(a))
    step = max(1, _CHUNK // max(1, table.shape[1]))
    with np.errstate(invalid="ignore"):
        for i in range(0, len(a), step):
            change = table[b[i : i + step]] - table[a[i : i + step]]
            out[i : i + step] = np.fmax.reduce(change, axis=1)
    return np.where(np.isnan(out), -np.inf, out)
