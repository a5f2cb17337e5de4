"""Why is it split so?  `explain(plan, found, glob)`: hints, prices of other choices, memory.

The glob names arguments or results by path (`params/**/wq`), or values by the line that makes or
annotates them (`train.py:14`).
"""

from __future__ import annotations

import ast
import difflib
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autoshard.alike import mirrors, rows, type_text
from autoshard.columns import columns
from autoshard.report import hint_text
from autoshard.report_costs import moves_table
from cost_models.cluster import Cluster
from cost_models.units import format_bytes, format_seconds
from passes.answer import changes, op_strategies, value_axes
from passes.assemble import moves_of
from passes.held import Held, held, memory
from passes.hints import HintError, match, named, nearest, path_of
from passes.ir.graph import Graph, Hint, short_dtype
from passes.ir.plan import Axes, Cost, Plan, TensorPlan
from passes.ir.sharding import Sharding
from passes.ir.text import line_text
from passes.propagate import propagate
from passes.search import Found, search
from passes.what_if import WhatIf, touching, what_if, without_limit
from passes.worth import moment

Progress = Callable[[str], None]
_WIDTH = 100
_MOST_TARGETS, _MOST_OTHERS, _MOST_HELD, _MOST_MOVES = 4, 6, 5, 6


@dataclass(frozen=True, slots=True)
class Target:
    """A value to explain: how to call it, its type and sharding, how many are like it."""

    path: str
    type: str
    count: int
    value: int


def explain(plan: Plan, found: Found | None, glob: str, progress: Progress | None = None) -> str:
    """The explanation of all values that the glob names, those that are alike only once.

    found: what the search knew; without it (a plan that was read back) only what is in the plan is
    told. Raises HintError, with the nearest names, for a glob that names nothing.
    """
    if found is None:
        return _from_plan_alone(plan, glob)
    targets = _targets(plan, found, glob)
    told: dict[int, str] = {}
    parts = []
    for t in targets[:_MOST_TARGETS]:
        group = found.priced.decisions.group_of[t.value]
        if group in told:
            parts.append([_title(t), f"  why   one decision with {told[group]}"])
        else:
            parts.append(_one(found, t, progress))
        told.setdefault(group, t.path)
    if targets[_MOST_TARGETS:]:
        left = ", ".join(t.path for t in targets[_MOST_TARGETS:][:3])
        more = len(targets) - _MOST_TARGETS
        parts.append([f"and {more} more ({left}{', ..' if more > 3 else ''}): narrow the glob"])
    parts.append(_memory(found, targets[0], progress))
    if found.plan.cost != plan.cost:
        parts.append(
            [
                f"This was found by searching again; the plan itself says "
                f"{format_seconds(plan.cost.step_time)} and {format_bytes(plan.cost.peak_memory)}."
            ]
        )
    return "\n\n".join("\n".join(_within(line) for line in lines) for lines in parts)


def _within(line: str) -> str:
    """The line, broken where it is wider than a screen."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    wrapped = textwrap.wrap(line, _WIDTH, subsequent_indent=indent, drop_whitespace=False)
    return line if len(line) <= _WIDTH else "\n".join(w.rstrip() for w in wrapped)


def search_again(plan: Plan, graph: Graph, state: Sequence[tuple[int, int]]) -> Found:
    """The search on the plan's own mesh once more, for a plan that was read back and bound.

    A hint given from outside is known by its effect only, so that it closes dims it left open.
    """
    names = [tensor.name for tensor in plan.arguments]
    origins = {t.origin for t in plan.arguments if t.origin.startswith("hints[")}
    meant = {origin: set(named(_glob(origin), names)) for origin in origins}
    outside = [
        Hint(v, tensor.spec, tensor.origin)
        for k, (v, tensor) in enumerate(zip(graph.inputs, plan.arguments, strict=True))
        if k in meant.get(tensor.origin, ())
    ]
    return search(
        graph,
        Cluster.from_dict(plan.cluster),
        mesh=plan.mesh_axes,
        hints=[*graph.hints, *outside],
        memory_limit=plan.memory_limit,
        solver=plan.solver,
        state=state,
        fused_attention=plan.fused_attention,
    )


def _glob(origin: str) -> str:
    """The glob of a hint given from outside. Values tied to the one it means have it as origin."""
    return str(ast.literal_eval(origin[len("hints[") : -1]))


# What the glob names


def _targets(plan: Plan, found: Found, glob: str) -> list[Target]:
    graph = found.priced.graph
    for tensors, values in ((plan.arguments, graph.inputs), (plan.results, graph.outputs)):
        places = named(glob, [t.name for t in tensors])
        if places:
            copies = {k for m in mirrors(tensors) for _, k in m.pairs}
            lines = rows(tensors, places, names=False)
            lines.sort(key=lambda r: (r.first in copies, r.first))  # parameters before moments
            return [Target(r.path, r.type, r.count, values[r.first]) for r in lines]
    made = _made_at(graph, glob)
    if not made:
        raise HintError(_nothing(graph, glob))
    split = value_axes(found.priced, found.solution.choice)
    largest = sorted(made, key=lambda v: (-graph.values[v].type.nbytes, v))
    out: dict[tuple[str, str], Target] = {}
    for v in largest:
        if graph.values[v].type.size > 1 or v == largest[0]:
            t = Target(_made_by(graph, v), _text(found, v, split[v]), 1, v)
            old = out.get((t.path, t.type))
            out[t.path, t.type] = replace(old, count=old.count + 1) if old else t
    return list(out.values())


def _made_at(graph: Graph, glob: str) -> list[int]:
    """Values that an operation on a matching line makes, or that a matching line annotates."""
    out = [h.value for h in graph.hints if match(glob, h.origin)]
    for op in graph.ops:
        if not op.is_link and op.source and match(glob, op.source.partition(" ")[0]):
            out += op.outputs
    return list(dict.fromkeys(out))


def _nothing(graph: Graph, glob: str) -> str:
    said = f"{glob!r} names no argument, no result and no source line"
    lines = sorted({op.source.partition(" ")[0] for op in graph.ops if op.source})
    if ":" in glob and lines:
        return f"{said}; lines of the program are {', '.join(lines[:3])}, ..."
    return f"{said}; {nearest(graph, glob)}"


def _made_by(graph: Graph, v: int) -> str:
    """What to call a value without a path: `dot_general at train.py:14 (loss)`."""
    if graph.values[v].name:
        return path_of(graph.values[v].name)
    producer = graph.producers()[v]
    if producer < 0:
        return f"{graph.values[v].kind} {graph.values[v].type}"
    op = graph.ops[producer]
    return f"{op.name} at {line_text(op.source)}" if op.source else op.name


def _text(found: Found, v: int, axes: Axes) -> str:
    type = found.priced.graph.values[v].type
    return Sharding(axes).text(type.shape, short_dtype(type.dtype), found.priced.mesh)


# One value


def _title(t: Target) -> str:
    alike = f"  x{t.count}, the first one explained" if t.count > 1 else ""
    return f"{t.path}  {t.type}{alike}"


def _one(found: Found, t: Target, progress: Progress | None) -> list[str]:
    answer = what_if(found, t.value, progress=progress)
    lines = [_title(t), *columns([("why", _why(found, answer)), *_with(found, answer)], "ll", "  ")]
    lines += _provenance(found, t.value)
    lines += _others(found, answer)
    moves = [
        m
        for c in touching(found, t.value)
        for m in moves_of(found.priced, found.priced.graph.ops[c.op], c)
    ]
    if not moves:
        return [*lines, "  communication it takes part in: none"]
    table = moves_table(moves, found.plan.cost.comm_time, _MOST_MOVES)
    return [*lines, "  communication it takes part in", *(f"  {line}" for line in table)]


def _why(found: Found, answer: WhatIf) -> str:
    if answer.hints:
        origins = dict.fromkeys(h.origin for h in answer.hints)
        return f"fixed: {', '.join(map(hint_text, origins))}"
    if not answer.others:
        return "no other sharding is possible: the mesh divides none of its dims"
    if found.plan.solver == "ilp":
        return "no hint; the cheapest choice in the whole plan"
    return f"no hint; what {found.plan.solver} makes of it, nothing was searched"


def _with(found: Found, answer: WhatIf) -> list[tuple[str, str]]:
    """Other values of the same decision, the arguments by name."""
    graph = found.priced.graph
    if not answer.together:
        return []
    named = [path_of(graph.values[v].name) for v in answer.together if graph.values[v].name]
    shown, count = ", ".join(named[:3]), len(answer.together)
    text = f"{count} more value{'s' if count > 1 else ''}, decided together"
    return [
        ("with", f"{text}: {shown}{', ..' if count > len(named[:3]) else ''}" if shown else text)
    ]


def _provenance(found: Found, value: int) -> list[str]:
    """For a plan made by propagation: the way of every axis from a hint to here."""
    if found.plan.solver != "propagate":
        return []
    graph = found.priced.graph
    fixed = [h for g in found.priced.decisions.groups for h in g.hints]
    spread = propagate(graph, found.priced.mesh, dict.fromkeys([*graph.hints, *fixed]))
    out: list[str] = []
    for axis in found.priced.mesh.names:
        out += [f"  {line}" for line in spread.explain(value, axis).splitlines()]
    return out


def _others(found: Found, answer: WhatIf) -> list[str]:
    ours = found.plan.cost
    shown = answer.others[:_MOST_OTHERS]
    if not shown:
        return []
    table = [(_text(found, answer.value, o.axes), *_price(o.cost, o.fits, ours)) for o in shown]
    first = (f"now {_text(found, answer.value, answer.axes)}", *_price(ours, True, None))
    lines = [first, *((f"    {row[0]}", *row[1:]) for row in table)]
    left = len(answer.others) - len(shown) + answer.skipped
    more = [f"    and {left} more that look dearer"] if left else []
    if any(o.fits and o.cost and o.cost.step_time < ours.step_time * (1 - 1e-4) for o in shown):
        more.append("    some are cheaper: the search ended before it had proven the optimum")
    head = "  without the hint it could be" if answer.hints else "  instead it could be"
    return [f"{head} (the rest of the plan following)", *columns(lines, "lrrrl", "  "), *more]


def _price(cost: Cost | None, fits: bool, ours: Cost | None) -> tuple[str, str, str, str]:
    if cost is None:
        return "", "", "", "not possible with the other hints"
    more = cost.step_time - ours.step_time if ours else 0.0
    same = ours is None or abs(more) <= 1e-6 * ours.step_time
    change = "" if same else f"{'+' if more > 0 else '-'}{format_seconds(abs(more))}"
    note = "" if fits else "does not fit"
    if same and ours is not None:
        change = "the same"
    return format_seconds(cost.step_time), change, format_bytes(cost.peak_memory), note


# Memory


def _memory(found: Found, t: Target, progress: Progress | None) -> list[str]:
    """Whether the limit binds, where memory is fullest, and what lies there."""
    plan, priced = found.plan, found.priced
    if progress:
        progress("without the memory limit")
    limit, peak = format_bytes(plan.memory_limit), format_bytes(plan.cost.peak_memory)
    values = value_axes(priced, found.solution.choice)
    changed = changes(
        priced, found.solution.choice, values, op_strategies(priced, found.solution.choice)
    )
    lying = list(held(priced, values, changed))
    taken = memory(priced, lying)
    time = int(taken.argmax())
    there = [h for h in lying if h.begin <= time < h.end]
    there.sort(key=lambda h: (-h.nbytes, h.value))
    where = moment(priced, time)
    lines = [
        f"memory {peak} of {limit}; {_binding(found, t)}",
        f"  fullest {where}, where {len(there)} arrays lie",
        *columns([_held_line(found, h) for h in there[:_MOST_HELD]], "rll", "    "),
    ]
    if left := sum(h.nbytes for h in there[_MOST_HELD:]):
        lines.append(f"    and {format_bytes(left)} more")
    if (elsewhere := sum(h.nbytes for h in there) - taken[time]) >= 1:
        place = "in VMEM" if priced.cluster.platform == "tpu" else "where a result will be"
        lines.append(f"    of them {format_bytes(elsewhere)} {place}")
    return lines


def _held_line(found: Found, h: Held) -> tuple[str, str, str]:
    graph = found.priced.graph
    what = _made_by(graph, h.value)
    return (
        format_bytes(h.nbytes),
        _text(found, h.value, h.axes),
        f"copy of {what}" if h.copy else what,
    )


def _binding(found: Found, t: Target) -> str:
    if found.plan.solver != "ilp":
        return "nothing was searched"
    free = without_limit(found)
    if free is None:
        return "the limit does not bind"
    cost, values = free
    text = (
        f"the limit binds: with {format_bytes(cost.peak_memory)} the step would take "
        f"{format_seconds(cost.step_time)}"
    )
    other = _text(found, t.value, values[t.value])
    return f"{text}, and {t.path} be {other}" if other != t.type else text


# Without the function


def _from_plan_alone(plan: Plan, glob: str) -> str:
    tensors = (*plan.arguments, *plan.results)
    chosen = [tensors[k] for k in named(glob, [t.name for t in tensors])]
    if not chosen:
        paths = list(dict.fromkeys(path_of(t.name) for t in tensors))
        near = difflib.get_close_matches(glob, paths, n=3, cutoff=0.0)
        raise HintError(
            f"{glob!r} names no argument and no result of this plan; the nearest are "
            f"{', '.join(near)}"
        )
    names = {t.name for t in chosen}
    moves = [m for op in plan.ops for m in op.collectives if m.value in names]
    lines = columns([_known(t) for t in chosen[:12]], "lll")
    if len(chosen) > 12:
        lines.append(f"and {len(chosen) - 12} more")
    if moves:
        table = moves_table(moves, plan.cost.comm_time, _MOST_MOVES)
        lines += ["", "communication that moves it", *table]
    return "\n".join(
        [
            *lines,
            "",
            "Prices of other choices need the function: plan.bind(fn, *args).explain(...)",
        ]
    )


def _known(t: TensorPlan) -> tuple[str, str, str]:
    return path_of(t.name), type_text(t), hint_text(t.origin) or "no hint"


__all__ = ["explain", "search_again"]
