"""What is the best choice, by trying them all?  The oracle that tests trust.

>>> from passes.solve.problem import Node
>>> brute_force(Problem("one", (Node(np.array([3.0, 1.0])),), ())).choice
(1,)
"""

from __future__ import annotations

import itertools

import numpy as np

from passes.solve.problem import INFINITY, Problem, Solution


def brute_force(problem: Problem) -> Solution:
    """The cheapest feasible choice; the first in lexicographic order where several are equal."""
    best: tuple[int, ...] = ()
    cost = np.inf
    for choice in itertools.product(*(range(len(n.costs)) for n in problem.nodes)):
        value = problem.cost(choice)
        if value < min(cost, INFINITY) and problem.feasible(choice):
            best, cost = choice, value
    if cost == np.inf:
        return Solution((), np.inf, np.inf, 0.0, "infeasible")
    peak = float(problem.memory(best).max(initial=0.0))
    return Solution(best, cost, cost, peak, "optimal")
