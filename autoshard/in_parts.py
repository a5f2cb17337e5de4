"""What does each data-parallel group do of a stage's update?  `stage_parts(...) -> Parts`.

Which arrays are in parts is found by `passes.over_groups`, from the operations that the stage does
ahead of its tasks and after them. To plan a stage, its function is traced as one group does it, on
its own parts: `computed` does so. What groups exchange stands in it as what it is for one of them:
its part of a whole array (`part_of`), and an array that is put together from the parts of all
(`put_together`). None of this is ever run: the controller says of the same places where they lie,
and XLA's partitioner does the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autoshard.cut_program import CutProgram
from autoshard.jax_compat import Literal, bind, open_jaxpr, traced_at
from autoshard.localize import local_params
from autoshard.stage_programs import outside_of, parts_of_tasks, sums_of
from autoshard.time_loop import Equation, Program
from autoshard.trace import BARRIER, Traced
from passes.ir.graph import Op
from passes.over_groups import Ends, Parts, Work, parts_of_update

GATHERED = "put_together"  # the name of a call in a stage's function


def stage_parts(cut: CutProgram, stage: int, groups: int, inner: int) -> Parts:
    """The parts of a stage. inner: devices of a group."""
    if groups == 1:
        return Parts(1)
    program, ahead = cut.made.program, cut.made.ahead(stage)
    mine = [u for u in cut.groups if u.stage == stage]
    ends = _ends(cut, stage, ahead)
    wanted = {*ends.needed, *(p for u in mine for p in u.outs)}
    equations = live([*ahead, *(e for u in mine for e in u.equations)], wanted)
    works = [w for e in equations for w in _works(program, e)]
    avals = program.avals
    shapes = {p: tuple(aval.shape) for p, aval in enumerate(avals)}
    nbytes = {p: prod(shapes[p]) * getattr(a.dtype, "itemsize", 4) for p, a in enumerate(avals)}
    return parts_of_update(works, ends, shapes, groups, inner, nbytes)


def _ends(cut: CutProgram, stage: int, ahead: Sequence[Equation]) -> Ends:
    """Where a stage's update begins and ends."""
    made, program = cut.made, cut.made.program
    own, stacked, alone = made.of(stage), made.stacked, frozenset({stage})
    given = {p for u in cut.groups if u.stage == stage for p in u.outs}
    lying = {*outside_of(own), *(p for p, _ in parts_of_tasks(own))}
    return Ends(
        state={
            a: r
            for a, r in cut.state.items()
            if cut.readers.get(a) == alone and r in given and a not in lying
        },
        sums=frozenset(sums_of(own)),
        needed=frozenset(lying | {p for u in cut.groups if u.stage != stage for p in u.ins}),
        results=frozenset(q for p in program.outputs_placed() for q in stacked.joins.get(p, (p,))),
        early=frozenset(p for e in ahead for p in e.ins if isinstance(p, int)),
        stacked=frozenset({*stacked.cuts, *(q for j in stacked.joins.values() for q in j)}),
    )


def live(equations: Sequence[Equation], wanted: Collection[int]) -> list[Equation]:
    """Those that something wanted is made by, each once."""
    needed, kept = set(wanted), []
    for e in reversed({e.outs[0]: e for e in equations}.values()):
        if needed.intersection(e.outs):
            needed.update(p for p in e.ins if isinstance(p, int))
            kept.append(e)
    return kept[::-1]


def _works(program: Program, e: Equation) -> list[Work]:
    """An equation as operations: a barrier is one for each of its values."""
    name = e.eqn.primitive.name
    ins = tuple(None if isinstance(p, Literal) else p for p in e.ins)
    op = program.ops.get(e.path)
    if name == BARRIER and op is None:
        links = [program.ops.get((*e.path, "out", k)) for k in range(len(ins))]
        return [
            Work(name, None if link is None else link.rule, (p,), (q,))
            for link, p, q in zip(links, ins, e.outs, strict=True)
        ]
    return [Work(name, None if op is None else op.rule, ins, e.outs)]


def computed(
    program: Program, parts: Parts, env: dict[int, Any], equations: Sequence[Equation]
) -> None:
    """Equations as one group does them, on its parts, in order."""
    for e in equations:
        operands = [
            p.val if isinstance(p, Literal) else _operand(parts, env, e, k)
            for k, p in enumerate(e.ins)
        ]
        before = [v.aval.shape for v in e.eqn.invars]
        local = [jnp.shape(x) for x in operands]
        made = [parts.local(p, v.aval.shape) for p, v in zip(e.outs, e.eqn.outvars, strict=True)]
        params = None
        if local != before or made != [v.aval.shape for v in e.eqn.outvars]:
            params = dict(local_params(e.eqn.primitive.name, e.eqn.params, before, local, made))
        with traced_at(e.eqn, e.caller):
            env.update(zip(e.outs, bind(e.eqn, operands, params), strict=True))


def _operand(parts: Parts, env: Mapping[int, Any], e: Equation, k: int) -> Any:
    barrier = e.eqn.primitive.name == BARRIER
    dim = parts.taken.get((e.outs[k], 0) if barrier else (e.outs[0], k))
    x = env[e.ins[k]]
    return x if dim is None else part_of(x, dim, parts.groups)


def part_of(x: Any, dim: int, groups: int) -> Any:
    """A group's part of an array, so that a split of the same dim inside the group stays."""
    shape = jnp.shape(x)
    apart = jnp.reshape(x, (*shape[:dim], shape[dim] // groups, groups, *shape[dim + 1 :]))
    return lax.index_in_dim(apart, 0, dim + 1, keepdims=False)


def put_together(parts: Parts, place: int, x: Any) -> Any:
    """What a group has of a place in the end: all of it again, where that is needed."""
    if place not in parts.gathered:
        return x
    dim, groups = parts.dims[place], parts.groups

    def gathered(x: Any) -> Any:
        shape = jnp.shape(x)
        every = tuple(k + (k > dim) for k in range(len(shape)))
        apart = lax.broadcast_in_dim(x, (*shape[: dim + 1], groups, *shape[dim + 1 :]), every)
        return jnp.reshape(apart, (*shape[:dim], shape[dim] * groups, *shape[dim + 1 :]))

    gathered.__name__ = GATHERED
    return jax.jit(gathered)(x)


def gathered_values(traced: Traced) -> list[tuple[int, int]]:
    """In a stage's function the values that are put together, before and after."""
    jaxpr, _ = open_jaxpr(traced.jaxpr)
    named = {k for k, e in enumerate(jaxpr.eqns) if e.params.get("name") == GATHERED}
    found: dict[int, list[Op]] = {}
    for op in traced.graph.ops:
        if op.path[0] in named:
            found.setdefault(int(op.path[0]), []).append(op)
    return [(ops[0].inputs[0], ops[-1].outputs[0]) for _, ops in sorted(found.items())]
