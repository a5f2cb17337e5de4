"""What is the cheapest choice per node?  `solve(problem) -> Solution`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from passes.solve import eliminate
from passes.solve.problem import INFINITY, Costs, Problem, Shortage, Solution, check

_LARGEST = 4e6  # entries of the largest table we are willing to make


def solve(
    problem: Problem,
    *,
    starts: Sequence[Sequence[int]] = (),
    work: float | None = None,
    time_limit: float | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> Solution:
    """The cheapest feasible choice found, never worse than the best feasible start."""
    check(problem)
    shortage = find_shortage(problem)
    if shortage is not None:
        return Solution((), np.inf, np.inf, 0.0, "infeasible", shortage=shortage)
    unary = [_open(n.costs) for n in problem.nodes]
    tables = _merge(problem)
    best: tuple[int, ...] = ()
    cost = np.inf
    for start in starts:
        if problem.feasible(start) and problem.cost(start) < cost:
            best, cost = tuple(start), problem.cost(start)
    if not problem.nodes:
        return Solution((), 0.0, 0.0, 0.0, "optimal")
    around: dict[int, set[int]] = {v: set() for v in range(len(unary))}
    for u, v in tables:
        around[u].add(v)
        around[v].add(u)
    order = eliminate.plan_order([len(c) for c in unary], around)
    bound = sum(float(c.min()) for c in unary) + sum(float(t.min()) for t in tables.values())
    if order.largest <= _LARGEST:
        penalty = 0.0
        for _ in range(30):
            priced = [c.copy() for c in unary]
            for v, node in enumerate(problem.nodes):
                for use in node.uses:
                    priced[v] += penalty * use.usages * max(use.end - use.begin, 0)
            value, choice = eliminate.minimise(order, priced, tables)
            if not penalty:
                bound = value
            if problem.feasible(choice) and problem.cost(choice) < cost:
                best, cost = tuple(choice), problem.cost(choice)
            if best:
                break
            penalty = penalty * 4 if penalty else 1e-3
    if bound == np.inf:
        return Solution((), np.inf, np.inf, 0.0, "infeasible")
    if not best:
        return Solution((), np.inf, bound, 0.0, "unknown", stopped="work")
    peak = float(problem.memory(best).max(initial=0.0))
    status = "optimal" if cost <= bound else "feasible"
    return Solution(best, cost, min(bound, cost), peak, status)


def _open(costs: Costs) -> Costs:
    """With numpy's infinity for what may not be chosen."""
    return np.where(costs >= INFINITY, np.inf, costs)


def _merge(problem: Problem) -> dict[tuple[int, int], Costs]:
    """One matrix for each pair of nodes."""
    out: dict[tuple[int, int], Costs] = {}
    for edge in problem.edges:
        u, v, costs = edge.u, edge.v, _open(edge.costs)
        if u > v:
            u, v, costs = v, u, costs.T
        out[u, v] = out[u, v] + costs if (u, v) in out else costs
    return out


def find_shortage(problem: Problem) -> Shortage | None:
    """The time step that is worst off when every node takes its smallest choice, if too large."""
    if problem.limit is None:
        return None
    steps = max((use.end for n in problem.nodes for use in n.uses), default=0)
    change = np.zeros(steps + 1)
    smallest = [[float(use.usages.min()) for use in n.uses] for n in problem.nodes]
    for node, least in zip(problem.nodes, smallest, strict=True):
        for use, n in zip(node.uses, least, strict=True):
            if use.begin < use.end:
                change[use.begin] += n
                change[use.end] -= n
    memory = np.cumsum(change)[:steps]
    if memory.max(initial=0.0) <= problem.limit:
        return None
    time = int(memory.argmax())
    held = {
        v: sum(n for use, n in zip(node.uses, least, strict=True) if use.begin <= time < use.end)
        for v, (node, least) in enumerate(zip(problem.nodes, smallest, strict=True))
    }
    nodes = sorted((v for v, n in held.items() if n > 0), key=lambda v: (-held[v], v))
    return Shortage(
        time, float(memory[time]), problem.limit, tuple(nodes), tuple(held[v] for v in nodes)
    )
