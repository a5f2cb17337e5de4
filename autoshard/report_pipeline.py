"""How does the plan of a pipeline read?  `report(plan)`: one screen of plain text.

The step and its memory first, then the stages in numbers, the timeline, and what it beat.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from autoshard.columns import bar, columns
from autoshard.pipeline_data import timeline_of
from autoshard.report import WIDTH, notes
from autoshard.timeline_text import lines as timeline_lines
from cost_models.units import format_bytes, format_flops, format_seconds
from passes.ir.pipeline_plan import Piece, PipelinePlan
from passes.pipeline.timeline import Timeline

_MOST_LOST, _MOST_STAGES = 8, 16


def report(plan: PipelinePlan) -> str:
    """The plan on one screen; the same plan gives the same text."""
    timeline = timeline_of(plan)
    sections = (
        head(plan, timeline),
        _pieces(plan),
        _timeline(timeline),
        _lost(plan),
        notes(plan.notes),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def head(plan: PipelinePlan, timeline: Timeline) -> list[str]:
    """Cluster, mesh, schedule, step time, memory."""
    cost, chip = plan.cost, plan.cluster["chip"]
    name = f"{plan.cluster['name']}:{'x'.join(map(str, plan.cluster['shape']))}"
    step = bar([max(timeline.busy)], cost.step_time, "#")
    room = bar([cost.peak_memory], plan.memory_limit, "#")
    inside = " ".join(f"{n}={s}" for n, s in plan.axes)
    chunks = f", {plan.chunks} chunks of the model on each" if plan.chunks > 1 else ""
    rate = cost.flops / cost.step_time
    lines = [
        ("cluster", f"{name}, {plan.devices} x {chip['name']}"),
        ("mesh", f"{inside}{chunks}"),
        ("schedule", f"{plan.table.name}, {plan.microbatches} microbatches"),
        (
            "step",
            f"{format_seconds(cost.step_time):>8}  {step}  "
            f"{format_seconds(max(timeline.busy))} at work (#), bubble {timeline.bubble:.1%}",
        ),
        ("update", f"{format_seconds(max(plan.tails))} after the last task: {_update(plan)}"),
        (
            "memory",
            f"{format_bytes(cost.peak_memory):>8}  {room}  "
            f"{cost.peak_memory / plan.memory_limit:.0%} of {format_bytes(plan.memory_limit)} on "
            "the fullest device",
        ),
        ("work", f"{format_flops(cost.flops)} on each device, {format_flops(rate)}/s"),
        ("runs as", "a program for each task, one controller; one program on several hosts"),
    ]
    return [plan.name, *columns(lines, "ll", "  ")]


def _update(plan: PipelinePlan) -> str:
    """What is done then."""
    if not any(p.spared for p in plan.pieces):
        return "gradients and weights"
    return f"gradients and weights, optimizer state over {plan.groups} groups"


def _pieces(plan: PipelinePlan) -> list[str]:
    """A line for each run of pieces with one plan."""
    rows: list[tuple[str, ...]] = [("pieces", "F", "B", "W", "weights", "activations", "sends")]
    for first, last, p in _runs(plan.pieces):
        rows.append(
            (
                f"  {first}" if first == last else f"  {first} to {last}",
                *(format_seconds(s) for s in (p.forward, p.backward, p.weight)),
                format_bytes(p.lying),
                format_bytes(p.activation),
                format_bytes(p.sent),
            )
        )
    left = len(rows) - 1 - _MOST_STAGES
    shown = columns(rows[: _MOST_STAGES + 1], "lrrrrrr", "")
    return [*shown, f"  and {left} more"] if left > 0 else shown


def _runs(pieces: Sequence[Piece]) -> Iterator[tuple[int, int, Piece]]:
    first = 0
    for k, p in enumerate(pieces):
        if k + 1 == len(pieces) or pieces[k + 1] != p:
            yield first, k, p
            first = k + 1


def _timeline(timeline: Timeline) -> list[str]:
    if timeline.schedule.devices > _MOST_STAGES:
        return []
    return [*timeline_lines(timeline, WIDTH)]


def _lost(plan: PipelinePlan) -> list[str]:
    if not plan.alternatives:
        return []
    rows = []
    for a in plan.alternatives[:_MOST_LOST]:
        step = format_seconds(a.cost.step_time) if a.cost else ""
        memory = format_bytes(a.cost.peak_memory) if a.cost else ""
        mesh = " ".join(f"{n}={s}" for n, s in a.mesh)
        rows.append((a.solver, mesh, step, memory, textwrap.shorten(a.note, 40)))
    left = len(plan.alternatives) - _MOST_LOST
    more = [f"  and {left} more"] if left > 0 else []
    return ["instead of", *columns(rows, "llrrl", "  "), *more]
