"""What is the best choice of a small core, exactly?  OR-tools' CP-SAT, memory rows and all.

The only file that knows OR-tools; they are imported when first needed (0.2 s). With a 0/1 variable
x_vi per choice and y_uvij per finite pair of each edge,

    minimise    sum cost_v[i] x_vi + sum cost_uv[i, j] y_uvij
    one_each    sum_i x_vi = 1                                 for each node
    marginals   sum_j y_uvij = x_ui,  sum_i y_uvij = x_vj      for each edge
    memory      sum usage_v[i] x_vi <= slack                   for each row

CP-SAT reckons in integers, so its answer and its bound are exact; its budget is deterministic time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from passes.solve.memory import Indices
from passes.solve.problem import Costs
from passes.solve.reduction import Core

# Integers beyond this are too large for CP-SAT to add up safely.
_LARGEST = 2.0**56


@dataclass(frozen=True, slots=True)
class Exact:
    """What CP-SAT found. choice: None when nothing was. bound: of the core, inf when infeasible."""

    choice: Indices | None
    bound: float
    work: float


def best_choice(  # noqa: C901 (one model, built top to bottom)
    core: Core, *, hint: Indices | None, upper: float, work: float, seconds: float | None = None
) -> Exact:
    """The best choice of a core under its memory rows, within so much deterministic time.

    upper: choices that cost more than this are of no interest (infinite for none).
    """
    from ortools.sat.python import cp_model

    tables = {(v, u): t for v, around in enumerate(core.links) for u, t in around.items() if v < u}
    every = [*core.unary, *tables.values()]
    lows = [float(c.min()) for c in every]
    lowest = sum(lows)
    room = upper - core.constant - lowest
    scale = _scale(every, lows, room)

    model = cp_model.CpModel()
    choose = [[model.new_bool_var("") for _ in range(n)] for n in core.sizes]
    terms: list[object] = []
    weights: list[int] = []

    def price(literal: object, cost: float) -> None:
        whole = int(np.floor(cost * scale))
        if whole:
            terms.append(literal)
            weights.append(whole)

    for literals, costs, low in zip(choose, core.unary, lows, strict=False):
        model.add_exactly_one(literals)
        for literal, cost in zip(literals, (costs - low).tolist(), strict=True):
            if cost > room:
                model.add(literal == 0)
            else:
                price(literal, cost)
    for (v, u), table, low in zip(tables, tables.values(), lows[len(choose) :], strict=True):
        rows: list[list[object]] = [[] for _ in choose[v]]
        columns: list[list[object]] = [[] for _ in choose[u]]
        for (i, j), cost in np.ndenumerate(table - low):
            if cost <= room and np.isfinite(cost):
                pair = model.new_bool_var("")
                rows[i].append(pair)
                columns[j].append(pair)
                price(pair, cost)
        for pairs, literal in zip([*rows, *columns], [*choose[v], *choose[u]], strict=True):
            model.add(sum(pairs) == literal)  # type: ignore[arg-type]
    for literals_of_row, usages, slack in _rows(core):
        model.add(
            cp_model.LinearExpr.weighted_sum([choose[v][i] for v, i in literals_of_row], usages)
            <= slack
        )
    model.minimize(cp_model.LinearExpr.weighted_sum(terms, weights))
    if hint is not None:
        for literals, c in zip(choose, hint, strict=True):
            for i, literal in enumerate(literals):
                model.add_hint(literal, i == c)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = work
    solver.parameters.catch_sigint_signal = False
    if seconds is not None:
        solver.parameters.max_time_in_seconds = seconds
    status = solver.solve(model)
    # Making the model takes time too: about this much for each term.
    spent = float(solver.response_proto.deterministic_time) + 1e-5 * (len(terms) + sum(core.sizes))
    if status == cp_model.INFEASIBLE:
        return Exact(None, np.inf, spent)
    bound = core.constant + lowest + solver.best_objective_bound / scale
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Exact(None, bound, spent)
    choice = [next(i for i, x in enumerate(xs) if solver.boolean_value(x)) for xs in choose]
    return Exact(np.array(choice, dtype=np.intp), bound, spent)


def _scale(every: Sequence[Costs], lows: Sequence[float], room: float) -> float:
    """The power of two by which costs become integers that add up safely.

    Rounding is downwards, so that a bound stays one; whole costs of ordinary size stay exact.
    """
    most = 1.0
    whole = True
    for costs, low in zip(every, lows, strict=True):
        rest = costs[np.isfinite(costs)] - low
        rest = rest[rest <= room]
        most += float(rest.max(initial=0.0))
        whole = whole and bool((rest == np.floor(rest)).all())
    if whole and most <= _LARGEST:
        return 1.0
    return float(2.0 ** np.floor(np.log2(_LARGEST / most)))


def _rows(core: Core) -> list[tuple[list[tuple[int, int]], list[int], int]]:
    """Per memory row: which choices take how many bytes of the slack, in integers."""
    peak = max(1.0, float(core.slack.max(initial=0.0)))
    whole = all((x == np.floor(x)).all() for own in core.spans for _, _, x in own)
    scale = 1.0 if whole else float(2.0 ** np.floor(np.log2(2.0**50 / peak)))
    taken: list[dict[tuple[int, int], int]] = [{} for _ in core.slack]
    for v, own in enumerate(core.spans):
        for begin, end, usages in own:
            # Rounded down, a usage may be one short: whoever asked checks the answer again.
            for i, n in enumerate(np.floor(usages * scale).astype(np.int64).tolist()):
                for row in range(begin, end) if n else ():
                    taken[row][v, i] = taken[row].get((v, i), 0) + n
    room = np.floor(core.slack * scale).astype(np.int64).tolist()
    return [(list(t), list(t.values()), r) for t, r in zip(taken, room, strict=True)]
