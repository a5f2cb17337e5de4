"""How do the stages of a pipeline run as one program on all devices, in any number of processes?

The schedule is a table of ticks (`passes.pipeline.ticks`). All devices run the same loop over the
ticks, with tables of their own (`autoshard.spmd_tables`): in each tick a device looks up its task,
takes what that needs from its buffers, does it in a branch of a `lax.switch`, stores what it has
made, and sends it to the devices that read it (`lax.ppermute`). Pipelines as one program over a
mesh are from GSPMD (Xu et al., arXiv 2105.04663, section 3.3).

    staged = in_stages(fn, args, kwargs, options, microbatches=8, count=4)
    run = SpmdPipeline(staged.traced, staged.loop, staged.stages, schedule, mesh)
    results = jax.jit(run, in_shardings=run.shardings)(*flat)

The mesh has an axis "stage", as long as the schedule has devices. Along further axes the batch is
split: each device there has microbatches of its own, so that a step has as many microbatches as the
schedule times those devices; sums are added up over them once, after the loop.

Arguments and results may lie as they like; `shardings` splits each argument evenly over the stages.
Weights are brought to their stages when a step begins, and sums of gradients back when its loop
ends, by an all-to-all each: only in between does a device hold those of its stages. What comes
after the loop is left to XLA's partitioner; split so, each device updates an even share of all.

What it costs to have one program: buffers and weights take on each device what they take on the
device with most of them, form by form (`autoshard.spmd_layout`). A tick lasts as long as its
longest task.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autoshard.spmd_branches import Row, branches_of, rows_of_ticks, stored
from autoshard.spmd_layout import ADDED, STACKED, layout_of
from autoshard.spmd_rows import from_rows, spread, to_rows
from autoshard.spmd_tables import Form
from autoshard.stage_programs import Part
from autoshard.step import parts_of, whole_of
from autoshard.time_loop import Program
from autoshard.trace import Traced
from passes.pipeline.schedule import Schedule
from passes.stages import Stages
from passes.time_axis import Split
from passes.time_loop import TimeLoop

STAGE = "stage"


class NoSpmdPipeline(ValueError):
    """A pipeline that can not run as one program; the sentence says why."""


def why_not(schedule: Schedule, stages: Stages, loop: TimeLoop, mesh: jax.sharding.Mesh) -> str:
    """Why these can not run as one program, in a sentence; "" where they can."""
    name, axes = schedule.name, ", ".join(mesh.axis_names)
    if len(schedule.ways) > 1:
        return (
            f"in {name} microbatches go both ways, and each device holds stages of both; schedules "
            "on one way run as one program"
        )
    if any(schedule.transfers):
        return f"{name} sends activations to the host, which one program for all devices does not"
    if schedule.pieces != stages.count:
        return f"{name} has {schedule.pieces} stages, and the function is cut into {stages.count}"
    if STAGE not in mesh.axis_names:
        return f"stages need a mesh axis called {STAGE!r}; this mesh has {axes}"
    if mesh.shape[STAGE] != schedule.devices:
        return (
            f"{name} has {schedule.devices} devices, and the mesh {mesh.shape[STAGE]} along {STAGE}"
        )
    others = mesh.size // schedule.devices
    if loop.steps != schedule.microbatches * others:
        along = " and ".join(_others(mesh))
        each = f" for each of {others} devices along {along}" if others > 1 else ""
        return (
            f"{name} has {schedule.microbatches} microbatches{each}, and the batch is cut into "
            f"{loop.steps}; cut it into {schedule.microbatches * others}"
        )
    return ""


def _others(mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in mesh.axis_names if axis != STAGE)


class SpmdPipeline:
    """Runs a traced function over stages: a function of flat arguments, to be jitted.

    layout: what lies on a device. branches: what it can do in a tick. Raises NoSpmdPipeline where
    `why_not` says why, and where a random key would have to go from task to task.
    """

    def __init__(
        self,
        traced: Traced,
        loop: TimeLoop,
        stages: Stages,
        schedule: Schedule,
        mesh: jax.sharding.Mesh,
    ) -> None:
        reason = why_not(schedule, stages, loop, mesh)
        if reason:
            raise NoSpmdPipeline(reason)
        auto = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
        self.mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=auto)
        self.others = _others(mesh)
        self.program = Program(traced, loop)
        tiled = self.mesh.devices.flat[0].platform == "tpu"
        self.layout = layout_of(self.program, stages, schedule, tiled)
        if any(jax.dtypes.issubdtype(d, jax.dtypes.extended) for _, d in self.layout.buffers):
            raise NoSpmdPipeline(
                f"{loop.graph.name} makes random keys of each microbatch that several stages read, "
                "and typed keys can not lie in buffers; make them from the step's own key, of the "
                "whole batch, or keep them as numbers (jax.random.PRNGKey)"
            )
        self.branches = branches_of(self.layout)
        self.rows = rows_of_ticks(self.layout, self.branches)

    @property
    def shardings(self) -> list[jax.NamedSharding]:
        """Each argument split evenly over the stages, along its longest dim that can be."""
        shapes = [self.program.avals[p].shape for p in self.program.inputs]
        return [jax.NamedSharding(self.mesh, spread(s, self.mesh, STAGE)) for s in shapes]

    def __call__(self, *flat: Any) -> list[Any]:
        """The results of the function, flat."""
        program, layout = self.program, self.layout
        env = program.ahead(flat)
        weights = to_rows(layout.weights, self.mesh, STAGE, lambda p: env[p])
        parts = to_rows(layout.parts, self.mesh, STAGE, partial(self._parts, env))
        held = jax.shard_map(
            self._loop,
            mesh=self.mesh,
            in_specs=(jax.P(STAGE), jax.P(STAGE, None, None, self.others)),
            out_specs=[
                jax.P(STAGE, None, None, self.others) if mode == STACKED else jax.P(STAGE)
                for mode, _ in layout.results.count
            ],
            check_vma=False,
        )(weights, parts)
        found = from_rows(layout.results, self.mesh, STAGE, held)
        env.update({p: self._whole(p, x) for p, x in found.items()})
        for e in program.equations:  # a barrier's results, where they are read after the loop
            if e.phase == "loop" and e.eqn is None:
                env.update({q: env[p] for p, q in zip(e.ins, e.outs, strict=True) if p in env})
        return program.results(env)

    def _parts(self, env: Mapping[int, Any], part: Part) -> Any:
        """All parts of a value: [microbatch, which of a stage's devices, ...]."""
        x, program = env[part[0]], self.program
        if part[0] in program.inputs:  # XLA can not reshape it as it is split
            x = lax.with_sharding_constraint(x, jax.NamedSharding(self.mesh, jax.P()))
        x = parts_of(x, part[1], program.steps)
        return jnp.reshape(x, (self.layout.schedule.microbatches, -1, *x.shape[1:]))

    def _whole(self, p: int, x: Any) -> Any:
        """A result of the loop, from what the devices have of it."""
        aval, view = self.program.avals[p], self.program.views[p]
        if isinstance(view, Split):
            return whole_of(jnp.reshape(x, (self.program.steps, *x.shape[2:])), view, aval.shape)
        return x.astype(aval.dtype)

    def _loop(self, weights: Any, parts: Any) -> list[Any]:
        """All ticks, as every device runs them."""
        layout, tables = self.layout, self.layout.tables
        device = lax.axis_index(STAGE)
        replica = lax.axis_index(self.others) if self.others else jnp.int32(0)
        replicas = self.program.steps // layout.schedule.microbatches
        weights = [x[0] if layout.apart else list(x[0]) for x in weights]
        parts = [x[0, :, :, 0] if layout.apart else list(x[0, :, :, 0]) for x in parts]

        def tick(carry: Any, row: Row) -> Any:
            buffers, held = carry
            row = {**row, "time": row["microbatch"] * replicas + replica}
            outs, held, done = self.branches.run(row, weights, parts, buffers, held)
            # Slots wait for what reads the buffers, so that XLA need not copy these to write there.
            slots = [each + done for each in row["stores"]]
            buffers = list(map(stored, buffers, outs, slots))
            for link, sent, slot in zip(tables.links, row["sent"], row["stored"], strict=True):
                k = layout.buffers.index(link.form)
                x = outs[k][0] if len(outs[k]) == 1 else lax.select_n(sent, *outs[k])
                x = lax.ppermute(x, STAGE, link.pairs)
                buffers[k] = stored(buffers[k], [x], slot[None])
            return (buffers, held), None

        buffers = [jnp.zeros((many, *form[0]), form[1]) for form, many in tables.slots.items()]
        results = layout.results.count.items()
        held = [self._zeros(many, form) for (_, form), many in results]
        rows = jax.tree.map(lambda table: jnp.asarray(table)[device], self.rows)
        (_, held), _ = lax.scan(tick, (buffers, held), rows)
        return [self._from_device(mode, x) for ((mode, _), _), x in zip(results, held, strict=True)]

    def _zeros(self, many: int, form: Form) -> Any:
        """Rows of zeros, each by itself where no table tells which one is meant."""
        shape, dtype = form
        if self.layout.apart:
            return jnp.zeros((many, *shape), dtype)
        return [jnp.zeros(shape, dtype)] * many

    def _from_device(self, mode: str, rows: Any) -> Any:
        """Rows as a device gives them: added up over the devices that have the same stages."""
        x = rows if self.layout.apart else jnp.stack(rows)
        if mode == ADDED and self.others:
            x = lax.psum(x, self.others)
        return x[None, :, :, None] if mode == STACKED else x[None]
