"""What does a controller do otherwise than asked for?  A sentence for each such thing.

Nothing of it changes a result; it takes memory, or time, that the table does not show.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoshard.stage_programs import StagePrograms, parts_of_tasks
from autoshard.step import local_shape
from passes.pipeline.schedule import Schedule


def not_moved(schedule: Schedule, table: Sequence[float], here: Sequence[float]) -> tuple[str, ...]:
    """Of a schedule that offloads, on devices that reach no other memory.

    table, here: per device the peak of the table, and the one without its transfers.
    """
    if not any(schedule.transfers):
        return ()
    return (
        f"{schedule.name} offloads activations, but the devices reach no memory of a host besides "
        f"their own: all stay there, and a device holds those of up to {max(here):g} microbatches "
        f"of a piece instead of {max(table):g}",
    )


def held_whole(made: StagePrograms, sizes: Sequence[int]) -> tuple[str, ...]:
    """Of parts of the batch that do not divide over the devices of a stage. sizes: of the stages.

    Stages with the same part and as many devices are named together.
    """
    program, found = made.program, dict[tuple[str, int, int, int], list[int]]()
    inputs = zip(program.inputs, program.loop.graph.inputs, strict=True)
    names = {p: program.loop.graph.values[v].name for p, v in inputs}
    for stage, size in enumerate(sizes):
        for p, part in parts_of_tasks(made.of(stage)):
            aval = program.avals[p]
            rows = local_shape(aval.shape, part, program.steps)[part.dim]
            if rows % size:
                name = names.get(p) or f"{aval.str_short()} that is computed of the arguments"
                found.setdefault((name, part.dim, rows, size), []).append(stage)
    return tuple(
        f"dim {dim} of {name} has {rows} in a microbatch, which does not divide over the {size} "
        f"devices of stage {', '.join(map(str, stages))}: each of them holds and computes all"
        for (name, dim, rows, size), stages in found.items()
    )
