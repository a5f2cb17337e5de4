"""What was decided of a pipeline?  A PipelinePlan is plain data, as a Plan is.

The stages of a pipeline are cut from one function; alike ones share a Plan, of what a stage does in
a step, on the mesh of one data-parallel group. `to_json` and `from_json` as of a Plan.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cost_models.cluster import Cluster
from passes.ir.mesh import Mesh
from passes.ir.plan import Alternative, Cost, Plan, PlanError, TimeAxis, check_plan, read_as

VERSION = 3
MARK = '"pipeline_version"'  # stands in the JSON of each of them


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of the model. plan: which of the plans is its own.

    forward, backward, weight: seconds of a microbatch's tasks; update: of what comes before and
    after the loop. lying: bytes per device that are always there; working, updating: at most more
    while a task or the update runs. activation: bytes per microbatch from F to the end of B, kept:
    to the end of W. sent: bytes per device to the next stage in a microbatch. reduced, scattered,
    gathered: bytes per device of sums that each group gets in a step, of those of which it gets a
    part, and of what is put together from parts. spared: bytes per device that lie less, because
    groups have the optimizer's state in parts.
    """

    plan: int
    forward: float
    backward: float
    weight: float
    update: float
    lying: float
    working: float
    updating: float
    activation: float
    kept: float
    sent: float
    reduced: float
    scattered: float
    gathered: float
    spared: float


@dataclass(frozen=True, slots=True)
class Table:
    """A schedule: per way the (device, chunk) of each piece; per microbatch its way; per device its
    tasks as text, `F3`, or `BW3.1` on its second chunk; likewise of its host link, after a blank
    the task with which it may begin.
    """

    name: str
    ways: tuple[tuple[tuple[int, int], ...], ...]
    way_of: tuple[int, ...]
    orders: tuple[tuple[str, ...], ...]
    transfers: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """The answer: stages x groups x mesh, the schedule, and what each piece of the model does.

    mesh: axes that a group shards over. microbatches: of each group. time_axis:
    over those of all groups. apart: whether gradients of weights are tasks of their own.
    shared_update: whether each group updates a part of the state, and holds no other. send:
    seconds from a stage to the next. tails, memory: per device of the schedule, seconds after its
    last task, and bytes. remat: as of a Plan.
    """

    name: str
    fingerprint: str
    signature: tuple[str, ...]
    cluster: Mapping[str, Any]
    stages: int
    chunks: int
    groups: int
    mesh: tuple[tuple[str, int], ...]
    microbatches: int
    time_axis: TimeAxis
    apart: bool
    shared_update: bool
    table: Table
    send: float
    tails: tuple[float, ...]
    memory: tuple[float, ...]
    memory_limit: float
    cost: Cost
    pieces: tuple[Piece, ...]
    plans: tuple[Plan, ...]
    donated: tuple[int, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()
    fused_attention: bool = False
    remat: tuple[int, ...] = ()
    pipeline_version: int = VERSION

    @property
    def mesh_axes(self) -> Mesh:
        """The mesh of a group as axes."""
        return Mesh(tuple(n for n, _ in self.mesh), tuple(s for _, s in self.mesh))

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        """All devices: stages, groups, and the axes of a group."""
        return (("stage", self.stages), ("data", self.groups), *self.mesh)

    @property
    def devices(self) -> int:
        """How many devices it takes."""
        return self.stages * self.groups * self.mesh_axes.devices

    def to_json(self) -> str:
        """The plan as JSON text; the same plan gives the same text."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, default=dict) + "\n"

    @staticmethod
    def from_json(text: str) -> PipelinePlan:
        """Read `to_json`'s text; raises PlanError for anything else."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise PlanError(f"this is not a plan: the JSON is broken, {error}") from None
        if not is_pipeline(data):
            raise PlanError("this is JSON, but not a plan of a pipeline: it has no pieces")
        if data.get("pipeline_version") != VERSION:
            raise PlanError(
                f"this plan has schema version {data.get('pipeline_version')!r} of pipelines, and "
                f"this autoshard reads {VERSION}: plan again, or use the autoshard that wrote it"
            )
        try:
            plan: PipelinePlan = read_as(PipelinePlan, data)
            _check(plan)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this plan is damaged: {error}") from None
        return plan


def is_pipeline(data: Any) -> bool:
    """Whether plain data is that of a PipelinePlan."""
    return isinstance(data, dict) and "pipeline_version" in data


def _check(plan: PipelinePlan) -> None:
    """ValueError where its parts do not belong together."""
    cluster: Cluster = read_as(Cluster, plan.cluster)
    if plan.devices != cluster.devices:
        raise ValueError(f"it takes {plan.devices} devices, its cluster {cluster.devices}")
    if len(plan.pieces) != plan.stages * plan.chunks:
        raise ValueError(f"it has {len(plan.pieces)} pieces for {plan.stages} stages")
    if not all(0 <= p.plan < len(plan.plans) for p in plan.pieces):
        raise ValueError("a piece has no plan")
    for own in plan.plans:
        check_plan(own, plan.mesh_axes.devices)
