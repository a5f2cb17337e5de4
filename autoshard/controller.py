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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from autoshard.after_stages import run_group, update_groups
from autoshard.between_tasks import Shelf, donated, handed_on
from autoshard.in_flight import InFlight
from autoshard.jax_compat import Literal
from autoshard.stage_notes import held_whole, not_moved
from autoshard.stage_programs import (
    StagePrograms,
    TaskProgram,
    outside_of,
    parts_of_tasks,
    stage_programs,
    sums_of,
    task_function,
)
from autoshard.time_loop import Program
from autoshard.trace import Traced
from passes.pipeline.schedule import Schedule
from passes.pipeline.stage_costs import StageCosts
from passes.pipeline.timeline import Row, simulate
from passes.stages import Stages
from passes.time_axis import PARTIAL, Split
from passes.time_loop import TimeLoop

_SPLIT = "data"  # the one axis of a stage's mesh


class Controller:
    """Runs a traced function over stages.

    devices: per device of the schedule those that its stages run on, as many for each. ahead: how
    many tasks of a device may be started that are not done yet. notes: what is done otherwise than
    asked for. flight: what lay in memory in the last call.
    """

    def __init__(
        self,
        traced: Traced,
        loop: TimeLoop,
        stages: Stages,
        schedule: Schedule,
        devices: Sequence[Sequence[Any]],
        ahead: int = 32,
    ) -> None:
        self.ahead = ahead
        self.traced, self.schedule, self.stages = traced, schedule, stages
        self.program = Program(traced, loop)
        self.made: StagePrograms = stage_programs(self.program, stages)
        self.meshes = [
            [jax.sharding.Mesh(np.array(devices[d]), (_SPLIT,)) for d, _ in way]
            for way in schedule.ways
        ]
        timeline = simulate(schedule, costs_of(stages))
        self.host = _host_memory(self.meshes)
        alone = dataclasses.replace(schedule, transfers=())
        self.limits = timeline.peaks if self.host else simulate(alone, costs_of(stages)).peaks
        self.notes = (
            *(() if self.host else not_moved(schedule, timeline.peaks, self.limits)),
            *held_whole(self.made, [mesh.size for mesh in self.meshes[0]]),
        )
        both = (*timeline.rows, *timeline.transfers)
        self.rows = sorted(both, key=lambda r: (r.start, r.end, r.device))
        self.needed, prepare = zip(
            *(self.made.prepare(stage) for stage in range(stages.count)), strict=True
        )
        self.prepare = [jax.jit(run) for run in prepare]
        homes = {p: t.stage for t in self.made.tasks.values() for p in (*t.outs, *t.sums)}
        after = {p: homes[p] for p in self.made.after}
        self.groups = update_groups(self.program, after, self.made.stacked)
        self.updates = [jax.jit(partial(run_group, self.program, g)) for g in self.groups]
        self.between = handed_on(self.made)
        self.donated = {
            key: donated(self.made, task, self.between, self._share)
            for key, task in self.made.tasks.items()
        }
        self.steps = {key: self._compiled(task) for key, task in self.made.tasks.items()}
        self.flight = InFlight(self.limits, ahead)

    def _compiled(self, task: TaskProgram) -> Callable[..., Any]:
        given = self.donated[task.stage, task.kind]
        return jax.jit(task_function(self.program, task, given), donate_argnums=4)

    def _share(self, stage: int, other: int) -> bool:
        """Whether two stages have a device in common."""
        pairs = ((set(way[stage].devices.flat), way[other].devices.flat) for way in self.meshes)
        return any(not own.isdisjoint(others) for own, others in pairs)

    def __call__(self, *flat: Any) -> list[Any]:
        """The results of the function, flat."""
        state = [
            [self._prepared(stage, mesh, flat) for stage, mesh in enumerate(meshes)]
            for meshes in self.meshes
        ]
        shelf = Shelf(self.between, self.made.after, self._send)
        self.flight = InFlight(self.limits, self.ahead)
        for row in self.rows:
            if row.kind in ("O", "R"):
                self._move(row, shelf)
                continue
            for kind in "BW" if row.kind == "BW" else row.kind:
                self._start(row, kind, state, shelf)
        return self._after(flat, state, shelf)

    def _send(self, x: Any, microbatch: int, stage: int) -> Any:
        return _sent(x, self.meshes[self.schedule.way_of[microbatch]][stage])

    def _prepared(self, stage: int, mesh: jax.sharding.Mesh, flat: Sequence[Any]) -> _OnStage:
        own = self.made.of(stage)
        given = dict(zip(self.program.inputs, flat, strict=True))
        placed = [_placed(given[p], mesh) for p in self.needed[stage]]
        outside, parts, sums = self.prepare[stage](*placed)
        named = parts_of_tasks(own)
        split = [_split(x, part, mesh) for x, (_, part) in zip(parts, named, strict=True)]
        return _OnStage(
            dict(zip(outside_of(own), outside, strict=True)),
            dict(zip(named, split, strict=True)),
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
        on = state[self.schedule.way_of[m]][stage]
        ins = shelf.take(task, m)
        given = self.donated[stage, kind]
        outs, sums, done = self.steps[stage, kind](
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
        state: Sequence[Sequence[_OnStage]],
        shelf: Shelf,
    ) -> list[Any]:
        """What comes after the loop; each result on the stage that makes it."""
        given = dict(zip(self.program.inputs, flat, strict=True))
        found: dict[int, Any] = {}
        for group, run in zip(self.groups, self.updates, strict=True):
            mesh = self.meshes[0][group.stage]
            send = partial(_sent, mesh=mesh, whole=True)
            made = [list(map(send, self._made(p, state, shelf))) for p in group.made]
            outs = run(
                [_placed(given[p], mesh) for p in group.inputs],
                made,
                [send(found[p]) for p in group.ins],
            )
            found.update(zip(group.outs, outs, strict=True))
        return [p.val if isinstance(p, Literal) else found[p] for p in self.program.outputs]

    def _made(self, p: int, state: Sequence[Sequence[_OnStage]], shelf: Shelf) -> list[Any]:
        """What the loop has made for a place: sums of each direction, or values of each step."""
        if self.program.views[p] is PARTIAL:
            return [on.sums[p] for way in state for on in way if p in on.sums]
        home, _ = self.between.homes[p]
        return [shelf.values[p, m, home] for m in range(self.program.steps)]


class _OnStage:
    """What lies on a stage: whole values, all parts of the batch, sums so far."""

    def __init__(self, outside: Any, parts: Any, sums: Any) -> None:
        self.outside, self.parts, self.sums = outside, parts, sums


def costs_of(stages: Stages) -> StageCosts:
    """Costs of a schedule's pieces, in FLOPs, to order tasks by."""
    f, b, w = (tuple(s[kind] for s in stages.flops) for kind in "FBW")
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


def _split(x: Any, part: Split, mesh: jax.sharding.Mesh) -> Any:
    """All parts of a batch, each split over the devices of a stage, where it can be."""
    dims: list[Any] = [None] * x.ndim
    if x.shape[part.dim + 1] % mesh.size == 0:
        dims[part.dim + 1] = _SPLIT
    return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*dims)))


def _placed(x: Any, mesh: jax.sharding.Mesh) -> Any:
    """An argument on the devices of a stage, whole."""
    return jax.device_put(x, jax.NamedSharding(mesh, jax.P()))


def _sent(x: Any, mesh: jax.sharding.Mesh, whole: bool = False) -> Any:
    """An array on the devices of a stage, split there as it was, or whole."""
    spec = x.sharding.spec if isinstance(x.sharding, jax.NamedSharding) else jax.P()
    wanted = jax.NamedSharding(mesh, jax.P() if whole else spec)
    return x if x.sharding == wanted else jax.device_put(x, wanted)
