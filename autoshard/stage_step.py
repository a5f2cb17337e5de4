"""What does one stage do in a step?  All its microbatches and its update, as one function.

A stage is planned like any other function: for each microbatch its forward task, then its backward
ones, in a loop; then the update of its weights. What other stages send arrives as arguments, and
what it sends are results. The function is never run; the tasks are, each with what was planned for
its part (`autoshard.controller`).

Where groups share the update, the function is that of one of them: arguments that rest in parts are
as large as its part is (`autoshard.in_parts`).

Tasks are separate programs: a barrier after each keeps what they hand on from being computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autoshard.after_stages import Group
from autoshard.cut_program import CutProgram
from autoshard.in_parts import computed, live, part_of, put_together
from autoshard.stage_programs import TaskProgram, outside_of, run_step, sums_of
from autoshard.step import local_shape, whole_of
from autoshard.time_loop import Program, wide
from passes.over_groups import Parts
from passes.time_axis import Split

TASK = "task_"  # begins the name of a task's call
WHOLE_UPDATE = Parts(1)  # each group does all of it


@dataclass(frozen=True)
class StageStep:
    """A stage's function over flat arguments, and the tasks and microbatches that it runs.

    arguments: places of the function's own arguments. parts: places that lie there for all
    microbatches. arrivals: places that other stages send in each; late: those that they send after
    the last one. sent: places that this one sends. over: of what a group has its part only.
    """

    stage: int
    tasks: tuple[TaskProgram, ...]
    microbatches: int
    run: Callable[..., list[Any]]
    avals: tuple[jax.ShapeDtypeStruct, ...]
    arguments: tuple[int, ...]
    parts: tuple[Any, ...]
    arrivals: tuple[int, ...]
    late: tuple[int, ...]
    sent: tuple[int, ...]
    results: tuple[int, ...]
    over: Parts


def stage_step(
    cut: CutProgram, stage: int, microbatches: int, over: Parts = WHOLE_UPDATE
) -> StageStep:
    """The function of a stage. microbatches: how many it runs. over: parts of each group."""
    made, program, own = cut.made, cut.made.program, cut.made.of(stage)
    mine = [g for g in cut.groups if g.stage == stage]
    home = {p for t in own for p in (*t.outs, *t.sums)}
    of_groups = [p for g in mine for p in g.inputs]
    arguments = tuple(dict.fromkeys([*made.whole(stage), *of_groups]))
    ahead, outside = made.ahead(stage), outside_of(own)
    parts = tuple(dict.fromkeys(p for t in own for p in t.parts))
    arrivals = tuple(dict.fromkeys(p for t in own for p in t.ins if p not in home))
    elsewhere = {p for t in made.tasks.values() if t.stage != stage for p in t.ins}
    sent = tuple(p for t in own for p in t.outs if p in elsewhere)
    made_here = {p for g in mine for p in g.outs}
    late = tuple(
        dict.fromkeys(
            p for g in mine for p in (*g.made, *g.ins) if p not in home and p not in made_here
        )
    )
    results = tuple(p for g in mine for p in g.outs)

    def local(p: int) -> jax.ShapeDtypeStruct:
        aval = program.avals[p]
        shape = local_shape(aval.shape, program.views[p], program.steps)
        return jax.ShapeDtypeStruct(shape, aval.dtype)

    def of_part(named: tuple[int, Split]) -> jax.ShapeDtypeStruct:
        aval = program.avals[named[0]]
        shape = local_shape(aval.shape, named[1], program.steps)
        return jax.ShapeDtypeStruct((microbatches, *shape), aval.dtype)

    def whole(p: int) -> jax.ShapeDtypeStruct:
        aval = program.avals[p]
        shape = over.local(p, aval.shape) if p in over.rest else aval.shape
        return jax.ShapeDtypeStruct(shape, aval.dtype)

    def sent_late(p: int) -> jax.ShapeDtypeStruct:
        return local(p) if isinstance(program.views[p], Split) else whole(p)

    kept = [p for t in own for p in t.outs if p in sent or (p in made.after and p not in t.sums)]

    def run(*flat: Any) -> list[Any]:
        given = list(flat)

        def take(names: Sequence[Any]) -> dict[Any, Any]:
            return {name: given.pop(0) for name in names}

        env, stacked = take(arguments), take(parts)
        arrived, others = take(arrivals), take(late)
        known_ahead = {**program.consts, **env}
        computed(program, over, known_ahead, ahead)
        lying = {p: put_together(over, p, known_ahead[p]) for p in outside}

        def body(carry: Any, sliced: Any) -> Any:
            time, sums, _ = carry
            known, sums = dict(arrived), dict(sums)
            here = dict(zip(parts, sliced, strict=True))
            for task in own:
                outs, added = _of_task(program, task, time, lying, here, known, sums)
                known.update(zip(task.outs, lax.optimization_barrier(outs), strict=True))
                sums.update(zip(task.sums, added, strict=True))
            return (time + 1, sums, [known[p] for p in kept]), None

        zeros = {p: program.avals[p] for p in sums_of(own)}
        start = {p: jnp.zeros(a.shape, wide(a.dtype)) for p, a in zeros.items()}
        last = [jnp.zeros(a.shape, a.dtype) for a in map(local, kept)]
        carry = (jnp.int32(0), start, last)
        (_, sums, last), _ = lax.scan(body, carry, list(stacked.values()), length=microbatches)
        found = {**others, **sums, **dict(zip(kept, last, strict=True))}
        return [*(found[p] for p in sent), *_updated(program, mine, over, env, found)]

    names = [*map(whole, arguments), *map(of_part, parts), *map(local, arrivals)]
    avals = (*names, *map(sent_late, late))
    return StageStep(
        stage,
        tuple(own),
        microbatches,
        run,
        avals,
        arguments,
        parts,
        arrivals,
        late,
        sent,
        results,
        over,
    )


def _of_task(
    program: Any, task: TaskProgram, time: Any, outside: Any, here: Any, known: Any, sums: Any
) -> Any:
    """A task as a call of its own, that it can be found by."""
    run = partial(run_step, program, task)
    run.__name__ = TASK + task.kind  # type: ignore[attr-defined]
    return jax.jit(run)(
        time,
        [outside[p] for p in task.outside],
        [here[p] for p in task.parts],
        [known[p] for p in task.ins],
        [sums[p] for p in task.sums],
    )


def _updated(
    program: Program, groups: Sequence[Group], over: Parts, given: Any, found: Any
) -> list[Any]:
    """What comes after the loop, as one group does it: results that it has whole are whole."""

    def whole(p: int) -> Any:
        """What the loop has made: sums as of one group, and of parts as of all steps."""
        view, aval = program.views[p], program.avals[p]
        x = found[p]
        if isinstance(view, Split):
            steps = jnp.broadcast_to(x, (program.steps, *x.shape))
            x = whole_of(steps, view, aval.shape)
        x = x.astype(aval.dtype)
        return part_of(x, over.dims[p], over.groups) if p in over.dims else x

    env = {**program.consts, **given}
    wanted = [p for group in groups for p in group.outs]
    kept = {e.outs[0] for e in live([e for g in groups for e in g.equations], wanted)}
    for group in groups:
        env.update({p: whole(p) for p in group.made if p not in env})
        env.update({p: found[p] for p in group.ins if p not in env})
        computed(program, over, env, [e for e in group.equations if e.outs[0] in kept])
    return [put_together(over, p, env[p]) for group in groups for p in group.outs]
