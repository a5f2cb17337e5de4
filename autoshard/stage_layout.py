"""Where do a stage's values lie on its devices, and how do its tasks keep them so?  `StageLayout`.

The devices of a stage form a mesh: its data-parallel groups, and the axes that a group shards what
it has over. A value of one microbatch is one array over all groups, with the groups as a leading
dim; what it is sharded over inside a group is read off the stage's plan. A task is computed as
planned, operation by operation, by each group on its own part of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from jax import lax

from autoshard.jax_compat import Literal, open_jaxpr
from autoshard.lower import Emitter
from autoshard.mesh import partition_spec
from autoshard.stage_prices import GROUPS, task_paths
from autoshard.stage_programs import Part, TaskProgram, run_step
from autoshard.stage_step import StageStep
from autoshard.time_loop import Program
from autoshard.trace import Traced
from passes.ir.mesh import Mesh
from passes.ir.plan import Axes, Plan
from passes.ir.sharding import PARTIAL as SUMMANDS
from passes.ir.sharding import Sharding
from passes.over_groups import Parts

Spec = jax.sharding.PartitionSpec


@dataclass(frozen=True)
class StageLayout:
    """Specs of what lies on a stage, inside a group; what is not named lies whole on each device.

    whole: by place, of arguments and results. lying: of what tasks take whole. local: of values of
    one microbatch, parts: of what is taken of the batch. sums: of sums. over: what groups have in
    parts; what rests so has its whole spec in `whole`.
    """

    mesh: Mesh
    whole: Mapping[int, Spec] = field(default_factory=dict)
    lying: Mapping[int, Spec] = field(default_factory=dict)
    local: Mapping[int, Spec] = field(default_factory=dict)
    parts: Mapping[Part, Spec] = field(default_factory=dict)
    sums: Mapping[int, Spec] = field(default_factory=dict)
    over: Parts = field(default_factory=lambda: Parts(1))
    planned: tuple[Traced, Plan] | None = None  # the stage's function, and its plan

    def grouped(self, spec: Spec | None) -> Spec:
        """The spec of an array with the groups as its first dim."""
        return Spec(GROUPS, *(spec or ()))

    def in_parts(self, devices: jax.sharding.Mesh) -> Callable[[int, Any], Any]:
        """Splits over the groups, while the stage is updated, what is in parts at a place.

        devices: the stage's mesh.
        """

        def put(place: int, x: Any) -> Any:
            dim = self.over.dims.get(place)
            known = next(
                (s[place] for s in (self.sums, self.lying, self.whole) if place in s), None
            )
            if dim is None or known is None:
                return x
            rests = place in self.whole and place not in self.over.gathered
            wanted = jax.NamedSharding(devices, known if rests else _over_groups(known, dim))
            if x.shape[dim] % math.prod(devices.shape[a] for a in _axes(wanted.spec[dim])):
                wanted = jax.NamedSharding(devices, _over_groups(Spec(), dim))
            return lax.with_sharding_constraint(x, wanted)

        return put

    def compute(self, program: Program, task: TaskProgram, devices: Any) -> Callable[..., Any]:
        """What a task does for one group: of time, outside, parts, ins and sums.

        devices: the stage's mesh.
        """
        if self.planned is None:
            return partial(run_step, program, task)
        traced, plan = self.planned
        loop, kinds = task_paths(traced)
        body, _ = open_jaxpr(open_jaxpr(traced.jaxpr)[0].eqns[loop].params["jaxpr"])
        at = next(k for k, kind in kinds.items() if kind == task.kind)
        inner, consts = open_jaxpr(body.eqns[at].params["jaxpr"])

        def run(
            time: Any,
            outside: Sequence[Any],
            parts: Sequence[Any],
            ins: Sequence[Any],
            sums: Sequence[Any],
        ) -> tuple[list[Any], list[Any]]:
            mesh = jax.sharding.get_abstract_mesh()
            emitter = Emitter(traced, plan, devices if mesh.empty else mesh)
            flat = [time, *outside, *parts, *ins, *sums]
            outs = emitter.walk(inner, consts, flat, (loop, "body", at))
            return outs[: len(task.outs)], outs[len(task.outs) :]

        return run


def task_on_groups(
    compute: Callable[..., Any],
    task: TaskProgram,
    donated: Sequence[int],
    groups: int,
    devices: jax.sharding.Mesh,
) -> Callable[..., tuple[list[Any], list[Any], Any]]:
    """What a task gives, the sums with its own, and a number that is there once it is done.

    Its arguments: which microbatch; what lies on the stage; of what is taken in parts all parts,
    by microbatch and group; what other tasks have made; and, to be donated, what of this is named
    by `donated`, and the sums.
    """
    lent = [p for p in task.ins if p not in set(donated)]

    def run(
        microbatch: jax.Array,
        outside: Sequence[Any],
        parts: Sequence[Any],
        ins: Sequence[Any],
        taken_over: tuple[Sequence[Any], Sequence[Any]],
    ) -> tuple[list[Any], list[Any], Any]:
        given, sums = taken_over
        group = lax.axis_index(GROUPS) if groups > 1 else 0
        taken = [lax.dynamic_index_in_dim(x, microbatch, keepdims=False)[0] for x in parts]
        known = {**dict(zip(lent, ins, strict=True)), **dict(zip(donated, given, strict=True))}
        time = microbatch * groups + group
        own = [known[p][0] for p in task.ins]
        outs, added = compute(time, outside, taken, own, [x[0] for x in sums])
        return [x[None] for x in outs], [x[None] for x in added], microbatch + 1

    if groups == 1:
        return run
    each, split = Spec(GROUPS), Spec(None, GROUPS)
    return jax.shard_map(
        run,
        mesh=devices,
        in_specs=(Spec(), Spec(), split, each, each),
        out_specs=(each, each, Spec()),
        axis_names={GROUPS},
        check_vma=False,
    )


def planned_layout(step: StageStep, traced: Traced, plan: Plan) -> StageLayout:
    """The layout that a stage's plan says. traced: the stage's function."""
    mesh, graph = plan.mesh_axes, traced.graph
    ops = {op.path: op for op in graph.ops}
    loop, kinds = task_paths(traced)

    def spec(v: int) -> Spec:
        axes: Axes | None = plan.values[v]
        rank = len(graph.values[v].shape)
        if axes is None or SUMMANDS in axes:
            return Spec()
        return partition_spec(Sharding(axes).spec(rank, mesh))

    inputs = list(graph.inputs)
    names = [*step.arguments, *step.parts, *step.arrivals, *step.late]
    at = dict(zip(names, inputs, strict=True))
    whole = {p: spec(at[p]) for p in (*step.arguments, *step.late)}
    results = graph.outputs[len(step.sent) :]
    whole |= {p: spec(v) for p, v in zip(step.results, results, strict=True)}
    local = {p: spec(at[p]) for p in step.arrivals}
    lying: dict[int, Spec] = {}
    parts: dict[Part, Spec] = {}
    sums: dict[int, Spec] = {}
    body, _ = open_jaxpr(open_jaxpr(traced.jaxpr)[0].eqns[loop].params["jaxpr"])
    entered = {var: k for k, var in enumerate(body.invars)}

    def inside(eqn: Any, k: int) -> Spec | None:
        """Of an operand of a task's call that comes from outside of the loop's body."""
        atom = eqn.invars[k]
        op = None if isinstance(atom, Literal) else ops.get((loop, "in", entered.get(atom, -1)))
        return None if op is None else spec(op.outputs[0])

    for k, kind in kinds.items():
        task = next(t for t in step.tasks if t.kind == kind)
        named: list[tuple[dict[Any, Spec], Any]] = [
            *((lying, p) for p in task.outside),
            *((parts, p) for p in task.parts),
            *(({}, p) for p in task.ins),
            *((sums, p) for p in task.sums),
        ]
        for n, (found, p) in enumerate(named, 1):
            known = inside(body.eqns[k], n)
            if known is not None:
                found[p] = known
        for n, p in enumerate(task.outs):
            barrier = (loop, "body", k + 1)
            op = ops.get(barrier if len(task.outs) == 1 else (*barrier, "out", n))
            if op is not None:
                local[p] = spec(op.outputs[0])
    over = step.over
    resting = [p for p in over.dims if p in whole and p not in over.gathered]
    whole |= {p: _over_groups(whole[p], over.dims[p]) for p in resting}
    return StageLayout(mesh, whole, lying, local, parts, sums, over, (traced, plan))


def _over_groups(spec: Spec, dim: int) -> Spec:
    """A spec with a dim split over the groups, too, within what it is split over already."""
    dims = [*spec, *[None] * (dim + 1 - len(spec))]
    dims[dim] = (*_axes(dims[dim]), GROUPS)
    return Spec(*dims)


def _axes(dim: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes that a dim is split over."""
    return (dim,) if isinstance(dim, str) else tuple(dim or ())
