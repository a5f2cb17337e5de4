"""Which weights are converted once, and lie there narrow for all who read them?

A step reads weights of float32 as bfloat16: because it says so, or because all who read them are
products at default precision (`passes.stored_bytes`). XLA:TPU converts a weight that is read more
than once by itself, once for all readers outside of branches. Of a stack that scans slice it
converts the whole before the first of these loops, and the narrow copy lies there until the last
has ended. A weight with one reader outside of loops is converted inside of that reader's kernel
(steps and forward passes of GPT, LLaMA, RetNet and GShard for v5e:4x4; MLPs of float32 whose layers
a scan runs, forward, in training and with remat, on one v5e; jax 0.10.2, libtpu 0.0.42.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from passes.ir.graph import LOOPS, Graph, Op
from passes.stored_bytes import StoredBytes

_SAME = frozenset({"loop_enter", "region_enter", "region_exit"})


@dataclass(frozen=True, slots=True)
class WeightCast:
    """values: all that are the same converted weight, the first of which is made.

    parts: how many of it lie in memory, the slices of a stack; 1 where it is no slice.
    """

    values: tuple[int, ...]
    parts: int


def weight_casts(graph: Graph, kept: StoredBytes) -> tuple[WeightCast, ...]:
    """The weights that are converted by themselves, those with one reader outside of loops not."""
    makers = graph.producers()
    found: dict[tuple[int, int, int, str], list[int]] = {}
    for op in graph.ops:
        said = op.name == "convert_element_type" and _narrows(graph, op)
        if said or (op.name == "scan_slice" and _is_kept_narrow(graph, kept, op)):
            weight, parts = _weight(graph, op.inputs[0] if said else op.outputs[0], makers)
            if weight >= 0:
                kind = graph.values[op.outputs[0]].type.dtype if said else "bfloat16"
                branch = graph.innermost(op.region, ("branch",))  # what it makes, others lack
                key = (branch, weight, parts, kind)
                found.setdefault(key, []).append(op.outputs[0])
    readers = graph.consumers()
    return tuple(
        WeightCast(tuple(values), parts)
        for (_, _, parts, _), values in found.items()
        if parts > 1 or len({c for v in values for c, _ in readers[v]}) > 1
    )


def outermost_loops(graph: Graph, values: Iterable[int]) -> tuple[int, ...]:
    """The outermost loops, as regions, in which values are made."""
    makers = graph.producers()
    out = dict[int, None]()
    for v in values:
        region, outer = graph.ops[makers[v]].region, -1
        while region:
            if graph.regions[region].kind in LOOPS:
                outer = region
            region = graph.regions[region].parent
        if outer >= 0:
            out[outer] = None
    return tuple(out)


def _narrows(graph: Graph, op: Op) -> bool:
    given, made = (graph.values[v].type for v in (op.inputs[0], op.outputs[0]))
    return "float" in given.dtype and "float" in made.dtype and made.bits < given.bits


def _is_kept_narrow(graph: Graph, kept: StoredBytes, op: Op) -> bool:
    v = op.outputs[0]
    return kept.of_value[v] < graph.values[v].type.nbytes


def _weight(graph: Graph, v: int, makers: Sequence[int]) -> tuple[int, int]:
    """The argument that a value is, or is a slice of, and how many slices that has; -1 for none."""
    parts = 1
    while makers[v] >= 0:
        op = graph.ops[makers[v]]
        if op.name == "scan_slice":
            whole, part = (graph.values[u].type.size for u in (op.inputs[0], v))
            parts *= whole // max(part, 1)
        elif op.name not in _SAME:
            return -1, 1
        v = op.inputs[op.outputs.index(v)]
    return (v, parts) if graph.values[v].kind in ("argument", "constant") else (-1, 1)
