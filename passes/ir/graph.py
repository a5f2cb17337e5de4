"""What does the function compute?  One flat list of operations over values, regions marked on it.

A Graph is a traced function after inlining. Loop bodies, branches and rematerialised parts lie in
the same list, between `region.begin` and `region.end`; small *link* operations (`loop_enter`,
`scan_slice`, `scan_stack`, `loop_next`, `region_enter`, `region_exit`, `branch_join`) carry
values over a region's border, so that every pass sees one flat program and a rule for each step.

Values are numbered; names for people are made when a graph is printed (`passes.ir.text`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

from passes.ir.rule import Rule

ValueKind = Literal["argument", "constant", "literal", "result"]
RegionKind = Literal["top", "scan", "while_cond", "while_body", "branch", "remat", "call", "manual"]
LOOPS = frozenset({"scan", "while_cond", "while_body"})


@dataclass(frozen=True, slots=True)
class Type:
    """Shape and element type of a value. bits: storage bits of one element (4 for int4)."""

    shape: tuple[int, ...]
    dtype: str
    bits: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole value on one device."""
        return (self.size * self.bits + 7) // 8

    def __str__(self) -> str:
        return f"{short_dtype(self.dtype)}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Value:
    """One array of the program. name: argument path such as `params['wq']`, else ""."""

    id: int
    type: Type
    kind: ValueKind = "result"
    name: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its type."""
        return self.type.shape


@dataclass(frozen=True, slots=True)
class Signature:
    """What a rule may look at: primitive name, operand and result types, plain parameters.

    params holds only plain data: numbers, strings, tuples, None (dimension numbers are tuples or
    mappings of tuples; sub-programs are left out).
    """

    name: str
    operands: tuple[Type, ...]
    results: tuple[Type, ...]
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. path: the equation's place in the jaxpr, for the lowering to find it again.

    source: `file.py:12 (function)` in the user's code, "" where unknown. region: index of the
    innermost region it lies in (0 is the whole function).
    """

    id: int
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rule: Rule
    params: Mapping[str, Any]
    source: str = ""
    path: tuple[int | str, ...] = ()
    region: int = 0
    effects: bool = False

    @property
    def is_link(self) -> bool:
        """Whether it only carries a value over a region's border."""
        return self.name in LINKS


LINKS = frozenset(
    {
        "loop_enter",
        "loop_next",
        "scan_slice",
        "scan_stack",
        "region_enter",
        "region_exit",
        "branch_join",
    }
)


@dataclass(frozen=True, slots=True)
class Region:
    """A span of operations run as one body. trips: how often it runs per run of its parent.

    begin, end: half-open range of op ids, links included. weight of a branch: 1 / branches.
    """

    id: int
    parent: int
    kind: RegionKind
    trips: float
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Hint:
    """A sharding the user wrote for one value.

    dims: per dim the axis names that must split it; () = must not be split; None = open.
    origin: `train.py:14` or `hints['params/*']`. priority: 0 first. hard: a search must keep it.
    """

    value: int
    dims: tuple[tuple[str, ...] | None, ...]
    origin: str
    priority: int = 0
    hard: bool = True


@dataclass(frozen=True)
class Graph:
    """A whole function. inputs and outputs are value ids in flattened argument and result order.

    ties: pairs of values that must have one sharding (a loop's carry). donated: input values whose
    memory the function may reuse. notes: things the user should know, one sentence each.
    """

    name: str
    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    regions: tuple[Region, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    output_names: tuple[str, ...] = ()
    ties: tuple[tuple[int, int], ...] = ()
    donated: frozenset[int] = frozenset()
    hints: tuple[Hint, ...] = ()
    notes: tuple[str, ...] = ()

    def trips(self, region: int) -> float:
        """How often a region runs in one run of the function."""
        out = 1.0
        while region:
            out *= self.regions[region].trips
            region = self.regions[region].parent
        return out

    def innermost(self, region: int, kinds: Collection[str]) -> int:
        """The innermost region of these kinds that is this one or around it; 0 for none."""
        while region and self.regions[region].kind not in kinds:
            region = self.regions[region].parent
        return region

    def producers(self) -> tuple[int, ...]:
        """Per value the id of the op that makes it, or -1."""
        return self._producers

    def consumers(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Per value the (op id, operand index) pairs that read it, in program order."""
        return self._consumers

    @cached_property
    def _producers(self) -> tuple[int, ...]:
        out = [-1] * len(self.values)
        for op in self.ops:
            for v in op.outputs:
                out[v] = op.id
        return tuple(out)

    @cached_property
    def _consumers(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        out: list[list[tuple[int, int]]] = [[] for _ in self.values]
        for op in self.ops:
            for k, v in enumerate(op.inputs):
                out[v].append((op.id, k))
        return tuple(tuple(c) for c in out)

    def __str__(self) -> str:
        from passes.ir.text import print_graph

        return print_graph(self)


_SHORT = {
    "float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16",
    "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64", "int4": "i4",
    "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64", "uint4": "u4",
    "bool": "bool", "complex64": "c64", "complex128": "c128",
    "float8_e4m3fn": "f8e4m3", "float8_e5m2": "f8e5m2",
}  # fmt: skip


def short_dtype(dtype: str) -> str:
    """`f32` for `float32`, as jax prints it; other names stay."""
    return _SHORT.get(dtype, dtype)
