"""What was decided?  A Plan is plain data: it prints, it goes through JSON, it knows no device.

`to_json` writes a versioned schema; `from_json` reads it back and refuses what it does not know.
`differences` says in words how another function differs from the one a plan was made for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cost_models.cluster import Cluster
from passes.ir.graph import Graph
from passes.ir.mesh import Mesh
from passes.ir.sharding import PARTIAL
from passes.ir.text import hint_text

VERSION = 8
Axes = tuple[int, ...]


class PlanError(ValueError):
    """A plan that can not be read, or that belongs to another function."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a plan is predicted to cost on every device, for one run of the function.

    step_time, compute_time, comm_time: seconds; a step takes its compute, and the communication
    that does not run beside it. peak_memory: bytes. comm_bytes: bytes sent by one device. flops:
    FLOP done by one device.
    """

    step_time: float
    compute_time: float
    comm_time: float
    peak_memory: float
    comm_bytes: float
    flops: float

    @property
    def bounds(self) -> tuple[float, float]:
        """Seconds of a step if all communication ran beside compute, and if none did."""
        return max(self.compute_time, self.comm_time), self.compute_time + self.comm_time


@dataclass(frozen=True, slots=True)
class Move:
    """One collective. why: the value it moves and for which operation; trips: runs per step."""

    kind: str
    axes: tuple[str, ...]
    nbytes: float
    seconds: float
    source: str
    value: str
    trips: float = 1.0


@dataclass(frozen=True, slots=True)
class OpPlan:
    """One operation. factors: its rule; strategy: mesh axis to factor; seconds: a step."""

    id: int
    name: str
    source: str
    factors: str
    strategy: tuple[tuple[str, str], ...]
    result: str
    seconds: float
    bytes: float
    flops: float
    trips: float
    collectives: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One argument or result: its name, type and per dim the mesh axes that split it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    spec: tuple[tuple[str, ...], ...]
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A plan that lost. cost is None where it was not feasible; note says why."""

    solver: str
    mesh: tuple[tuple[str, int], ...]
    cost: Cost | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Reshard:
    """One operand that an operation wants in another sharding than its value has.

    operand: its place; past the operands come the results, which the operation makes in a sharding
    that their values do not have. path: the shardings it takes in turn, up to the one wanted (of a
    result: up to the one of its value, exclusively). through: those before them, up to that of the
    copy number `shared`, which several readers share; -1 and () where there is none.
    """

    op: int
    operand: int
    path: tuple[Axes, ...]
    shared: int = -1
    through: tuple[Axes, ...] = ()


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """A mesh axis that runs over the successive steps of a loop, not over devices.

    dims: (place of an argument, dim) of what each step has a part of, as hints say; none for the
    batch that is found (`passes.batch`).
    """

    name: str
    size: int
    dims: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer. values: per value of the graph its sharding, None where nothing is constrained.

    status: "optimal", "feasible" (with the gap to the bound) or "fixed" for a baseline. signature:
    per operation its name and types, from which the fingerprint is made. donated: places of the
    arguments whose memory the function may reuse. compiler_options: of XLA, for the program.
    fused_attention: whether attention is priced as one kernel (`passes.attention`). time_axes: over
    the steps of loops, the outermost first (`passes.time_loop`). blocks, block_bytes: into how many
    blocks huge values are cut, or how large a block is at most, all devices together
    (`passes.block_counts`); 0 for neither. remat: numbers of the parts that the backward half
    computes again (`passes.remat`).
    """

    name: str
    fingerprint: str
    signature: tuple[str, ...]
    cluster: Mapping[str, Any]
    mesh: tuple[tuple[str, int], ...]
    solver: str
    status: str
    gap: float
    memory_limit: float
    cost: Cost
    arguments: tuple[TensorPlan, ...]
    results: tuple[TensorPlan, ...]
    ops: tuple[OpPlan, ...]
    values: tuple[Axes | None, ...]
    reshards: tuple[Reshard, ...]
    donated: tuple[int, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()
    compiler_options: Mapping[str, str] = field(default_factory=dict)
    fused_attention: bool = False
    time_axes: tuple[TimeAxis, ...] = ()
    blocks: int = 0
    block_bytes: int = 0
    remat: tuple[int, ...] = ()
    version: int = VERSION

    @property
    def mesh_axes(self) -> Mesh:
        """The mesh as axes."""
        return Mesh(tuple(n for n, _ in self.mesh), tuple(s for _, s in self.mesh))

    @property
    def microbatches(self) -> int:
        """Into how many parts its time axes cut what they run over."""
        return math.prod(axis.size for axis in self.time_axes)

    def to_json(self) -> str:
        """The plan as JSON text; the same plan gives the same text."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, default=dict) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read `to_json`'s text; raises PlanError for anything else."""
        if not isinstance(text, str | bytes):
            raise PlanError(f"a plan is read from JSON text, not from {type(text).__name__}")
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(
                f"this is not a plan: the JSON breaks off or is broken, {error}"
            ) from None
        if not isinstance(data, dict) or "fingerprint" not in data:
            raise PlanError("this is JSON, but not an autoshard plan: it has no fingerprint")
        if data.get("version") != VERSION:
            raise PlanError(
                f"this plan has schema version {data.get('version')!r}, and this autoshard reads "
                f"{VERSION}: plan again, or use the autoshard that wrote it"
            )
        try:
            plan: Plan = read_as(Plan, data)
            check_plan(plan, read_as(Cluster, plan.cluster).devices)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this plan is damaged: {error}") from None
        return plan


def read_as(kind: Any, data: Any) -> Any:
    """A dataclass from its plain data; unknown, missing and mistyped fields raise."""
    fields = _fields(kind)
    if not isinstance(data, dict):
        raise TypeError(f"a {kind.__name__} should be an object, not {data!r:.40}")
    if fields.keys() != data.keys():
        missing, extra = sorted(fields.keys() - data), sorted(data.keys() - fields)
        raise KeyError(f"{kind.__name__} lacks {missing} and has unknown {extra}")
    out = {}
    for name, value in data.items():
        try:
            out[name] = _typed(fields[name], value)
        except _Mistyped:
            raise TypeError(f"{name} of a {kind.__name__} can not be {value!r:.40}") from None
    return kind(**out)


class _Mistyped(Exception):
    """A value that is not of the type that its field is annotated with."""


@lru_cache
def _fields(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _typed(wanted: Any, value: Any) -> Any:
    """A JSON value as the type that is wanted; lists become tuples."""
    if dataclasses.is_dataclass(wanted) and isinstance(value, dict):
        return read_as(wanted, value)
    parts = get_args(wanted)
    if type(None) in parts:
        return None if value is None else _typed(parts[0], value)
    if get_origin(wanted) is UnionType:
        wanted = next((p for p in parts if type(value) is p), float)
    if get_origin(wanted) is tuple and isinstance(value, list):
        if parts[-1] is Ellipsis:
            return tuple(_typed(parts[0], v) for v in value)
        if len(parts) == len(value):
            return tuple(_typed(p, v) for p, v in zip(parts, value, strict=True))
    if get_origin(wanted) is Mapping and isinstance(value, dict):
        return {k: v if parts[1] is Any else _typed(parts[1], v) for k, v in value.items()}
    if get_origin(wanted) is Literal and value in parts:
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (type(value) is wanted or (wanted is float and number)) and value == value:  # not NaN
        return value
    raise _Mistyped


def check_plan(plan: Plan, devices: int) -> None:
    """ValueError where the parts of a plan for so many devices do not belong together."""
    cluster: Cluster = read_as(Cluster, plan.cluster)
    mesh = plan.mesh_axes
    if mesh.devices != devices:
        raise ValueError(
            f"its mesh {mesh} has {mesh.devices} devices, its cluster {cluster} {devices}"
        )
    if fingerprint(plan.signature) != plan.fingerprint:
        raise ValueError(f"its fingerprint {plan.fingerprint!r} is not that of its signature")
    if not all(math.isfinite(x) for x in dataclasses.astuple(plan.cost)):
        raise ValueError(f"its cost is no number: {plan.cost}")
    for tensor in (*plan.arguments, *plan.results):
        axes = [a for dim in tensor.spec for a in dim]
        known = set(axes) <= set(mesh.names) and len(axes) == len(set(axes))
        if not known or len(tensor.spec) != len(tensor.shape):
            raise ValueError(
                f"the spec {tensor.spec} of {tensor.name} does not fit shape {tensor.shape} on "
                f"mesh {mesh}"
            )
    for axis in plan.time_axes:
        _check_time_axis(plan, axis)
    if not set(plan.donated) <= set(range(len(plan.arguments))):
        raise ValueError(
            f"donated {plan.donated} are not among its {len(plan.arguments)} arguments"
        )
    shardings = [*plan.values, *(s for r in plan.reshards for s in (*r.path, *r.through))]
    for split in shardings:
        if split is not None and (len(split) != len(mesh.names) or min(split) < PARTIAL):
            raise ValueError(f"{split} is no sharding on mesh {mesh}")


def _check_time_axis(plan: Plan, axis: TimeAxis) -> None:
    """ValueError for one that is a mesh axis, too, or that runs over a dim that is not there."""
    ranks = dict(enumerate(len(t.shape) for t in plan.arguments))
    there = all(0 <= d < ranks.get(place, 0) for place, d in axis.dims)
    if axis.size < 1 or not there or axis.name in plan.mesh_axes.names:
        raise ValueError(f"{axis} is no time axis beside mesh {plan.mesh_axes}")


def signature_of(graph: Graph) -> tuple[str, ...]:
    """What must agree for a plan to fit: arguments, operations with their rules, hints, results.

    One line for each. Names of lines and files are left out: code may move.
    """
    lines = [f"argument {graph.values[v].name}: {graph.values[v].type}" for v in graph.inputs]
    rules: dict[int, str] = {}
    for op in graph.ops:
        ins = ",".join(f"{v}" for v in op.inputs)
        outs = ",".join(f"{v}:{graph.values[v].type}" for v in op.outputs)
        if id(op.rule) not in rules:  # many operations share one rule
            rules[id(op.rule)] = str(op.rule)
        lines.append(f"{op.name} {ins} -> {outs}  {rules[id(op.rule)]}")
    lines += [f"{r.kind} of {r.trips:g} trips from {r.begin} to {r.end}" for r in graph.regions[1:]]
    for hint in graph.hints:
        strength = f"{'hard' if hint.hard else 'soft'}, priority {hint.priority}"
        lines.append(f"hint {hint.value} {hint_text(hint)} {strength}")
    names = [*graph.output_names, *([""] * len(graph.outputs))]
    lines += [f"{name} {v}" for name, v in zip(names, graph.outputs, strict=False)]
    return tuple(lines)


def fingerprint(signature: tuple[str, ...]) -> str:
    """A short hash of a signature, the same in every process."""
    return hashlib.sha256("\n".join(signature).encode()).hexdigest()[:16]


def differences(mine: tuple[str, ...], theirs: tuple[str, ...], most: int = 3) -> tuple[str, ...]:
    """The first differences between a plan's signature and another function's, in words."""
    out = []
    for k, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if a != b:
            out.append(f"line {k}: the plan has `{a}`, the function has `{b}`")
            if len(out) == most:
                return tuple(out)
    if len(mine) != len(theirs):
        out.append(f"the plan has {len(mine)} lines of signature, the function {len(theirs)}")
    return tuple(out)
