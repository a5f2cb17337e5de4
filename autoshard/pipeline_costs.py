"""What does a pipeline of this form cost?  `PipelineCosts(...).of(form, schedule) -> Pipeline`.

A form says how many stages, chunks, data-parallel groups and microbatches there are, and over which
mesh each group shards what it has. The function is cut, each piece is planned on the devices of one
group (`autoshard.stage_prices`; pieces of one structure once), and a schedule of that name is made
for what the tasks take (`passes.pipeline`). After its last task a device sums its gradients over
the groups and updates its weights.

*memory* of a device: what lies there for all its pieces, and the most of: activations that the
schedule keeps there and what the largest task needs; what the largest update needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from autoshard.alike_pieces import form_of
from autoshard.cut_program import CutProgram, cut_program
from autoshard.in_parts import stage_parts
from autoshard.in_stages import pieced
from autoshard.stage_prices import StagePrice, price_stage, traced_stage
from autoshard.stage_step import StageStep, stage_step
from autoshard.time_axes import BATCH
from autoshard.trace import Traced
from cost_models.cluster import Cluster
from cost_models.collectives import seconds
from cost_models.topology import AxisLink, lay
from cost_models.units import format_bytes
from passes.ir.mesh import Mesh
from passes.ir.plan import TimeAxis
from passes.op_seconds import op_seconds
from passes.over_groups import Parts
from passes.pipeline.published import OfPieces, timeline_of
from passes.pipeline.stage_costs import StageCosts
from passes.pipeline.timeline import Timeline
from passes.search import NoFeasiblePlan

_ROUNDS = 2  # of planning the pieces again with less memory for each


@dataclass(frozen=True, slots=True)
class Form:
    """How the devices are used: stages x groups x the mesh of a group.

    chunks: pieces of the model per stage. microbatches: of each group. apart: whether the gradients
    of weights are tasks of their own. shared_update: whether groups have the optimizer's state in
    parts (`passes.over_groups`).
    """

    stages: int
    groups: int
    mesh: Mesh
    microbatches: int
    chunks: int = 1
    apart: bool = False
    shared_update: bool = False

    @property
    def pieces(self) -> int:
        """Into how many pieces the model is cut."""
        return self.stages * self.chunks

    @property
    def steps(self) -> int:
        """Into how many parts the batch is cut in all."""
        return self.microbatches * self.groups

    @property
    def devices(self) -> int:
        """How many devices it takes."""
        return self.stages * self.groups * self.mesh.devices

    def __str__(self) -> str:
        inside = " ".join(f"{n}={s}" for n, s in self.mesh.as_dict().items() if s > 1)
        chunks = f" in {self.chunks} chunks each" if self.chunks > 1 else ""
        return (
            f"{self.stages} stages{chunks}, data={self.groups} {inside}, "
            f"{self.microbatches} microbatches"
        ).replace(" ,", ",")


@dataclass(frozen=True)
class Pipeline:
    """A form with a schedule and all prices. tails: per device seconds after its last task;
    memory: per device bytes at its fullest moment.
    """

    form: Form
    cut: CutProgram
    prices: tuple[StagePrice, ...]
    timeline: Timeline
    tails: tuple[float, ...]
    memory: tuple[float, ...]

    @cached_property
    def step_time(self) -> float:
        """Seconds of a step."""
        last = [0.0] * self.timeline.schedule.devices
        for row in self.timeline.rows:
            last[row.device] = max(last[row.device], row.end)
        return max(end + tail for end, tail in zip(last, self.tails, strict=True))


class PipelineCosts:
    """Prices forms of one function on one cluster; remembers what it has cut and planned."""

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        cluster: Cluster,
        limit: float,
        hints: Mapping[str, Any] | None = None,
        fused_attention: bool = False,
        solver: str = "ilp",
        over: TimeAxis = BATCH,
        shared_update: bool | None = None,
        traced: Traced | None = None,
    ) -> None:
        self.call = fn, args, kwargs, options
        self.as_written = traced  # the function as it is, where that is known
        self.shared_update = shared_update  # whether groups share the update; None for the better
        self.cluster, self.limit, self.hints = cluster, limit, dict(hints or {})
        self.fused_attention, self.solver, self.over = fused_attention, solver, over
        self.weigh = partial(op_seconds, cluster=cluster, fused_attention=fused_attention)
        self.cuts: dict[tuple[int, int, bool], CutProgram] = {}
        self.pieced: dict[int, Traced] = {}
        self.traced: dict[Any, tuple[StageStep, Traced]] = {}
        self.planned: dict[Any, StagePrice] = {}
        self.least: tuple[float, str] | None = None  # of what did not fit, the smallest: bytes

    def cut(self, form: Form) -> CutProgram:
        """The function cut so; NoTimeLoop and NoStages where it can not be."""
        key = form.steps, form.pieces, form.apart
        if key not in self.cuts:
            if form.pieces not in self.pieced:
                self.pieced[form.pieces] = pieced(
                    *self.call, count=form.pieces, weigh=self.weigh, traced=self.as_written
                )
            self.cuts[key] = cut_program(
                *self.call,
                steps=form.steps,
                over=self.over,
                pieces=form.pieces,
                apart=form.apart,
                weigh=self.weigh,
                given=self.pieced[form.pieces],
            )
        return self.cuts[key]

    def of(self, form: Form, name: str) -> Pipeline:
        """The form with a schedule of that name, the update shared by groups where that is as good.

        Raises NoTimeLoop, NoStages, ScheduleError, and NoFeasiblePlan where it does not fit.
        """
        if form.groups == 1 or self.shared_update is False:
            return self.fitted(form, name)
        shared = self.fitted(replace(form, shared_update=True), name)
        if self.shared_update or self._surely_as_good(shared):
            return shared
        try:
            whole = self.fitted(form, name)
        except NoFeasiblePlan:
            return shared
        return shared if shared.step_time <= whole.step_time else whole

    def _surely_as_good(self, shared: Pipeline) -> bool:
        """Whether it takes no longer that groups share the update: no more for what they exchange

        than they would else need to read and write the state that they have in parts.
        """
        data, rate = self.links(shared.form)[1], self.cluster.chip.hbm_bandwidth
        return all(
            p.exchanged.seconds(data) <= p.exchanged.as_whole().seconds(data) + 2 * p.spared / rate
            for p in shared.prices
        )

    def fitted(self, form: Form, name: str) -> Pipeline:
        """This form with a schedule of that name. Raises as `of`."""
        cut, limit = self.cut(form), self.limit / form.chunks
        try:
            prices = self.prices(form, cut, limit)
        except NoFeasiblePlan:
            if form.chunks == 1:
                raise
            limit = self.limit  # what a task needs, only one chunk does at a time
        for _ in range(_ROUNDS):
            prices = self.prices(form, cut, limit)
            found = self.scheduled(form, cut, prices, name)
            needed = max(found.memory)
            over = needed - self.limit
            if over <= 0:
                return found
            self.least = min(self.least or (needed, ""), (needed, f"{form} with {name}"))
            limit -= over / form.chunks * 1.02
            if limit <= 0:
                break
        raise NoFeasiblePlan(
            f"{form} with {name}: a device needs {format_bytes(needed)}, and has "
            f"{format_bytes(self.limit)}"
        )

    def prices(self, form: Form, cut: CutProgram, limit: float) -> tuple[StagePrice, ...]:
        """Every piece, planned."""
        return tuple(self._price(form, cut, k, limit) for k in range(form.pieces))

    def _price(self, form: Form, cut: CutProgram, piece: int, limit: float) -> StagePrice:
        used = form_of(cut, piece, bool(self.hints)), replace(form, stages=1, chunks=1)
        key = *used, form.devices
        if (key, limit) not in self.planned:
            of_cut = key, form.pieces  # places are those of a cut
            if of_cut not in self.traced:
                step = stage_of(cut, piece, form)
                self.traced[of_cut] = step, traced_stage(step, cut.names)
            self.planned[key, limit] = price_stage(
                *self.traced[of_cut],
                self.cluster,
                form.mesh,
                limit,
                cut.state,
                cut.donated,
                self.hints,
                self.fused_attention,
                self.solver,
                self.over.name,
            )
        return self.planned[key, limit]

    def scheduled(
        self, form: Form, cut: CutProgram, prices: Sequence[StagePrice], name: str
    ) -> Pipeline:
        """A schedule for these prices; ScheduleError where there is none of that name."""
        stages, data = self.links(form)
        costs = StageCosts(
            tuple(p.seconds["F"] for p in prices),
            tuple(p.seconds["B"] for p in prices),
            tuple(p.seconds["W"] for p in prices),
            max(seconds("permute", p.sent, stages) for p in prices) if form.stages > 1 else 0.0,
            tuple(p.activation for p in prices),
            tuple(p.kept for p in prices),
            tuple(self.over_host_link(p.activation) for p in prices),
        )
        lying = max(p.lying + p.working for p in prices) * form.chunks
        room = max(self.limit - lying, max(costs.activation) * form.chunks)
        setting = OfPieces(form.stages, form.microbatches, form.chunks, costs, room)
        timeline = timeline_of(name, setting)
        held = _held(timeline)
        tails, memory = [], []
        for own, activations in zip(held, timeline.peaks, strict=True):
            here = [prices[k] for k in own]
            tails.append(sum(_tail(p, data) for p in here))
            most = max(activations + max(p.working for p in here), max(p.updating for p in here))
            memory.append(sum(p.lying for p in here) + most)
        return Pipeline(form, cut, tuple(prices), timeline, tuple(tails), tuple(memory))

    def links(self, form: Form) -> tuple[AxisLink, AxisLink]:
        """Between stages, and between the groups of one."""
        stages, groups, *_ = lay(self.cluster, (form.stages, form.groups, *form.mesh.sizes))
        return stages, groups

    def over_host_link(self, nbytes: float) -> float:
        """Seconds of so many bytes to the host, or back."""
        rate = self.cluster.chip.host_bandwidth
        return nbytes / rate if rate else 0.0


def stage_of(cut: CutProgram, piece: int, form: Form) -> StageStep:
    """What a piece does in a step, where the devices are used so."""
    over = Parts(1)
    if form.shared_update:
        over = stage_parts(cut, piece, form.groups, form.mesh.devices)
    return stage_step(cut, piece, form.microbatches, over)


def _tail(price: StagePrice, data: AxisLink) -> float:
    """Seconds after the last task: gradients are summed over the groups, weights updated."""
    return price.exchanged.seconds(data) + price.update


def _held(timeline: Timeline) -> list[list[int]]:
    """Per device the pieces that lie there."""
    out: list[list[int]] = [[] for _ in range(timeline.schedule.devices)]
    for way in timeline.schedule.ways:
        for piece, place in enumerate(way):
            out[place.device].append(piece)
    return out


__all__ = ["Form", "Pipeline", "PipelineCosts"]
