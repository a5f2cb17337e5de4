"""What does `autoshard solve` print and write of a solution?  In exact numbers, counted again."""

from __future__ import annotations

import json
import math

from autoshard.columns import columns
from cost_models.units import format_bytes
from passes.solve.meter import Progress
from passes.solve.problem import Problem, Solution
from passes.solve.recount import Count, Exact, recount


class NoSolution(ValueError):
    """No choice fits, or none was found: the sentence says which, and what is missing."""


def counted(problem: Problem, solution: Solution) -> Count:
    """Cost and peak of the solution in exact numbers; raises NoSolution where it has no choice."""
    if solution.choice or not problem.nodes:
        return recount(problem, solution.choice)
    what = problem.name or "the problem"
    short = solution.shortage
    if short is not None:
        most = ", ".join(str(problem.nodes[n].label or n) for n in short.nodes[:4])
        raise NoSolution(
            f"nothing fits in the limit of {what}: at time {short.time} even the smallest choices "
            f"take {short.needed:.17g}, {short.short:.17g} more than {short.limit:.17g}; the "
            f"largest are those of nodes {most}"
        )
    if solution.status == "infeasible":
        raise NoSolution(f"no choices of {what} may be taken together within its limit")
    ended = "time" if solution.stopped == "time" else "its budget of work"
    raise NoSolution(
        f"no choice of {what} was found that fits before {ended} ran out; a longer --time-limit "
        "may find one"
    )


def bound_of(solution: Solution, count: Count) -> Exact:
    """The bound as a number that is surely none too high: whole where the cost is."""
    if solution.status == "optimal":
        return count.cost
    whole = isinstance(count.cost, int) and math.isfinite(solution.bound)
    return math.floor(solution.bound) if whole else solution.bound


def gap_of(cost: Exact, bound: Exact) -> float:
    """Distance of cost from bound, relative to the cost; infinite without a bound."""
    if bound >= cost:
        return 0.0
    return math.inf if bound == -math.inf else (cost - bound) / abs(cost or 1)


def as_text(problem: Problem, solution: Solution, count: Count) -> str:
    """Cost, bound, gap and peak, and how the search ended."""
    bound = bound_of(solution, count)
    limit = "no limit" if problem.limit is None else f"of {_number(problem.limit)}"
    rows = [
        ("cost", str(count.cost), ""),
        ("bound", str(bound), "no choice costs less"),
        ("gap", f"{gap_of(count.cost, bound):.4%}", _ended(solution)),
        ("peak", str(count.peak), f"{limit}; {format_bytes(count.peak)} if it is bytes"),
    ]
    size = f"{len(problem.nodes)} nodes, {len(problem.edges)} edges"
    return "\n".join([f"{problem.name or 'problem'}: {size}", *columns(rows, "lrl", "  ")])


def as_json(solution: Solution, count: Count) -> str:
    """{"cost", "bound", "gap", "peak", "solution"}, one choice per node."""
    bound = bound_of(solution, count)
    body = {
        "cost": count.cost,
        "bound": bound if math.isfinite(bound) else None,
        "gap": gap_of(count.cost, bound) if math.isfinite(bound) else None,
        "peak": count.peak,
        "solution": list(solution.choice),
    }
    return json.dumps(body) + "\n"


def as_progress(now: Progress) -> str:
    """One line while it runs."""
    best = f"{now.cost:.6g}" if math.isfinite(now.cost) else "none yet"
    bound = f"{now.bound:.6g}" if math.isfinite(now.bound) else "none yet"
    gap = f", gap {now.gap:.3%}" if math.isfinite(now.gap) else ""
    return f"best {best}, bound {bound}{gap}"


def _ended(solution: Solution) -> str:
    return {
        "proven": "optimal" if solution.status == "optimal" else "",
        "good": "small enough to stop",
        "work": "the search stopped at its budget of work",
        "time": "the search stopped at its time limit: another machine may get further",
        "interrupted": "interrupted: the best so far",
    }.get(solution.stopped, "")


def _number(x: float) -> str:
    return str(int(x)) if x == int(x) else str(x)
