"""What lies on a device that runs the stages of a pipeline, and in which form?  `layout_of`.

  buffers  values on their way between tasks, of microbatches that are under way
  weights  what tasks take that is there before the loop, for each stage its own
  parts    what tasks take a microbatch's part of: all parts, for each stage those that it takes
  results  what comes after the loop needs of it: sums that are added to (ADDED), what is the same
           for all microbatches (KEPT), what each of them makes (STACKED)

A form is a shape and a dtype; for results with the word before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from autoshard.spmd_rows import Rows, rows_of
from autoshard.spmd_tables import Form, Tables, form_of, needs_of, tables_of
from autoshard.stage_programs import (
    Part,
    StagePrograms,
    outside_of,
    parts_of_tasks,
    stage_programs,
    sums_of,
)
from autoshard.step import local_shape
from autoshard.time_loop import Program, wide
from passes.pipeline.schedule import Schedule
from passes.pipeline.ticks import Ticks, in_ticks
from passes.stages import Stages
from passes.time_axis import Split

ADDED, KEPT, STACKED = "added", "kept", "stacked"


@dataclass(frozen=True)
class Layout:
    """All of it.

    apart: several pieces of a device may share a branch, and the tables tell their rows. tiled: the
    devices lay arrays out in tiles, in an order of dims that the compiler chooses.
    """

    program: Program
    made: StagePrograms
    schedule: Schedule
    ticks: Ticks
    tables: Tables
    weights: Rows
    parts: Rows
    results: Rows
    apart: bool
    tiled: bool

    @property
    def buffers(self) -> tuple[Form, ...]:
        """The forms of the buffers."""
        return tuple(self.tables.slots)

    @property
    def buffer_bytes(self) -> int:
        """What the buffers take on each device."""
        return sum(many * nbytes(form) for form, many in self.tables.slots.items())

    @property
    def buffer_bytes_needed(self) -> tuple[int, ...]:
        """What of the buffers each device needs at most."""
        held = self.tables.held.items()
        return tuple(
            sum(each[d] * nbytes(form) for form, each in held) for d in range(self.schedule.devices)
        )


def layout_of(program: Program, stages: Stages, schedule: Schedule, tiled: bool) -> Layout:
    """The layout of a program in stages."""
    made = stage_programs(program, stages)
    ticks = in_ticks(schedule, needs_of(made))
    own, way = [made.of(piece) for piece in range(stages.count)], schedule.ways[0]
    needed = [
        [*sums_of(tasks), *(p for t in tasks for p in t.outs if p in made.after)] for tasks in own
    ]
    added = {p for tasks in own for p in sums_of(tasks)}

    def weight(p: int) -> Form:
        return program.avals[p].shape, program.avals[p].dtype

    def parts(part: Part) -> Form:
        aval = program.avals[part[0]]
        local = local_shape(aval.shape, part[1], program.steps)
        return (schedule.microbatches, *local), aval.dtype

    def result(p: int) -> tuple[str, Form]:
        shape, dtype = form_of(program, p)
        if p in added:
            return ADDED, (shape, wide(dtype))
        if isinstance(program.views[p], Split):
            return STACKED, ((schedule.microbatches, *shape), dtype)
        return KEPT, (shape, dtype)

    return Layout(
        program,
        made,
        schedule,
        ticks,
        tables_of(made, ticks),
        rows_of(way, [outside_of(tasks) for tasks in own], weight),
        rows_of(way, [parts_of_tasks(tasks) for tasks in own], parts),
        rows_of(way, [list(dict.fromkeys(each)) for each in needed], result),
        apart=len(way) > schedule.devices,
        tiled=tiled,
    )


def nbytes(form: Form) -> int:
    """What a value of this form takes."""
    aval = jax.ShapeDtypeStruct(*form)
    return int(aval.size) * int(getattr(aval.dtype, "itemsize", 4))


def places(rows: Rows, piece: int, values: Sequence[Any]) -> list[tuple[int, int]]:
    """Of each value of a piece which array it lies in, and which of the piece's rows there."""
    forms = list(rows.count)
    found = [rows.of[piece, p] for p in values]
    return [(forms.index(form), k) for form, k in found]
