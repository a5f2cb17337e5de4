"""A function cut into pieces of a pipeline, with what is known of its arguments: `cut_program`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from autoshard.after_stages import Group, update_groups
from autoshard.in_stages import Staged, Weigh, flops_of, in_stages
from autoshard.stacked import donated_places
from autoshard.stage_programs import StagePrograms, stage_programs
from autoshard.state import state_pairs
from autoshard.time_axes import BATCH
from autoshard.time_loop import Program
from autoshard.trace import Path, Traced
from passes.ir.plan import TimeAxis
from passes.time_loop import unit_path


@dataclass(frozen=True)
class CutProgram:
    """The tasks and updates of all pieces.

    state: from the place of an argument, or of a slice of one, to what takes its place at the next
    step. donated: places whose memory the updates may use. names: of arguments and their slices.
    """

    staged: Staged
    made: StagePrograms
    groups: tuple[Group, ...]
    state: Mapping[int, int]
    donated: frozenset[int]
    names: Mapping[int, str]

    @cached_property
    def readers(self) -> Mapping[int, frozenset[int]]:
        """By place the stages that read an argument, or a slice of one."""
        out: dict[int, set[int]] = {}
        for stage in range(self.staged.stages.count):
            updates = (p for u in self.groups if u.stage == stage for p in u.inputs)
            for p in (*self.made.whole(stage), *updates):
                out.setdefault(p, set()).add(stage)
        return {p: frozenset(stages) for p, stages in out.items()}

    @cached_property
    def rules(self) -> Mapping[Path, tuple[str, ...]]:
        """By the path of an equation the rules of its operations, those of its bodies too."""
        texts: dict[int, str] = {}  # many operations share a rule
        out: dict[Path, list[str]] = {}
        for op in self.staged.loop.graph.ops:
            if id(op.rule) not in texts:
                texts[id(op.rule)] = str(op.rule)
            out.setdefault(unit_path(op), []).append(texts[id(op.rule)])
        return {path: tuple(rules) for path, rules in out.items()}


def cut_program(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    steps: int,
    over: TimeAxis = BATCH,
    pieces: int,
    apart: bool,
    weigh: Weigh = flops_of,
    given: Traced | None = None,
) -> CutProgram:
    """A function in so many steps and pieces. over, apart, weigh, given: as of `in_stages`.

    Raises NoTimeLoop and NoStages.
    """
    staged = in_stages(
        fn,
        args,
        kwargs,
        options,
        microbatches=steps,
        over=over,
        count=pieces,
        apart=apart,
        weigh=weigh,
        given=given,
    )
    program = Program(staged.traced, staged.loop)
    made = stage_programs(program, staged.stages)
    homes = {p: t.stage for t in made.tasks.values() for p in (*t.outs, *t.sums)}
    groups = update_groups(program, {p: homes[p] for p in made.after}, made.stacked)
    return CutProgram(staged, made, groups, *_arguments(staged, program, made))


def _arguments(
    staged: Staged, program: Program, made: StagePrograms
) -> tuple[dict[int, int], frozenset[int], dict[int, str]]:
    """State, donated places and names."""
    graph = staged.traced.graph
    names = {p: graph.values[v].name for p, v in zip(program.inputs, graph.inputs, strict=True)}
    donated = donated_places(program, staged.traced.donated, made.stacked)
    results = dict(zip(graph.outputs, program.outputs, strict=True))
    inputs = dict(zip(graph.inputs, program.inputs, strict=True))
    cuts: dict[int, dict[tuple[int, int], int]] = {}
    for p, cut in made.stacked.cuts.items():
        cuts.setdefault(cut.argument, {}).setdefault((cut.begin, cut.end), p)
    state: dict[int, int] = {}
    for i, o in state_pairs(staged.traced):
        argument, result = inputs[i], results[o]
        if not isinstance(result, int):
            continue
        state[argument] = result
        own = [cuts[argument][at] for at in sorted(cuts.get(argument, ()))]
        parts = made.stacked.joins.get(result, ())
        if len(own) == len(parts):
            state.update(zip(own, parts, strict=True))
    for p, cut in made.stacked.cuts.items():
        names[p] = names[cut.argument]
    return state, donated, names
