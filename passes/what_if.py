"""What would the whole plan cost if one value were split otherwise?  `what_if(found, value)`.

The problem is solved again with that one decision fixed to each of its other choices, everything
else free to follow. Where a hint fixes the decision, the hint is dropped first, so that the answer
says what the hint costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.answer import Change, changes, op_strategies, value_axes
from passes.fitting import solve_within
from passes.ir.graph import Hint
from passes.ir.plan import Axes, Cost
from passes.plan_cost import cost_of
from passes.price import price
from passes.priced import Priced
from passes.search import Found
from passes.solve.ilp import solve
from passes.solve.problem import INFINITY, Costs, Node, Problem

Progress = Callable[[str], None]

# So many choices are solved for; the others are only looked at with their neighbours.
_SOLVED = 8
_SWEEPS = 4


@dataclass(frozen=True, slots=True)
class Other:
    """Another sharding of the value: what the plan would cost, None where nothing is possible."""

    axes: Axes
    cost: Cost | None
    fits: bool


@dataclass(frozen=True, slots=True)
class WhatIf:
    """Why a value is split so. hints: those that fix it. others: the cheapest first.

    skipped: other shardings that a quick look found dearer than these. together: all values that
    share the decision.
    """

    value: int
    axes: Axes
    hints: tuple[Hint, ...]
    others: tuple[Other, ...]
    skipped: int
    together: tuple[int, ...]


def what_if(
    found: Found, value: int, most: int = _SOLVED, progress: Progress | None = None
) -> WhatIf:
    """Solve again for other shardings of a value; the solver's budgets count work, not time."""
    priced, choice = found.priced, list(found.solution.choice)
    group = priced.decisions.groups[priced.decisions.group_of[value]]
    now = value_axes(priced, choice)[value]
    if group.hints:
        priced, choice = _without_hints(priced, choice, group.id)
    node = priced.node_of_group[group.id]
    others: list[Other] = []
    looks: list[tuple[float, int]] = []
    if node >= 0:
        looks = _looks(priced.problem, choice, node)
        for k, (_, c) in enumerate(looks[:most]):
            if progress:
                progress(f"another sharding, {k + 1} of {min(most, len(looks))}")
            others.append(_solved(priced, choice, node, c, value, found.plan.memory_limit))
    others.sort(key=lambda o: (not o.fits, o.cost.step_time if o.cost else np.inf, o.axes))
    members = tuple(v for v in sorted(group.members) if v != value)
    return WhatIf(value, now, group.hints, tuple(others), max(0, len(looks) - most), members)


def without_limit(found: Found) -> tuple[Cost, tuple[Axes, ...]] | None:
    """The plan that more memory would allow, and its shardings; None where it is no faster."""
    problem = replace(found.priced.problem, limit=None)
    solution = solve(problem, starts=[found.solution.choice])
    if not solution.choice or solution.cost >= found.priced.problem.cost(found.solution.choice):
        return None
    return cost_of(found.priced, solution.choice), value_axes(found.priced, solution.choice)


def touching(found: Found, value: int) -> list[Change]:
    """Reshards of the value, of what is decided with it, and of what is made from these."""
    priced, choice = found.priced, found.solution.choice
    members = priced.decisions.groups[priced.decisions.group_of[value]].members
    values, chosen = value_axes(priced, choice), op_strategies(priced, choice)
    return [
        c
        for c in changes(priced, choice, values, chosen)
        if c.value in members
        or (c.side == "result" and any(v in members for v in priced.graph.ops[c.op].inputs))
    ]


def _without_hints(priced: Priced, choice: Sequence[int], group: int) -> tuple[Priced, list[int]]:
    """The same problem with one decision freed of its hints, and the same choice in it."""
    groups = priced.decisions.groups
    freed = replace(groups[group], hints=(), fixed=(None,) * len(groups[group].shape))
    decisions = replace(priced.decisions, groups=(*groups[:group], freed, *groups[group + 1 :]))
    out = price(
        priced.graph,
        priced.mesh,
        priced.cluster,
        decisions,
        priced.live,
        priced.fusion,
        priced.problem.limit,
    )
    before = {(m.kind, m.index): n for n, m in enumerate(priced.meanings)}
    moved = []
    for m in out.meanings:
        # Every copy and op keeps its choices; the freed group has more, or is new.
        old = before.get((m.kind, m.index), -1)
        chosen = priced.meanings[old].choices[choice[old]] if old >= 0 else None
        if chosen is None and m.kind == "group":
            chosen = priced.only[m.index]
        moved.append(m.choices.index(chosen) if chosen in m.choices else 0)
    return out, moved


def _looks(problem: Problem, choice: Sequence[int], node: int) -> list[tuple[float, int]]:
    """(cost, choice of the node) of every other choice, its neighbours adapted; cheapest first."""
    around = _neighbours(problem)
    out = []
    for c in range(len(problem.nodes[node].costs)):
        if c != choice[node] and problem.nodes[node].costs[c] < INFINITY:
            start = _adapted(problem, around, choice, node, c)
            out.append((problem.cost(start), c))
    return sorted(out)


def _solved(
    priced: Priced, choice: Sequence[int], node: int, c: int, value: int, limit: float
) -> Other:
    """The best plan with the node at choice c, within the limit or, failing that, beyond it."""
    problem = _restricted(priced.problem, node, c)
    start = _adapted(problem, _neighbours(problem), choice, node, c)
    solution = solve_within(replace(priced, problem=problem), [start], limit)
    if not solution.choice:
        solution = solve(replace(problem, limit=None), starts=[start])
    moved = list(choice)
    moved[node] = c
    axes = value_axes(priced, moved)[value]
    if not solution.choice:
        return Other(axes, None, False)
    cost = cost_of(priced, solution.choice)
    return Other(axes, cost, cost.peak_memory <= limit)


def _restricted(problem: Problem, node: int, c: int) -> Problem:
    """The problem with one node's other choices forbidden."""
    old = problem.nodes[node]
    costs = np.full_like(old.costs, INFINITY)
    costs[c] = old.costs[c]
    nodes = list(problem.nodes)
    nodes[node] = Node(costs, old.uses, old.label)
    return replace(problem, nodes=tuple(nodes))


Neighbours = list[list[tuple[int, Costs]]]


def _neighbours(problem: Problem) -> Neighbours:
    """Per node the others with an edge to it; the edge's costs have this node's choices first."""
    out: Neighbours = [[] for _ in problem.nodes]
    for e in problem.edges:
        out[e.u].append((e.v, e.costs))
        out[e.v].append((e.u, e.costs.T))
    return out


def _adapted(
    problem: Problem, around: Neighbours, choice: Sequence[int], node: int, c: int
) -> list[int]:
    """The choice with one node changed, and the others following it, one at a time."""
    out = list(choice)
    out[node] = c
    waiting = [u for u, _ in around[node]]
    turns = _SWEEPS * len(problem.nodes)
    while waiting and turns:
        turns -= 1
        v = waiting.pop(0)
        if v == node:
            continue
        total = problem.nodes[v].costs.copy()
        for u, costs in around[v]:
            total += costs[:, out[u]]
        best = int(total.argmin())
        if total[best] < total[out[v]]:
            out[v] = best
            waiting += [u for u, _ in around[v] if u not in waiting]
    return out
