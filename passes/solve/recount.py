"""Is an answer what it is said to be?  Counted again from the problem alone, in exact numbers.

Nothing of the search is used here: whole costs and bytes are added up as Python's integers, others
as fractions, so that no rounding hides an excess of one.

>>> from passes.solve.problem import Edge, Node, Problem, Use
>>> import numpy as np
>>> a = Node(np.array([2.0**53, 1.0]), (Use(0, 2, np.array([3.0, 4.0])),))
>>> b = Node(np.array([1.0, 2.0]), (Use(1, 2, np.array([0.5, 0.0])),))
>>> recount(Problem("", (a, b), (Edge(0, 1, np.zeros((2, 2))),)), (0, 0))
Count(cost=9007199254740993, peak=3.5)
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from passes.solve.problem import INFINITY, Problem, ProblemError

Exact = int | float


class Count(NamedTuple):
    """Cost and peak memory: integers where they are whole."""

    cost: Exact
    peak: Exact


def recount(problem: Problem, choice: Sequence[int]) -> Count:
    """Cost and peak of a choice. Raises ProblemError where it is none, or may not be chosen."""
    if len(choice) != len(problem.nodes):
        raise ProblemError(f"{len(choice)} choices for {len(problem.nodes)} nodes")
    cost = Fraction(0)
    change: dict[int, Fraction] = {}
    for v, (node, c) in enumerate(zip(problem.nodes, choice, strict=True)):
        if not 0 <= c < len(node.costs):
            raise ProblemError(f"choice {c} of node {v}, which has {len(node.costs)}")
        cost += _finite(float(node.costs[c]), f"choice {c} of node {v}")
        for use in node.uses:
            if use.begin < use.end:
                usage = Fraction(float(use.usages[c]))
                change[use.begin] = change.get(use.begin, Fraction(0)) + usage
                change[use.end] = change.get(use.end, Fraction(0)) - usage
    for e in problem.edges:
        i, j = choice[e.u], choice[e.v]
        cost += _finite(float(e.costs[i, j]), f"choices {i} and {j} of nodes {e.u} and {e.v}")
    peak = held = Fraction(0)
    for time in sorted(change):
        held += change[time]
        peak = max(peak, held)
    return Count(_plain(cost), _plain(peak))


def _finite(cost: float, what: str) -> Fraction:
    if cost >= INFINITY:
        raise ProblemError(f"{what} may not be chosen: infinite cost")
    return Fraction(cost)


def _plain(x: Fraction) -> Exact:
    return x.numerator if x.denominator == 1 else float(x)
