"""One program for each task of each stage: `stage_programs(program, stages)`.

A task's program takes what other tasks have made of the same microbatch, what lies on the stage for
all of them (weights, all parts of the batch), and the sums so far; it gives what other tasks need,
and the sums with its own summands added. jax compiles it for the devices of the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from autoshard.after_stages import closure
from autoshard.stacked import Stacked, stacked
from autoshard.step import parts_of
from autoshard.time_loop import Equation, Program, wide
from passes.stages import Stages
from passes.time_axis import PARTIAL, Split

Part = tuple[int, Split]
Lying = tuple[list[Any], list[Any], list[Any]]  # whole values, parts, and sums of nothing


@dataclass(frozen=True)
class TaskProgram:
    """The equations of one kind of task on one stage.

    outside: places that lie on the stage. parts: of which it takes a part. ins: places that other
    tasks make. outs: places that others need. sums: places that are added up; kept: of which the
    last microbatch's is needed; stacks: of which all are.
    """

    stage: int
    kind: str
    equations: tuple[Equation, ...]
    outside: tuple[int, ...]
    parts: tuple[Part, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    sums: tuple[int, ...]


@dataclass(frozen=True)
class StagePrograms:
    """All tasks, by stage and kind; and what each stage has to have before the first."""

    program: Program
    tasks: Mapping[tuple[int, str], TaskProgram]
    after: tuple[int, ...]  # places that what comes after the loop needs of it
    stacked: Stacked

    def of(self, stage: int) -> list[TaskProgram]:
        """The tasks of a stage, in the order in which a microbatch takes them."""
        found = [self.tasks.get((stage, kind)) for kind in "FBW"]
        return [t for t in found if t is not None]

    def _before(self) -> dict[int, Equation]:
        """What is computed before the loop, by what it makes; slices of arguments are not."""
        own = [e for e in self.program.equations if e.phase == "before"]
        return {p: e for e in own if not self.stacked.skips(e) for p in e.outs}

    def ahead(self, stage: int) -> list[Equation]:
        """What a stage computes of what its tasks take whole."""
        return closure(outside_of(self.of(stage)), self._before())[0]

    def whole(self, stage: int) -> tuple[int, ...]:
        """Places of arguments or their slices, of which a stage has what its tasks take whole."""
        taken = closure(outside_of(self.of(stage)), self._before())[1]
        return tuple(p for p in taken if p not in self.program.consts)

    def prepare(
        self,
        stage: int,
        groups: int,
        lent: Collection[int],
        in_parts: Callable[[int, Any], Any],
    ) -> tuple[tuple[int, ...], Callable[..., Lying]]:
        """Places of arguments or their slices, and from these to what lies there for all tasks.

        Parts by microbatch and group; sums by group. lent: what tasks take from outside, but is no
        part of this. in_parts: splits over groups what is computed in parts, and then lies whole.
        """
        own, program = self.of(stage), self.program
        outside = [p for p in outside_of(own) if p not in lent]
        parts, sums = parts_of_tasks(own), sums_of(own)
        ahead, taken = closure([*outside, *(p for p, _ in parts)], self._before())
        inputs = tuple(p for p in taken if p not in program.consts)

        def run(*given: Any) -> Lying:
            env = {**program.consts, **dict(zip(inputs, given, strict=True))}
            program.compute(env, ahead)
            cut = [parts_of(env[p], part, program.steps) for p, part in parts]
            zeros = [program.avals[p] for p in sums]
            return (
                [in_parts(p, env[p]) for p in outside],
                [jnp.reshape(x, (-1, groups, *x.shape[1:])) for x in cut],
                [jnp.zeros((groups, *a.shape), wide(a.dtype)) for a in zeros],
            )

        return inputs, run


def outside_of(tasks: Sequence[TaskProgram]) -> list[int]:
    """Places that tasks of a stage take as they are."""
    return list(dict.fromkeys(p for t in tasks for p in t.outside))


def parts_of_tasks(tasks: Sequence[TaskProgram]) -> list[Part]:
    """Places of which tasks of a stage take a part."""
    return list(dict.fromkeys(p for t in tasks for p in t.parts))


def sums_of(tasks: Sequence[TaskProgram]) -> list[int]:
    """Places that tasks of a stage add up."""
    return [p for t in tasks for p in t.sums]


def stage_programs(program: Program, stages: Stages) -> StagePrograms:
    """The tasks of a program that runs in microbatches."""
    inside = [e for e in program.equations if e.phase == "loop"]
    alias: dict[int, int] = {}  # a barrier's results: nothing merges over different programs
    for e in inside:
        if e.eqn is None:
            alias.update(zip(e.outs, e.ins, strict=True))
    inside = [_through(e, alias) for e in inside if e.eqn is not None]
    after = tuple(dict.fromkeys(alias.get(p, p) for p in program.needed_after()))
    again = _anywhere(program, inside, after)
    inside = [e for e in inside if e.outs[0] not in again]
    owner = {p: stages_key(stages, e) for e in inside for p in e.outs}
    by_task: dict[tuple[int, str], list[Equation]] = {}
    for e in inside:
        by_task.setdefault(stages_key(stages, e), []).append(e)
    for key, own in by_task.items():
        by_task[key] = [*closure((p for e in own for p in e.ins), again)[0], *own]
    users: dict[int, set[tuple[int, str]]] = {}
    for e in inside:
        for p in e.ins:
            if isinstance(p, int) and p in owner and owner[p] != stages_key(stages, e):
                users.setdefault(p, set()).add(stages_key(stages, e))
    tasks = {
        key: _task(program, key, own, owner, users, after) for key, own in sorted(by_task.items())
    }
    made = tuple(p for p in after if p in owner)
    return StagePrograms(program, tasks, made, stacked(program))


def _anywhere(
    program: Program, inside: Sequence[Equation], after: Sequence[int]
) -> dict[int, Equation]:
    """Equations, by what they make, that each task does for itself rather than wait for another's.

    Nothing of the batch is in them, and they cost little, such as masks.
    """
    found: dict[int, Equation] = {}
    outside = {p for e in inside for p in e.outs} | {p for p, _ in program.parts(inside)}
    for e in inside:
        op = program.ops.get(e.path)
        whole = all(
            p in found or (p not in outside and program.part(e, k) is None)
            for k, p in enumerate(e.ins)
            if isinstance(p, int)
        )
        if op is not None and op.rule.fuses and whole and not set(e.outs) & set(after):
            found.update(dict.fromkeys(e.outs, e))
    return found


def stages_key(stages: Stages, e: Equation) -> tuple[int, str]:
    """Stage and kind of an equation."""
    return stages.stage[e.path], stages.kind[e.path]


def _through(e: Equation, alias: Mapping[int, int]) -> Equation:
    def real(p: Any) -> Any:
        while isinstance(p, int) and p in alias:
            p = alias[p]
        return p

    return replace(e, ins=tuple(map(real, e.ins)))


def _task(
    program: Program,
    key: tuple[int, str],
    equations: Sequence[Equation],
    owner: Mapping[int, tuple[int, str]],
    users: Mapping[int, set[tuple[int, str]]],
    after: Sequence[int],
) -> TaskProgram:
    made = [p for e in equations for p in e.outs]
    own = set(made)
    outside, parts, ins = dict[int, None](), dict[Part, None](), dict[int, None]()
    for e in equations:
        for k, p in enumerate(e.ins):
            if not isinstance(p, int) or p in own:
                continue
            part = program.part(e, k)
            if p in owner:
                ins[p] = None
            elif part is None:
                outside[p] = None
            else:
                parts[p, part] = None
    needed = set(after)
    sums = [p for p in made if p in needed and program.views[p] is PARTIAL]
    others = [p for p in made if p in users or (p in needed and p not in sums)]
    return TaskProgram(
        *key,
        tuple(equations),
        tuple(outside),
        tuple(parts),
        tuple(ins),
        tuple(others),
        tuple(sums),
    )


def program_name(stage: int, kind: str) -> str:
    """The name of a task's program, by which a profile knows it."""
    return f"stage{stage}_{kind}"


def run_step(
    program: Program,
    task: TaskProgram,
    time: Any,
    outside: Sequence[Any],
    parts: Sequence[Any],
    ins: Sequence[Any],
    sums: Sequence[Any],
) -> tuple[list[Any], list[Any]]:
    """What a task gives of one microbatch, and the sums with its own. parts: of it."""
    local = program.one_step(
        task.equations,
        dict(zip(task.outside, outside, strict=True)),
        dict(zip(task.parts, parts, strict=True)),
        time,
        dict(zip(task.ins, ins, strict=True)),
    )
    added = [x + local[p].astype(x.dtype) for p, x in zip(task.sums, sums, strict=True)]
    return [local[p] for p in task.outs], added
