"""What was decided?  A Plan is plain data: it prints, it goes through JSON, it knows no device.

`to_json` writes a versioned schema; `from_json` reads it back and refuses what it does not know.
`differences` says in words how another function differs from the one a plan was made for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from passes.ir.graph import Graph
from passes.ir.mesh import Mesh

VERSION = 2
Axes = tuple[int, ...]


class PlanError(ValueError):
    """A plan that can not be read, or that belongs to another function."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a plan is predicted to cost on every device, for one run of the function.

    step_time, compute_time, comm_time: seconds. peak_memory: bytes. comm_bytes: bytes sent by one
    device. flops: FLOP done by one device.
    """

    step_time: float
    compute_time: float
    comm_time: float
    peak_memory: float
    comm_bytes: float
    flops: float


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
class Plan:
    """The answer. values: per value of the graph its sharding, None where nothing is constrained.

    status: "optimal", "feasible" (with the gap to the bound) or "fixed" for a baseline. signature:
    per operation its name and types, from which the fingerprint is made. donated: places of the
    arguments whose memory the function may reuse.
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
    version: int = VERSION

    @property
    def mesh_axes(self) -> Mesh:
        """The mesh as axes."""
        return Mesh.of(dict(self.mesh))

    def to_json(self) -> str:
        """The plan as JSON text; the same plan gives the same text."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, default=dict) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read `to_json`'s text; raises PlanError for anything else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
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
            return _read(Plan, data)  # type: ignore[no-any-return]
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this plan is damaged: {error}") from None


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


_PARTS: dict[str, Any] = {
    "cost": Cost,
    "arguments": TensorPlan,
    "results": TensorPlan,
    "ops": OpPlan,
    "reshards": Reshard,
    "alternatives": Alternative,
    "collectives": Move,
}


def _read(kind: Any, data: Any) -> Any:
    """A dataclass from its plain data; unknown and missing fields raise."""
    names = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(data, dict):
        raise TypeError(f"a {kind.__name__} should be an object, not {data!r}")
    if names != set(data):
        missing, extra = sorted(names - set(data)), sorted(set(data) - names)
        raise KeyError(f"{kind.__name__} lacks {missing} and has unknown {extra}")
    out = {}
    for name, value in data.items():
        part = _PARTS.get(name)
        _check_field(kind, name, value)
        if part and isinstance(value, list):
            out[name] = tuple(_read(part, v) for v in value)
        elif part and isinstance(value, dict):
            out[name] = _read(part, value)
        else:
            out[name] = _tuples(value)
    return kind(**out)


# What JSON has where a field is annotated so; the annotation's first word decides.
_JSON: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "tuple": list,
    "Axes": list,
    "Mapping": dict,
    "Cost": dict,
}


def _check_field(kind: Any, name: str, value: Any) -> None:
    """TypeError where the value is not what the field holds."""
    written = str(kind.__dataclass_fields__[name].type)
    optional = written.endswith("| None") and "[" not in written
    expected = _JSON[re.split(r"\W", written)[0]]
    if not (isinstance(value, expected) or (optional and value is None)):
        raise TypeError(f"{name} of a {kind.__name__} can not be {value!r:.40}")


def signature_of(graph: Graph) -> tuple[str, ...]:
    """One line per argument, operation and result: what must agree for a plan to fit."""
    lines = [f"argument {graph.values[v].name}: {graph.values[v].type}" for v in graph.inputs]
    for op in graph.ops:
        ins = ",".join(f"{v}" for v in op.inputs)
        outs = ",".join(f"{v}:{graph.values[v].type}" for v in op.outputs)
        lines.append(f"{op.name} {ins} -> {outs}")
    lines.append("results " + ",".join(map(str, graph.outputs)))
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
