"""Which choice fits, counted exactly?  `solve_within(priced, starts, limit) -> Solution`.

A problem knows the memory of values, not that of resharded copies: these depend on two decisions
each. So what the solver finds may take more than the limit. Then it is told of the copies that it
overlooked, and solves again; a choice that fits, too, when all its copies are counted ends this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from passes.answer import changes, op_strategies, value_axes
from passes.held import held, held_changes, memory
from passes.plan_cost import cost_of
from passes.priced import Priced
from passes.solve.ilp import solve
from passes.solve.problem import INFINITY, Problem, Solution, Use

_ROUNDS = 6  # of solving again
_AGAIN = 12.0  # units of effort for all of them, a third of what is left for each: as in `solve`,
# seconds about; with 20 for each, an MLP at its memory limit took 104 s for the plan it has in 12

# What a copy is that a choice makes: operation, side, place of the value; node, its choice.
Copy = tuple[int, str, int, int, int]


def solve_within(
    priced: Priced, starts: Sequence[Sequence[int]], limit: float, cutoff: float = math.inf
) -> Solution:
    """Solve, and again while the exact memory count is above the limit.

    First the copies that do not fit are told, a few times over; where this leads nowhere, the limit
    is lowered. A choice that fits by the exact count is kept; without any, the answer is
    "infeasible" if the problem itself is, else "unknown". cutoff: a cost to be beaten; where that
    can not be, the choice is the best one met until this was known.
    """
    first = solve(priced.problem, starts=starts, cutoff=cutoff)
    again = _Again(starts, cutoff)
    best, stopped = _with_copies_told(priced, first, limit, again)
    if best is None and stopped != "interrupted":
        best, stopped = _under_a_lower_limit(priced, first, limit, again)
    for start in starts:
        cost = priced.problem.cost(start)
        if cost < (best.cost if best else math.inf) and _fits(priced, start, limit):
            best = fixed(priced.problem, start)
    if best is None:
        lost = replace(first, choice=(), cost=math.inf, status="unknown", stopped=stopped)
        return lost if first.choice else first
    if best is first:
        return best
    status = "optimal" if best.cost <= first.bound else "feasible"
    bound = min(first.bound, best.cost)
    return replace(best, bound=bound, status=status, stopped=stopped, prices=first.prices)


class _Again:
    """Solves once more, with less effort each time."""

    def __init__(self, starts: Sequence[Sequence[int]], cutoff: float) -> None:
        self.starts, self.cutoff, self.left = starts, cutoff, _AGAIN

    def __call__(self, problem: Problem) -> Solution:
        most = max(1.0, self.left / 3)
        found = solve(problem, starts=self.starts, cutoff=self.cutoff, most_work=most)
        self.left -= found.work
        return found


def _with_copies_told(
    priced: Priced, first: Solution, limit: float, again: _Again
) -> tuple[Solution | None, str]:
    """One that fits, if telling of copies leads to it; and what ended the last search."""
    solution, told = first, dict[Copy, Use]()
    for _ in range(_ROUNDS):
        if not solution.choice:
            break
        if _fits(priced, solution.choice, limit):
            return solution, solution.stopped
        new = copies(priced, solution.choice, limit)
        if solution.stopped == "interrupted" or new.keys() <= told.keys():
            break
        told |= new
        problem = with_copies(priced.problem, told)
        solution = again(problem)
    return None, solution.stopped


def _under_a_lower_limit(
    priced: Priced, first: Solution, limit: float, again: _Again
) -> tuple[Solution | None, str]:
    """One that fits, if a limit lowered by what is too much leads to it, or one halfway back."""
    solution, highest, tried = first, limit, limit
    for _ in range(_ROUNDS):
        if solution.choice:
            peak = cost_of(priced, solution.choice).peak_memory
            if peak <= limit:
                return solution, solution.stopped
            highest = tried
            tried -= (peak - limit) * 1.1
        elif tried < limit:
            tried = (tried + highest) / 2
        hopeless = tried <= 0 or (tried >= limit and not solution.choice)
        if hopeless or solution.stopped == "interrupted":
            break
        solution = again(replace(priced.problem, limit=tried))
    return None, solution.stopped


def copies(priced: Priced, choice: Sequence[int], limit: float) -> dict[Copy, Use]:
    """What the copies take that a choice makes, where it takes more than the limit.

    It is laid to the choice of the operation that makes the copy, or of the value where no decision
    is the operation's: right for this choice, and mostly too much for others that share a part.
    """
    values, chosen = value_axes(priced, choice), op_strategies(priced, choice)
    changed = changes(priced, choice, values, chosen)
    over = np.flatnonzero(memory(priced, list(held(priced, values, changed))) > limit)
    out: dict[Copy, Use] = {}
    for c, h in held_changes(priced, changed):
        owner = priced.owner[c.op]
        node = owner if owner >= 0 else priced.node_of_group[priced.decisions.group_of[c.value]]
        first, last = np.searchsorted(over, [h.begin, h.end])
        if first < last and node >= 0 and h.nbytes:
            usages = np.zeros(len(priced.problem.nodes[node].costs))
            usages[choice[node]] = h.nbytes
            out[c.op, c.side, c.index, node, choice[node]] = Use(h.begin, h.end, usages)
    return out


def with_copies(problem: Problem, told: Mapping[Copy, Use]) -> Problem:
    """The problem whose nodes take what these copies take, too."""
    nodes = list(problem.nodes)
    for (*_, node, _), use in told.items():
        nodes[node] = replace(nodes[node], uses=(*nodes[node].uses, use))
    return replace(problem, nodes=tuple(nodes))


def fixed(problem: Problem, choice: Sequence[int]) -> Solution:
    """A given choice as a Solution, feasible or not."""
    cost = problem.cost(choice)
    peak = float(problem.memory(choice).max(initial=0.0))
    return Solution(tuple(choice), cost, cost, peak, "fixed")


def _fits(priced: Priced, choice: Sequence[int], limit: float) -> bool:
    return priced.problem.cost(choice) < INFINITY and cost_of(priced, choice).peak_memory <= limit
