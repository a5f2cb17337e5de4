"""How does a plan read?  `report(plan)`: one screen of plain text, no wider than a hundred columns.

Predicted step time and memory first, then which of the user's lines cause communication, how the
arguments are split (arrays that are alike in one line), and what else was considered.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from autoshard.alike import Mirror, Path, Row, counterparts, local_bytes, mirrors, rows
from autoshard.columns import bar, columns, cut
from autoshard.report_costs import communication, lost
from cost_models.units import format_bytes, format_flops, format_seconds
from passes.dims_loop import over_dims
from passes.hints import path_of
from passes.ir.graph import short_dtype
from passes.ir.plan import Plan, TensorPlan
from passes.time_hints import BLOCK

WIDTH = 100
_MOST_ROWS, _MOST_RESULTS, _MOST_NOTES, _LEAST_PATH = 18, 6, 4, 24


def report(plan: Plan) -> str:
    """The plan on one screen; the same plan gives the same text."""
    sections = (
        head(plan),
        communication(plan),
        arguments(plan),
        results(plan),
        lost(plan),
        notes(plan.notes),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


# Head


def head(plan: Plan) -> list[str]:
    """Cluster, mesh, step time, memory, and how the plan was found."""
    cost, chip = plan.cost, plan.cluster["chip"]
    devices = plan.mesh_axes.devices
    limit = format_bytes(plan.memory_limit)
    waits = cost.step_time - cost.compute_time
    step = bar([cost.compute_time, waits], cost.step_time, "#-")
    room = bar([cost.peak_memory], plan.memory_limit, "#")
    rate = cost.flops / cost.step_time if cost.step_time else 0.0
    lines = [
        ("cluster", f"{cluster_name(plan)}, {devices} x {chip['name']}"),
        ("mesh", str(plan.mesh_axes)),
        *[("time", over) for over in _over_time(plan)],
        (
            "step",
            f"{format_seconds(cost.step_time):>8}  {step}  {format_seconds(cost.compute_time)} "
            f"compute (#), {format_seconds(waits)} waiting (-)",
        ),
        (
            "overlap",
            f"{format_seconds(cost.comm_time)} of communication; a step takes "
            f"{format_seconds(cost.bounds[0])} with all of it hidden, "
            f"{format_seconds(cost.bounds[1])} with none",
        ),
        (
            "memory",
            f"{format_bytes(cost.peak_memory):>8}  {room}  "
            f"{_percent(cost.peak_memory, plan.memory_limit)} of {limit} on each device",
        ),
        (
            "work",
            f"{format_flops(cost.flops)} on each device, {format_flops(rate)}/s; "
            f"each sends {format_bytes(cost.comm_bytes)}",
        ),
        ("found by", how_found(plan)),
        *(("compile", f"{k}={v}") for k, v in sorted(plan.compiler_options.items())),
    ]
    return [plan.name, *columns(lines, "ll", "  ")]


def _over_time(plan: Plan) -> list[str]:
    """`micro=8 over the batch`, for each axis that runs over time."""
    names = [path_of(t.name) for t in plan.arguments]
    lines = []
    for axis in plan.time_axes:
        over = over_dims(names, axis.dims) if axis.dims else "the batch"
        lines += [f"{axis.name}={axis.size} over {over}"] * (axis.size > 1)
    if plan.blocks > 1:
        lines.append(f"{BLOCK}={plan.blocks} over huge values")
    if plan.block_bytes:
        most = format_bytes(plan.block_bytes)
        lines.append(f"{BLOCK} over huge values, until one takes {most} on all devices together")
    return lines


def cluster_name(plan: Plan) -> str:
    """`h100:2x8`."""
    return f"{plan.cluster['name']}:{'x'.join(map(str, plan.cluster['shape']))}"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def how_found(plan: Plan) -> str:
    """Solver, status and gap in words."""
    if plan.status == "optimal":
        return f"{plan.solver}, proven optimal on this mesh"
    if plan.status == "feasible" and plan.gap >= 1:
        return f"{plan.solver}, how far above the optimum is not known"
    if plan.status == "feasible":
        return f"{plan.solver}, at most {max(plan.gap, 1e-3):.1%} above the optimum on this mesh"
    if plan.solver == "propagate":
        return "propagate: the hints alone, spread along the operations"
    return f"{plan.solver}, a baseline: nothing was searched"


# Arguments and results


def arguments(plan: Plan) -> list[str]:
    """How the arguments are split, those that are alike in one line."""
    if not plan.arguments:
        return ["arguments  none"]
    tensors, mesh = plan.arguments, dict(plan.mesh)
    found = mirrors(tensors)
    alike = {k for m in found for k in _same(m, tensors, tensors)}
    rest = rows(tensors, [k for k in range(len(tensors)) if k not in alike], mesh)
    rest = sorted([*rest, *_mirror_rows(plan, found, tensors)], key=lambda r: r.first)
    size = format_bytes(sum(local_bytes(t, mesh) for t in tensors))
    lines, more = _largest(rest, _MOST_ROWS)
    count = f"{len(tensors)} array{'s' if len(tensors) > 1 else ''}"
    return [f"arguments, {count}, {size} on each device", *_table(lines), *more]


def results(plan: Plan) -> list[str]:
    """How the results are split, where they do not take the place of an argument alike."""
    if not plan.results:
        return []
    found = counterparts(plan.results, plan.arguments)
    alike = {k for m in found for k in _same(m, plan.arguments, plan.results)}
    rest = [k for k in range(len(plan.results)) if k not in alike]
    lines = rows(plan.results, rest, dict(plan.mesh))
    lines = [*_mirror_rows(plan, found, plan.results, "**"), *lines]
    shown, more = _largest(sorted(lines, key=lambda r: r.first), _MOST_RESULTS)
    return ["results", *_table(shown), *more]


def _same(
    mirror: Mirror, originals: Sequence[TensorPlan], copies: Sequence[TensorPlan]
) -> list[int]:
    """Places of the copies that are split as their originals are."""
    return [b for a, b in mirror.pairs if originals[a].spec == copies[b].spec]


def _mirror_rows(
    plan: Plan, found: Sequence[Mirror], copies: Sequence[TensorPlan], below: str = "**"
) -> list[Row]:
    """One row for mirrors of one original that lie side by side, `opt/{mu,nu}/**  as params/**`."""
    groups: dict[tuple[Path, Path, bool, str], list[tuple[Mirror, list[int]]]] = {}
    for m in found:
        same = _same(m, plan.arguments, copies)
        if same:
            here = {copies[b].dtype for b in same}
            other = here - {plan.arguments[a].dtype for a, b in m.pairs if b in same}
            kind = short_dtype(min(here)) if other and len(here) == 1 else ""
            key = (m.original, m.copy[:-1], len(same) == len(m.pairs), kind)
            groups.setdefault(key, []).append((m, same))
    out = []
    for (_, _, whole, kind), members in groups.items():
        names = [m.copy[-1] for m, _ in members]
        last = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
        mirror = members[0][0]
        text = f"as {'/'.join(mirror.original)}/{below}"
        text += f" in {kind}" if kind else ""
        text += "" if whole else ", but for those listed here"
        places = [k for _, same in members for k in same]
        size = sum(local_bytes(copies[k], dict(plan.mesh)) for k in places)
        path = "/".join((*mirror.copy[:-1], last, below))
        out.append(Row(path, text, len(places), size, "", min(places), True))
    return out


def _largest(found: list[Row], most: int) -> tuple[list[Row], list[str]]:
    """The rows that take most memory, in their order, and a line about the others."""
    if len(found) <= most:
        return found, []
    by_size = sorted(found, key=lambda r: (not r.origin, not r.type.startswith("as "), -r.nbytes))
    kept = {id(r) for r in by_size[: most - 1]}
    left = [r for r in found if id(r) not in kept]
    count, size = sum(r.count for r in left), format_bytes(sum(r.nbytes for r in left))
    split = sum(r.count for r in left if r.split)
    said = f"{split} of them split" if split else "none of them split"
    return [r for r in found if id(r) in kept], [f"  and {count} smaller arrays, {size}, {said}"]


def _table(found: Sequence[Row]) -> list[str]:
    rest = [
        (
            r.type,
            f"x{r.count}" if r.count > 1 else "",
            format_bytes(r.nbytes),
            hint_text(r.origin),
        )
        for r in found
    ]
    # Paths get the room that the other columns leave.
    taken = max((len(line) for line in columns(rest, "lrrl", "    ", 999)), default=0)
    room = max(WIDTH - taken, _LEAST_PATH)
    lines = [(cut(r.path, room), *row) for r, row in zip(found, rest, strict=True)]
    return columns(lines, "llrrl", "  ", WIDTH)


def hint_text(origin: str) -> str:
    """Who fixed it: `hints['params/*']`, `hint train.py:14`, or nothing."""
    return origin if origin.startswith("hints[") or not origin else f"hint {origin}"


# Notes


def notes(found: Sequence[str]) -> list[str]:
    """What the user should know, wrapped."""
    if not found:
        return []
    out = ["notes"]
    for note in found[:_MOST_NOTES]:
        out += textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="    ")
    left = len(found) - _MOST_NOTES
    return [*out, f"  and {left} more"] if left > 0 else out
