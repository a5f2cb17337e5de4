"""Who starts which task when?  A single controller, along the table of a schedule.

Every stage has devices of its own. The controller walks the table in the order of its times and
starts each task on its stage's devices; arrays are futures, so that starting returns before the
work is done, and stages work beside one another (as in Pathways, Barham et al., arXiv 2203.12533).
What a task makes is sent to the stages that need it at once, and let go when the last task that
needs it has been started (`autoshard.between_tasks`). The controller is never more than a few tasks
of a device ahead of what is done, and waits before it starts what would not fit beside what the
table holds at its peak (`autoshard.in_flight`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from autoshard.after_stages import Group, run_group, update_groups
from autoshard.between_tasks import Shelf, donated, handed_on
from autoshard.in_flight import InFlight
from autoshard.jax_compat import Literal
from autoshard.stacked import donated_places, piece, put_together
from autoshard.stacked_array import StackedArray
from autoshard.stage_arguments import as_they_lie, overwritten
from autoshard.stage_layout import StageLayout, task_on_groups
from autoshard.stage_notes import not_moved
from autoshard.stage_prices import GROUPS
from autoshard.stage_programs import (
    StagePrograms,
    TaskProgram,
    outside_of,
    parts_of_tasks,
    program_name,
    stage_programs,
    sums_of,
)
from autoshard.time_loop import Program
from autoshard.trace import Traced
from passes.ir.mesh import Mesh
from passes.pipeline.schedule import Schedule
from passes.pipeline.stage_costs import StageCosts
from passes.pipeline.timeline import Row, simulate
from passes.stages import Stages
from passes.time_axis import PARTIAL
from passes.time_loop import TimeLoop


class Controller:
    """Runs a traced function over stages.

    devices: per device of the schedule those that its stages run on, as many for each: its
    data-parallel groups one after the other, as many as the loop has steps per microbatch. layouts:
    per stage where its values lie inside a group; none for whole on each device. ahead: how many
    tasks of a device may be started that are not done yet. notes: what is done otherwise than asked
    for. flight: what lay in memory in the last call.
    """

    def __init__(
        self,
        traced: Traced,
        loop: TimeLoop,
        stages: Stages,
        schedule: Schedule,
        devices: Sequence[Sequence[Any]],
        layouts: Sequence[StageLayout] = (),
        ahead: int = 32,
    ) -> None:
        self.ahead = ahead
        self.traced, self.schedule, self.stages = traced, schedule, stages
        self.program = Program(traced, loop)
        self.places = {p: k for k, p in enumerate(self.program.inputs)}
        self.made: StagePrograms = stage_programs(self.program, stages)
        self.groups = loop.steps // schedule.microbatches
        inner = Mesh(("model",), (len(devices[0]) // self.groups,))
        self.layouts = tuple(layouts) or (StageLayout(inner),) * stages.count
        self.meshes = [
            [
                self._mesh(devices[d], layout)
                for (d, _), layout in zip(way, self.layouts, strict=True)
            ]
            for way in schedule.ways
        ]
        timeline = simulate(schedule, costs_of(stages))
        self.host = _host_memory(self.meshes)
        alone = dataclasses.replace(schedule, transfers=())
        self.limits = timeline.peaks if self.host else simulate(alone, costs_of(stages)).peaks
        self.notes = () if self.host else not_moved(schedule, timeline.peaks, self.limits)
        both = (*timeline.rows, *timeline.transfers)
        self.rows = sorted(both, key=lambda r: (r.start, r.end, r.device))
        apart = self.made.stacked
        self.lent = [
            as_they_lie(self.program, outside_of(self.made.of(stage)), layout, apart)
            for stage, layout in enumerate(self.layouts)
        ]
        self.needed = [self._prepare(stage, self.meshes[0])[0] for stage in range(stages.count)]
        self.prepare = [
            [self._prepare(stage, meshes)[1] for stage in range(stages.count)]
            for meshes in self.meshes
        ]
        homes = {p: t.stage for t in self.made.tasks.values() for p in (*t.outs, *t.sums)}
        after = {p: homes[p] for p in self.made.after}
        self.updating = update_groups(self.program, after, apart)
        given = donated_places(self.program, traced.donated, apart)
        self.overwritten = overwritten(self.program, self.updating, given, apart, self.layouts)
        self.updates = [
            self._update(g, over) for g, over in zip(self.updating, self.overwritten, strict=True)
        ]
        self.between = handed_on(self.made)
        self.donated = {
            key: donated(
                self.made, task, self.between, self._share, self.layouts[task.stage].local.get
            )
            for key, task in self.made.tasks.items()
        }
        self.steps = [
            {key: self._compiled(task, meshes[task.stage]) for key, task in self.made.tasks.items()}
            for meshes in self.meshes
        ]
        self.flight = InFlight(self.limits, ahead)

    def _mesh(self, devices: Sequence[Any], layout: StageLayout) -> jax.sharding.Mesh:
        """The devices of a stage: its groups, and what each shards over."""
        grid = np.array(devices).reshape(self.groups, *layout.mesh.sizes)
        names = (GROUPS, *layout.mesh.names)
        return jax.sharding.Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))

    def _prepare(
        self, stage: int, meshes: Sequence[jax.sharding.Mesh]
    ) -> tuple[tuple[int, ...], Callable[..., Any]]:
        """What a stage takes of the arguments, and the program of what comes before its tasks."""
        mesh = meshes[stage]
        in_parts = self.layouts[stage].in_parts(mesh)
        needed, run = self.made.prepare(stage, self.groups, self.lent[stage], in_parts)
        return needed, jax.jit(run, out_shardings=self._lying(stage, mesh))

    def _lying(self, stage: int, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
        """Shardings of what lies on a stage for all its tasks."""
        own, layout = self.made.of(stage), self.layouts[stage]
        on = partial(jax.NamedSharding, mesh)
        return (
            [
                on(layout.lying.get(p, jax.P()))
                for p in outside_of(own)
                if p not in self.lent[stage]
            ],
            [on(jax.P(None, *layout.grouped(layout.parts.get(p)))) for p in parts_of_tasks(own)],
            [on(layout.grouped(layout.sums.get(p))) for p in sums_of(own)],
        )

    def _compiled(self, task: TaskProgram, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
        layout, given = self.layouts[task.stage], self.donated[task.stage, task.kind]
        run = task_on_groups(
            layout.compute(self.program, task, mesh), task, given, self.groups, mesh
        )
        run.__name__ = program_name(task.stage, task.kind)
        outs = [jax.NamedSharding(mesh, layout.grouped(layout.local.get(p))) for p in task.outs]
        sums = [jax.NamedSharding(mesh, layout.grouped(layout.sums.get(p))) for p in task.sums]
        return jax.jit(run, donate_argnums=4, out_shardings=(outs, sums, None))

    def _update(self, group: Group, over: Sequence[int]) -> Callable[..., Any]:
        """The program of a part of what comes after the loop. over: what it overwrites."""
        mesh, layout = self.meshes[0][group.stage], self.layouts[group.stage]
        wanted = [
            jax.NamedSharding(mesh, layout.whole[p]) if p in layout.whole else None
            for p in group.outs
        ]
        in_parts = layout.in_parts(mesh)

        def run(given: Sequence[Any], kept: Sequence[Any], made: Any, ins: Any) -> list[Any]:
            known = dict(zip(over, given, strict=True))
            own = iter(kept)
            inputs = [known[p] if p in known else next(own) for p in group.inputs]
            return run_group(self.program, group, in_parts, inputs, made, ins)

        return jax.jit(run, donate_argnums=0, out_shardings=wanted)

    def _share(self, stage: int, other: int) -> bool:
        """Whether two stages have a device in common."""
        pairs = ((set(way[stage].devices.flat), way[other].devices.flat) for way in self.meshes)
        return any(not own.isdisjoint(others) for own, others in pairs)

    def _argument(self, p: int, flat: Sequence[Any], stage: int, mesh: jax.sharding.Mesh) -> Any:
        """An argument, or a slice of one, as a stage has it."""
        wanted = jax.NamedSharding(mesh, self.layouts[stage].whole.get(p, jax.P()))
        cut = self.made.stacked.cuts.get(p)
        if cut is not None:
            return piece(flat[self.places[cut.argument]], cut, wanted)
        x = flat[self.places[p]]
        return jax.device_put(jnp.asarray(x) if isinstance(x, StackedArray) else x, wanted)

    def __call__(self, *flat: Any) -> list[Any]:
        """The results of the function, flat."""
        placed = [
            [self._placed(way, stage, flat) for stage in range(self.stages.count)]
            for way in range(len(self.meshes))
        ]
        state = [
            [self._prepared(way, stage, own) for stage, own in enumerate(each)]
            for way, each in enumerate(placed)
        ]
        shelf = Shelf(self.between, self.made.after, self._send)
        self.flight = InFlight(self.limits, self.ahead)
        for row in self.rows:
            if row.kind in ("O", "R"):
                self._move(row, shelf)
                continue
            for kind in "BW" if row.kind == "BW" else row.kind:
                self._start(row, kind, state, shelf)
        return self._after(flat, placed[0], state, shelf)

    def _send(self, place: int, x: Any, microbatch: int, stage: int) -> Any:
        layout, mesh = self.layouts[stage], self.meshes[self.schedule.way_of[microbatch]][stage]
        wanted = jax.NamedSharding(mesh, layout.grouped(layout.local.get(place)))
        return x if x.sharding == wanted else jax.device_put(x, wanted)

    def _placed(self, way: int, stage: int, flat: Sequence[Any]) -> dict[int, Any]:
        """The arguments, and slices of them, that a stage needs, each one time."""
        needed = dict.fromkeys((*self.lent[stage], *self.needed[stage]))
        if way == 0:
            own = (g for g in self.updating if g.stage == stage)
            needed.update(dict.fromkeys(p for g in own for p in g.inputs))
        return {p: self._argument(p, flat, stage, self.meshes[way][stage]) for p in needed}

    def _prepared(self, way: int, stage: int, placed: Mapping[int, Any]) -> _OnStage:
        own = self.made.of(stage)
        lent = {p: placed[p] for p in self.lent[stage]}
        needed = [placed[p] for p in self.needed[stage]]
        outside, parts, sums = self.prepare[way][stage](*needed)
        computed = [p for p in outside_of(own) if p not in lent]
        return _OnStage(
            {**lent, **dict(zip(computed, outside, strict=True))},
            dict(zip(parts_of_tasks(own), parts, strict=True)),
            dict(zip(sums_of(own), sums, strict=True)),
        )

    def _start(
        self, row: Row, kind: str, state: Sequence[Sequence[_OnStage]], shelf: Shelf
    ) -> None:
        m, device = row.microbatch, row.device
        stage = self.schedule.piece(device, row.task)
        task = self.made.tasks.get((stage, kind))
        if kind == "F":
            self.flight.take(device)
        if task is None:
            if kind == "W":
                self.flight.nothing_to_do(device, (m, stage))
            return
        self.flight.room_for_task(device)
        way = self.schedule.way_of[m]
        on = state[way][stage]
        ins = shelf.take(task, m)
        given = self.donated[stage, kind]
        outs, sums, done = self.steps[way][stage, kind](
            np.int32(m),
            [on.outside[p] for p in task.outside],
            [on.parts[p] for p in task.parts],
            [x for p, x in ins.items() if p not in given],
            ([ins.pop(p) for p in given], [on.sums[p] for p in task.sums]),
        )
        self.flight.started(device, (m, stage), [done], frees=kind == "W")
        on.sums.update(zip(task.sums, sums, strict=True))
        for p, x in zip(task.outs, outs, strict=True):
            shelf.put(p, m, stage, x)

    def _move(self, row: Row, shelf: Shelf) -> None:
        """Send to the host, or fetch back, what only the backward tasks of a stage need."""
        m = row.microbatch
        stage = self.schedule.piece(row.device, row.task)
        there = self.host
        if not there:
            return
        if row.kind == "R":
            self.flight.take(row.device)
            mesh = self.meshes[self.schedule.way_of[m]][stage]
            there = mesh.devices.flat[0].default_memory().kind
        moved = []
        for key in shelf.activations(m, stage):
            x = shelf.values[key]
            shelf.values[key] = jax.device_put(x, x.sharding.with_memory_kind(there))
            moved.append(shelf.values[key])
        if row.kind == "O":
            self.flight.started(row.device, (m, stage), moved, frees=True, is_task=False)

    def _after(
        self,
        flat: Sequence[Any],
        placed: Sequence[Mapping[int, Any]],
        state: Sequence[Sequence[_OnStage]],
        shelf: Shelf,
    ) -> list[Any]:
        """What comes after the loop; each result on the stage that makes it."""
        found: dict[int, Any] = dict(zip(self.program.inputs, flat, strict=True))
        for group, over, run in zip(self.updating, self.overwritten, self.updates, strict=True):
            mesh = self.meshes[0][group.stage]
            send = partial(_sent, mesh=mesh)
            made = [list(map(send, self._made(p, state, shelf))) for p in group.made]
            own = placed[group.stage]
            outs = run(
                [own[p] for p in over],
                [own[p] for p in group.inputs if p not in over],
                made,
                [_sent(found[p], mesh, whole=True) for p in group.ins],
            )
            found.update(zip(group.outs, outs, strict=True))
        for p, parts in self.made.stacked.joins.items():
            found[p] = put_together([found[q] for q in parts])
        return [
            jnp.asarray(p.val) if isinstance(p, Literal) else found[p] for p in self.program.outputs
        ]

    def _made(self, p: int, state: Sequence[Sequence[_OnStage]], shelf: Shelf) -> list[Any]:
        """What the loop has made for a place: sums of each direction, or values of each step."""
        if self.program.views[p] is PARTIAL:
            return [on.sums[p] for way in state for on in way if p in on.sums]
        home, _ = self.between.homes[p]
        return [shelf.values[p, m, home] for m in range(self.schedule.microbatches)]


class _OnStage:
    """What lies on a stage: whole values, all parts of the batch, sums so far."""

    def __init__(self, outside: Any, parts: Any, sums: Any) -> None:
        self.outside, self.parts, self.sums = outside, parts, sums


def costs_of(stages: Stages) -> StageCosts:
    """Costs of a schedule's pieces, in FLOPs, to order tasks by.

    No task takes nothing: what waits for another comes after it in the order of their times.
    """
    least = max(1.0, *(x for s in stages.flops for x in s.values())) * 1e-6
    f, b, w = (tuple(max(s[kind], least) for s in stages.flops) for kind in "FBW")
    ones = (1.0,) * stages.count
    link = tuple(sum(each) / 2 for each in zip(f, b, w, strict=True))
    return StageCosts(f, b, w, 0.0, ones, ones, link)


def _host_memory(meshes: Sequence[Sequence[jax.sharding.Mesh]]) -> str:
    """The kind of memory that all devices can reach on the host, "" where all of theirs is."""
    devices = [d for way in meshes for mesh in way for d in mesh.devices.flat]
    kinds = [
        {m.kind for m in d.addressable_memories()} - {d.default_memory().kind} for d in devices
    ]
    known = ("pinned_host", "unpinned_host")
    return next((k for k in known if all(k in own for own in kinds)), "")


def _sent(x: Any, mesh: jax.sharding.Mesh, whole: bool = False) -> Any:
    """An array on the devices of a stage, split as it was; or whole, if it comes from another."""
    if isinstance(x.sharding, jax.NamedSharding) and x.sharding.mesh == mesh:
        return x
    spec = x.sharding.spec if isinstance(x.sharding, jax.NamedSharding) else jax.P()
    wanted = jax.NamedSharding(mesh, jax.P() if whole else spec)
    return x if x.sharding == wanted else jax.device_put(x, wanted)
