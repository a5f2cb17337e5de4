"""Where does the communication of a plan come from, and what did the plan beat?  Two tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from autoshard.columns import columns, cut
from cost_models.units import format_bytes, format_seconds
from passes.hints import path_of
from passes.ir.plan import Alternative, Cost, Move, Plan
from passes.ir.text import line_text

WIDTH = 100
_MOST_LINES, _MOST_LOST, _MOST_MESHES = 8, 9, 3


# Communication


def communication(plan: Plan) -> list[str]:
    """Collectives by kind, mesh axis and source line, the longest first."""
    if not plan.cost.comm_time:
        alone = plan.mesh_axes.devices > 1 and not any(op.strategy for op in plan.ops)
        return ["communication  none" + (": every device does the whole work" if alone else "")]
    moves = [move for op in plan.ops for move in op.collectives]
    return ["communication, by source line", *moves_table(moves, plan.cost.comm_time)]


def moves_table(found: Sequence[Move], total: float, most: int = _MOST_LINES) -> list[str]:
    """A line for each kind, mesh axis and source line; total: seconds that are 100%."""
    groups: dict[tuple[str, tuple[str, ...], str], list[Move]] = {}
    for move in found:
        groups.setdefault((move.kind, move.axes, move.source), []).append(move)
    order = sorted(groups.items(), key=lambda item: (-_seconds(item[1]), item[0]))
    lines = [
        (
            format_seconds(_seconds(moves)),
            f"{_seconds(moves) / total:.0%}",
            f"{kind} {'+'.join(axes)}",
            f"x{sum(m.trips for m in moves):g}",
            format_bytes(sum(m.nbytes * m.trips for m in moves)),
            line_text(source),
        )
        for (kind, axes, source), moves in order[:most]
    ]
    table = columns(lines, "rrlrrl", "  ")
    at = max(map(len, table), default=0) + 2
    out = [
        f"{line:<{at}}{moved(moves, WIDTH - at)}".rstrip()
        for line, (_, moves) in zip(table, order, strict=False)
    ]
    left = [moves for _, moves in order[most:]]
    if left:
        seconds = sum(map(_seconds, left))
        out.append(f"  and {len(left)} more: {format_seconds(seconds)}, {seconds / total:.0%}")
    return out


def _seconds(moves: Sequence[Move]) -> float:
    return sum(m.seconds * m.trips for m in moves)


def moved(moves: Sequence[Move], most: int) -> str:
    """What they move: the value that takes longest, layers' indices left out, and how many more."""
    times: dict[str, float] = {}
    names: dict[str, list[str]] = {}
    for m in moves:
        masked = _masked(m.value)
        names.setdefault(masked, []).append(m.value)
        times[masked] = times.get(masked, 0.0) + m.seconds * m.trips
    order = sorted(times, key=lambda name: (-times[name], name))
    more = f" +{len(order) - 1}" if len(order) > 1 else ""
    name, room = values_text(names[order[0]]), max(most - len(more), 12)
    if " of " not in name and len(name) > room:  # of a path its end tells most
        return ".." + name[2 - room :] + more
    return cut(name, room) + more


def values_text(names: Sequence[str]) -> str:
    """Values whose paths differ in indices only, as one; a name that is no path stays as it is.

    >>> values_text(["p[0]['h'][3]['wq']", "p[0]['h'][4]['wq']"])
    'p/0/h/*/wq'
    >>> values_text(["f32[8,4] of dot_general"])
    'f32[8,4] of dot_general'
    """
    if " of " in names[0]:
        return names[0]
    parts = zip(*(path_of(name).split("/") for name in names), strict=True)
    return "/".join(same[0] if len(set(same)) == 1 else "*" for same in parts)


def _masked(name: str) -> str:
    return name if " of " in name else re.sub(r"(?<=/)\d+(?=/|$)", "*", path_of(name))


# What lost


def lost(plan: Plan) -> list[str]:
    """The best alternatives and why they lost: other meshes, and each baseline at its best."""
    shown = list(_worth_showing(plan))
    lines = [
        (
            names,
            " ".join(f"{n}={s}" for n, s in a.mesh),
            format_seconds(a.cost.step_time) if a.cost else "-",
            _ratio(a.cost, plan.cost),
            format_bytes(a.cost.peak_memory) if a.cost else "-",
            why_lost(a, plan),
        )
        for names, a in shown
    ]
    return ["instead of this", *columns(lines, "llrrrl", "  ")] if lines else []


def _worth_showing(plan: Plan) -> Iterator[tuple[str, Alternative]]:
    """Fitting ones first; no more than a few meshes of one solver, and nothing twice."""
    fitting = [a for a in plan.alternatives if fits(a, plan)]
    others = [a for a in plan.alternatives if not fits(a, plan)]
    names: dict[object, list[str]] = {}
    chosen: dict[object, Alternative] = {}
    count: dict[str, int] = {}
    for a in (*fitting, *others):
        look = (_long(a.mesh), a.cost or a.note)
        if a.solver == plan.solver and look == (_long(plan.mesh), plan.cost):
            continue
        if count.get(a.solver, 0) >= (_MOST_MESHES if a.solver == plan.solver else 1):
            continue
        chosen.setdefault(look, a)
        if a.solver not in names.setdefault(look, []):
            names[look].append(a.solver)
            count[a.solver] = count.get(a.solver, 0) + 1
    for key, a in list(chosen.items())[:_MOST_LOST]:
        yield ", ".join(names[key]), a


def _long(mesh: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """The axes that have more than one device; the others are there for hints that name them."""
    return tuple(axis for axis in mesh if axis[1] > 1)


def fits(a: Alternative, plan: Plan) -> bool:
    """Whether it could be run at all."""
    return a.cost is not None and a.cost.peak_memory <= plan.memory_limit


def _ratio(theirs: Cost | None, ours: Cost) -> str:
    return f"{theirs.step_time / ours.step_time:.2f}x" if theirs and ours.step_time else ""


def why_lost(a: Alternative, plan: Plan) -> str:
    """One short reason."""
    if a.cost is None:
        return a.note or "not feasible"
    if a.cost.peak_memory > plan.memory_limit:
        return f"does not fit in {format_bytes(plan.memory_limit)}"
    more = {
        "communication": a.cost.comm_time - plan.cost.comm_time,
        "compute": a.cost.compute_time - plan.cost.compute_time,
    }
    what = max(more, key=more.__getitem__)
    if a.cost.step_time <= plan.cost.step_time * (1 + 1e-9):
        return "costs the same"
    return f"{format_seconds(more[what])} more {what}"
