"""Where is done what comes after the loop?  Each update on the stage whose weights it updates.

An equation after the loop lies where the largest of its operands does: sums of gradients lie on the
stages that made them, and so each stage updates its own weights. What goes from stage to stage are
small things, such as the sum of squares for clipping by the global norm: each stage's own, then all
of them on one, then back. Equations of one stage that need not wait for another one are one
program; `update_groups` gives these in an order in which they can run.

What depends on arguments only is computed where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from autoshard.jax_compat import Literal
from autoshard.stacked import Stacked
from autoshard.step import whole_of
from autoshard.time_loop import Equation, Program
from passes.time_axis import PARTIAL, Split


@dataclass(frozen=True)
class Group:
    """Equations of one stage, run together.

    inputs: places of arguments, or of their slices, that it takes. made: places that the loop
    makes; ins: that earlier groups do. outs: what it gives.
    """

    stage: int
    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    made: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]


def update_groups(program: Program, homes: Mapping[int, int], apart: Stacked) -> tuple[Group, ...]:
    """The groups in order. homes: of each place that the loop makes, the stage where it lies."""
    home: dict[int, int] = dict(homes)
    level: dict[int, int] = {}
    groups: dict[tuple[int, int], list[Equation]] = {}
    free: dict[int, Equation] = {}  # by what it makes: equations that may be done anywhere
    for e in program.equations:
        if e.phase == "loop" or apart.skips(e):
            continue
        placed = [p for p in e.ins if isinstance(p, int) and p in home]
        if not placed:
            free.update(dict.fromkeys(e.outs, e))
            continue
        stage = home[max(placed, key=lambda p: (_bytes(program.avals[p]), -home[p], -p))]
        waits = [level[p] + (home[p] != stage) for p in placed if p in level]
        here = max(waits, default=0)
        groups.setdefault((here, stage), []).append(e)
        for p in e.outs:
            home[p], level[p] = stage, here
    results = [q for p in program.outputs_placed() for q in apart.joins.get(p, (p,))]
    wanted = set(results)
    arguments = {*program.inputs, *apart.cuts}
    made_in = {p: key for key, own in groups.items() for e in own for p in e.outs}
    for key, own in groups.items():
        taken = {p for e in own for p in e.ins if isinstance(p, int)}
        wanted |= {p for p in taken if made_in.get(p, key) != key}
    out = []
    for (_, stage), own in sorted(groups.items(), key=lambda item: item[0]):
        outs = [p for e in own for p in e.outs if p in wanted]
        out.append(_group(program, stage, own, outs, free, homes, arguments))
    rest: dict[int, list[int]] = {}
    for p in dict.fromkeys(results):
        if p not in made_in:  # a sum of the loop stays where it lies
            rest.setdefault(homes.get(p, 0), []).append(p)
    for stage, given in sorted(rest.items()):
        out.append(_group(program, stage, [], given, free, homes, arguments))
    return tuple(out)


def _group(
    program: Program,
    stage: int,
    own: Sequence[Equation],
    outs: Sequence[int],
    free: Mapping[int, Equation],
    homes: Mapping[int, int],
    arguments: Collection[int],
) -> Group:
    here = {p for e in own for p in e.outs}
    needed = [p for e in own for p in e.ins] + [p for p in outs if p not in here]
    ahead, taken = closure(needed, free)
    taken = [p for p in taken if p not in here and p not in program.consts]
    return Group(
        stage,
        (*ahead, *own),
        tuple(p for p in taken if p in arguments),
        tuple(p for p in taken if p in homes),
        tuple(p for p in taken if p not in arguments and p not in homes),
        tuple(outs),
    )


def closure(
    places: Iterable[Any], free: Mapping[int, Equation]
) -> tuple[list[Equation], list[int]]:
    """The free equations that these places are made by, in order, and what they start from."""
    found: dict[int, Equation] = {}
    taken: dict[int, None] = {}
    left = [p for p in places if not isinstance(p, Literal)]
    seen = set(left)
    while left:
        p = left.pop()
        e = free.get(p)
        if e is None:
            taken[p] = None
            continue
        found[e.outs[0]] = e
        more = [q for q in e.ins if isinstance(q, int) and q not in seen]
        seen.update(more)
        left += more
    return [found[p] for p in sorted(found)], sorted(taken)


def run_group(
    program: Program,
    group: Group,
    in_parts: Callable[[int, Any], Any],
    inputs: Sequence[Any],
    made: Sequence[Any],
    ins: Sequence[Any],
) -> list[Any]:
    """What a group gives. made: of sums those of each direction, of parts those of each microbatch;
    both by data-parallel group. in_parts: splits over these what lies at a place.
    """
    whole = []
    for p, x in zip(group.made, made, strict=True):
        view = program.views[p]
        if isinstance(view, Split):
            whole.append(whole_of(jnp.concatenate(x), view, program.avals[p].shape))
        else:
            whole.append(sum(x[1:], x[0]).sum(0) if view is PARTIAL else x[-1][-1])
    env: dict[int, Any] = {**program.consts, **dict(zip(group.inputs, inputs, strict=True))}
    env.update(zip(group.ins, ins, strict=True))
    for p, x in zip(group.made, whole, strict=True):
        env[p] = in_parts(p, x).astype(program.avals[p].dtype)
    program.compute(env, group.equations)
    return [in_parts(p, env[p]) for p in group.outs]


def _bytes(aval: Any) -> int:
    return int(aval.size) * int(getattr(aval.dtype, "itemsize", 4))
