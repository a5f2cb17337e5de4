"""Who starts which task when?  A single controller, along the table of a schedule.

Every stage has devices of its own. The controller walks the table in the order of its times and
starts each task on its stage's devices; arrays are futures, so that starting returns before the
work is done, and stages work beside one another (as in Pathways, Barham et al., arXiv 2203.12533).
What a task makes is sent to the stage that needs it at once, and let go when the last task that
needs it has been started. The controller is never more than a few tasks of a device ahead of what
is done, so that little more lies in memory than the table says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from autoshard.after_stages import run_group, update_groups
from autoshard.jax_compat import Literal
from autoshard.stage_programs import (
    StagePrograms,
    TaskProgram,
    outside_of,
    parts_of_tasks,
    run_task,
    stage_programs,
    sums_of,
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
    many tasks of a device may be started that are not done yet.
    """

    def __init__(
        self,
        traced: Traced,
        loop: TimeLoop,
        stages: Stages,
        schedule: Schedule,
        devices: Sequence[Sequence[Any]],
        ahead: int = 2,
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
        both = (*timeline.rows, *timeline.transfers)
        self.rows = sorted(both, key=lambda r: (r.start, r.end, r.device))
        self.needed, prepare = zip(
            *(self.made.prepare(stage) for stage in range(stages.count)), strict=True
        )
        self.prepare = [jax.jit(run) for run in prepare]
        homes = {p: t.stage for t in self.made.tasks.values() for p in (*t.outs, *t.sums)}
        self.groups = update_groups(self.program, {p: homes[p] for p in self.made.after})
        self.updates = [jax.jit(partial(run_group, self.program, g)) for g in self.groups]
        self.steps = {key: self._compiled(task) for key, task in self.made.tasks.items()}
        self.users: dict[int, int] = {}
        for task in self.made.tasks.values():
            for p in task.ins:
                self.users[p] = self.users.get(p, 0) + 1

    def _compiled(self, task: TaskProgram) -> Callable[..., Any]:
        return jax.jit(partial(run_task, self.program, task), donate_argnums=4)

    def __call__(self, *flat: Any) -> list[Any]:
        """The results of the function, flat."""
        state = [
            [self._prepared(stage, mesh, flat) for stage, mesh in enumerate(meshes)]
            for meshes in self.meshes
        ]
        values: dict[tuple[int, int], Any] = {}
        left: dict[tuple[int, int], int] = {}
        self.started: list[deque[Any]] = [deque() for _ in range(self.schedule.devices)]
        for row in self.rows:
            if row.kind in ("O", "R"):
                self._move(row, values)
                continue
            for kind in "BW" if row.kind == "BW" else row.kind:
                self._start(row, kind, state, values, left)
        return self._after(flat, state, values)

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
        self,
        row: Row,
        kind: str,
        state: Sequence[Sequence[_OnStage]],
        values: dict[tuple[int, int], Any],
        left: dict[tuple[int, int], int],
    ) -> None:
        m = row.microbatch
        stage = self.schedule.piece(row.device, row.task)
        task = self.made.tasks.get((stage, kind))
        if task is None:
            return
        way = self.schedule.way_of[m]
        on, mesh = state[way][stage], self.meshes[way][stage]
        outs, sums = self.steps[stage, kind](
            np.int32(m),
            [on.outside[p] for p in task.outside],
            [on.parts[p] for p in task.parts],
            [_sent(values[p, m], mesh) for p in task.ins],
            [on.sums[p] for p in task.sums],
        )
        self._wait(row.device, [*outs, *sums])
        on.sums.update(zip(task.sums, sums, strict=True))
        for p, x in zip(task.outs, outs, strict=True):
            values[p, m] = x
            left[p, m] = self.users.get(p, 0)
        for p in task.ins:
            left[p, m] -= 1
            if not left[p, m] and p not in self.made.after:
                del values[p, m]

    def _wait(self, device: int, made: Sequence[Any]) -> None:
        """Until what was started a few tasks before this one is done."""
        started = self.started[device]
        if made:
            started.append(made[0])
        if len(started) > self.ahead:
            before = started.popleft()
            if not before.is_deleted():  # a sum that a later task has taken over
                before.block_until_ready()

    def _move(self, row: Row, values: dict[tuple[int, int], Any]) -> None:
        """Send to the host, or fetch back, what only the backward tasks of a stage need."""
        m, kind = row.microbatch, "F" if row.kind == "O" else "B"
        stage = self.schedule.piece(row.device, row.task)
        mesh = self.meshes[self.schedule.way_of[m]][stage]
        own, there = self.made.tasks.get((stage, "F")), _host_memory(mesh)
        sent = {p for (s, _), t in self.made.tasks.items() if s > stage for p in t.ins}
        for p in own.outs if own and there else ():
            if p not in sent and (p, m) in values:
                wanted = there if kind == "F" else mesh.devices.flat[0].default_memory().kind
                x = values[p, m]
                values[p, m] = jax.device_put(x, x.sharding.with_memory_kind(wanted))

    def _after(
        self,
        flat: Sequence[Any],
        state: Sequence[Sequence[_OnStage]],
        values: dict[tuple[int, int], Any],
    ) -> list[Any]:
        """What comes after the loop; each result on the stage that makes it."""
        given = dict(zip(self.program.inputs, flat, strict=True))
        found: dict[int, Any] = {}
        for group, run in zip(self.groups, self.updates, strict=True):
            mesh = self.meshes[0][group.stage]
            send = partial(_sent, mesh=mesh, whole=True)
            made = [list(map(send, self._made(p, state, values))) for p in group.made]
            outs = run(
                [_placed(given[p], mesh) for p in group.inputs],
                made,
                [send(found[p]) for p in group.ins],
            )
            found.update(zip(group.outs, outs, strict=True))
        return [p.val if isinstance(p, Literal) else found[p] for p in self.program.outputs]

    def _made(
        self, p: int, state: Sequence[Sequence[_OnStage]], values: dict[tuple[int, int], Any]
    ) -> list[Any]:
        """What the loop has made for a place: sums of each direction, or values of each step."""
        if self.program.views[p] is PARTIAL:
            return [on.sums[p] for way in state for on in way if p in on.sums]
        return [values[p, m] for m in range(self.program.steps)]


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


def _host_memory(mesh: jax.sharding.Mesh) -> str:
    """The kind of memory that the devices can reach on the host, "" where all of theirs is."""
    device = mesh.devices.flat[0]
    kinds = {m.kind for m in device.addressable_memories()} - {device.default_memory().kind}
    return next((k for k in ("pinned_host", "unpinned_host") if k in kinds), "")


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
