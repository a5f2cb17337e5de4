"""What does a stage cost, sharded as well as can be?  `price_stage(step, ...) -> StagePrice`.

The stage's function (`autoshard.stage_step`) is planned on the devices of one of its data-parallel
groups like any function; then seconds and bytes are told apart by task, by the place of each
operation in the function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoshard.in_parts import gathered_values
from autoshard.jax_compat import Literal, open_jaxpr
from autoshard.stage_step import TASK, StageStep
from autoshard.trace import Traced, trace
from cost_models.cluster import Cluster
from cost_models.collectives import seconds
from cost_models.topology import AxisLink
from passes.answer import Answer, read_back
from passes.held import held, lying_bytes, memory
from passes.hints import hints_for, named
from passes.ir.graph import Graph, Hint, Op
from passes.ir.mesh import Mesh
from passes.ir.plan import Axes
from passes.ir.sharding import PARTIAL
from passes.normalize import drop_dead
from passes.priced import Priced
from passes.reshard import waited_seconds
from passes.search import Found, search
from passes.time_hints import over_devices

KINDS = ("F", "B", "W")
GROUPS = "data"  # the mesh axis of the groups of a stage, each with its own part of the batch


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What the groups of a stage exchange in a step, in bytes per device.

    reduced: of sums that each group gets all of. scattered: of sums that each gets a part of.
    gathered: of what is put together from the parts of all. (Of reduced and scattered it is what a
    group has before, of gathered what it has then.)
    """

    reduced: float
    scattered: float
    gathered: float

    def seconds(self, link: AxisLink) -> float:
        """How long it takes. link: between groups."""
        if link.size == 1:
            return 0.0
        return (
            seconds("all_reduce", self.reduced, link)
            + seconds("reduce_scatter", self.scattered, link)
            + seconds("all_gather", self.gathered, link)
        )

    def as_whole(self) -> Exchanged:
        """Of the same sums, where each group gets all of each."""
        return Exchanged(self.reduced + self.scattered, 0.0, 0.0)


@dataclass(frozen=True)
class StagePrice:
    """One piece of the model on the devices of one group.

    seconds: of one microbatch, by kind of task; compute: of these without communication. update:
    seconds of what comes before and after the loop. lying: bytes per device that are there all the
    time: weights, their optimizer's state, sums of gradients. working: bytes more, at most, while a
    task runs; updating: while the update does. activation: bytes held per microbatch from F to the
    end of B; kept: to the end of W. sent: bytes per device of what the next stage gets of a
    microbatch. exchanged: bytes per device of what groups add up, and of what they put together.
    spared: bytes per device that lie less, because groups have the state in parts.
    """

    step: StageStep
    traced: Traced
    found: Found
    seconds: Mapping[str, float]
    compute: Mapping[str, float]
    update: float
    lying: float
    working: float
    updating: float
    activation: float
    kept: float
    sent: float
    exchanged: Exchanged
    spared: float


def traced_stage(step: StageStep, names: Mapping[int, str]) -> Traced:
    """The function of a stage as it is planned. names: of places of arguments."""
    traced = trace(step.run, *step.avals)
    graph = drop_dead(traced.graph)
    values = list(graph.values)
    for place, v in zip(step.arguments, graph.inputs, strict=False):
        if place in names:
            values[v] = replace(values[v], name=names[place])
    for v in graph.inputs[len(step.arguments) :]:
        values[v] = replace(values[v], name="")
    return replace(traced, graph=replace(graph, values=tuple(values), name=f"stage_{step.stage}"))


def without(hints: Sequence[Hint], axes: Sequence[str]) -> tuple[Hint, ...]:
    """Hints without mesh axes that a stage's group does not have."""

    def kept(dim: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if dim is None else tuple(a for a in dim if a not in axes)

    return tuple(replace(h, dims=tuple(map(kept, h.dims))) for h in hints)


def price_stage(
    step: StageStep,
    traced: Traced,
    cluster: Cluster,
    mesh: Mesh,
    limit: float,
    state: Mapping[int, int],
    donated: frozenset[int],
    hints: Mapping[str, Any] | None = None,
    fused_attention: bool = False,
    solver: str = "ilp",
    time_axis: str = "",
) -> StagePrice:
    """A stage on a group of devices. state: from places of arguments to those that replace them.

    donated: places whose memory the update may use. limit: bytes per device for all but the
    activations of other microbatches. time_axis: name of the axis of microbatches. Raises
    NoFeasiblePlan and HintError.
    """
    graph = traced.graph
    inputs = dict(zip(step.arguments, graph.inputs, strict=False))
    outputs = dict(zip(step.results, graph.outputs[len(step.sent) :], strict=True))
    pairs = tuple((inputs[a], outputs[r]) for a, r in state.items() if a in inputs and r in outputs)
    given = frozenset(inputs[p] for p in donated if p in inputs)
    graph = replace(graph, donated=given)
    own = hints_for_present(graph, hints or {})
    found = search(
        graph,
        cluster,
        mesh=mesh,
        hints=without(over_devices((*graph.hints, *own), (time_axis,)), ("stage", GROUPS)),
        memory_limit=limit,
        state=pairs,
        together=gathered_values(traced),
        fused_attention=fused_attention,
        solver=solver,
    )
    return told_apart(step, replace(traced, graph=graph), found)


def hints_for_present(graph: Graph, hints: Mapping[str, Any]) -> tuple[Hint, ...]:
    """The hints that mean an argument of this stage."""
    paths = [graph.values[v].name for v in graph.inputs]
    here = {glob: spec for glob, spec in hints.items() if named(glob, paths)}
    return hints_for(graph, here)


def told_apart(step: StageStep, traced: Traced, found: Found) -> StagePrice:
    """Seconds and bytes of a planned stage, by task."""
    priced = found.priced
    answer = read_back(priced, found.solution.choice)
    loop, tasks = task_paths(traced)
    compute, total = _seconds(priced, answer, loop, tasks)
    everything = list(held(priced, answer.values, answer.changes))
    line = memory(priced, everything)
    # A piece may only hold what nobody reads: then nothing is left of its loop.
    when = [priced.live.when[op.id] for op in priced.graph.ops if op.path[0] == loop] or [0]
    begin, end = min(when), max(when) + 1
    places = _Places(step, priced, answer, loop, tasks)
    found = replace(found, plan=replace(found.plan, values=places.asked(found.plan.values)))
    activation, kept = places.activations()
    exchanged = places.exchanged(traced)
    lying = sum(h.nbytes for h in everything if h.begin <= begin and h.end >= end)
    lying += exchanged.reduced + exchanged.scattered
    inside, update = float(line[begin:end].max()), [*line[:begin], *line[end:]]
    rounds = step.microbatches
    return StagePrice(
        step,
        traced,
        found,
        {k: total[k] / rounds for k in KINDS},
        {k: compute[k] / rounds for k in KINDS},
        total[""],
        lying,
        max(0.0, inside - lying - activation),
        max(0.0, float(max(update, default=0.0)) - lying),
        activation,
        min(kept, activation),
        places.sent(),
        exchanged,
        places.spared(),
    )


def task_paths(traced: Traced) -> tuple[int, Mapping[int, str]]:
    """The place of the loop over microbatches, and in its body that of each task."""
    jaxpr, _ = open_jaxpr(traced.jaxpr)
    for i, eqn in enumerate(jaxpr.eqns):
        if eqn.primitive.name == "scan":
            body, _ = open_jaxpr(eqn.params["jaxpr"])
            names = {k: str(e.params.get("name", "")) for k, e in enumerate(body.eqns)}
            tasks = {k: name[len(TASK) :] for k, name in names.items() if name.startswith(TASK)}
            if tasks:
                return i, tasks
    raise ValueError(f"{traced.graph.name} has no loop over microbatches")


def taken_whole(step: StageStep, traced: Traced) -> dict[int, int]:
    """The values in the loop that tasks take whole, by place."""
    loop, kinds = task_paths(traced)
    body, _ = open_jaxpr(open_jaxpr(traced.jaxpr)[0].eqns[loop].params["jaxpr"])
    entered = {var: k for k, var in enumerate(body.invars)}
    ops = {op.path: op for op in traced.graph.ops}
    out: dict[int, int] = {}
    for k, kind in kinds.items():
        task = next(t for t in step.tasks if t.kind == kind)
        for atom, p in zip(body.eqns[k].invars[1:], task.outside, strict=False):
            where = -1 if isinstance(atom, Literal) else entered.get(atom, -1)
            op = ops.get((loop, "in", where))
            if op is not None:
                out[p] = op.outputs[0]
    return out


def _kind(op: Op, loop: int, tasks: Mapping[int, str]) -> str:
    """The kind of task that an operation belongs to; "" for none."""
    if op.path[:2] != (loop, "body"):
        return ""
    return tasks.get(op.path[2], "") if isinstance(op.path[2], int) else ""


def _seconds(
    priced: Priced, answer: Answer, loop: int, tasks: Mapping[int, str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Of a step by kind of task, "" for what belongs to none: compute, and with what is waited."""
    kinds = [_kind(op, loop, tasks) for op in priced.graph.ops]
    compute = dict.fromkeys((*KINDS, ""), 0.0)
    for kind, own in zip(kinds, answer.seconds, strict=True):
        compute[kind] += own
    total = dict(compute)
    for c in answer.changes:
        waited = waited_seconds(c.moves, c.nbytes, priced.links, c.waited)
        total[kinds[c.op]] += waited * c.trips
    return compute, total


class _Places:
    """Bytes per device of what lies at a stage's places."""

    def __init__(
        self, step: StageStep, priced: Priced, answer: Answer, loop: int, tasks: Mapping[int, str]
    ) -> None:
        self.step, self.priced, self.answer = step, priced, answer
        graph = priced.graph
        self.ops = {op.path: op for op in graph.ops}
        self.loop = loop
        skipped = len(step.arguments) + len(step.parts)
        self.value = dict(zip(step.arrivals, graph.inputs[skipped:], strict=False))
        places = {kind: k for k, kind in tasks.items()}
        for task in step.tasks:
            barrier = (loop, "body", places[task.kind] + 1)
            for k, p in enumerate(task.outs):
                op = self.ops.get(barrier if len(task.outs) == 1 else (*barrier, "out", k))
                if op is not None:
                    self.value[p] = op.outputs[0]

    def asked(self, values: Sequence[Axes | None]) -> tuple[Axes | None, ...]:
        """What XLA is asked for, and the sharding of all that one program hands on to another."""
        out = list(values)
        for v in self.value.values():
            if PARTIAL not in self.answer.values[v]:
                out[v] = self.answer.values[v]
        return tuple(out)

    def bytes(self, value: int) -> float:
        """Bytes of a value on one device."""
        nbytes = self.priced.fusion.kept.of_value[value]
        return lying_bytes(value, nbytes, self.answer.values[value], self.priced)

    def activations(self) -> tuple[float, float]:
        """Held per microbatch from F to the end of B, and to the end of W."""
        before: set[int] = set()
        held: dict[str, set[int]] = {"B": set(), "W": set()}
        for task in self.step.tasks:
            if task.kind in held:
                held[task.kind] = {p for p in task.ins if p in before or task.kind == "W"}
            else:
                before = {*task.ins, *task.outs}
        size = {p: self.bytes(v) for p, v in self.value.items()}
        until_b = sum(size.get(p, 0.0) for p in sorted(held["B"] | (held["W"] & before)))
        until_w = sum(size.get(p, 0.0) for p in sorted(held["W"]))
        return max(until_b, until_w), until_w

    def exchanged(self, traced: Traced) -> Exchanged:
        """Sums of gradients, and what is put together."""
        over, whole = self.step.over, dict[bool, float]()
        sums = sorted(p for task in self.step.tasks for p in task.sums)
        for k, p in enumerate(sums):
            link = self.ops.get((self.loop, "out", 1 + k))
            if link is not None:
                apart = p in over.dims
                whole[apart] = whole.get(apart, 0.0) + self.bytes(link.outputs[0])
        results = self.priced.graph.outputs[len(self.step.sent) :]
        ends = taken_whole(self.step, traced)
        ends.update(zip(self.step.results, results, strict=True))
        gathered = sum(self.bytes(ends[p]) for p in over.gathered if p in ends)
        return Exchanged(whole.get(False, 0.0), whole.get(True, 0.0), gathered)

    def spared(self) -> float:
        """What the state would take more, were it whole; twice where the new one lies beside it."""
        graph, more = self.priced.graph, self.step.over.groups - 1
        inputs = dict(zip(self.step.arguments, graph.inputs, strict=False))
        resting = [inputs[p] for p in self.step.over.rest]
        return sum(self.bytes(v) * more * (1 if v in graph.donated else 2) for v in resting)

    def sent(self) -> float:
        """Of what the next stage gets of a microbatch."""
        forward = {p for task in self.step.tasks if task.kind == "F" for p in task.outs}
        return sum(self.bytes(self.value[p]) for p in self.step.sent if p in forward)
