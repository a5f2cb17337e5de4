"""What does XLA:TPU lay anew, tables and stacks, and what do their copies take?

XLA:TPU lays a table of few columns with its rows along the lanes, without any waste. From one of
many rows it picks rows as it lies. A table of fewer it lays anew, each row in a tile's row, and
updates it there: 128 elements for each of the few. So it does with the state that is updated by
the table's gradient. It copies the table when rows are picked, and the rest for the update; but
from the first gather among the devices on, these copies are what runs beside it, as they wait for
nothing. (Seen on tables of 8 to 64 columns and 65536 to 2^21 rows, with Adagrad on 1, 4 and 16
devices of v5e, v5p and v6e; between 2^18 and 2^19 rows the turn was not looked for. With 4 columns
the gradient is laid back before the update, and no copy lies there for long.)

A cache that a scan takes slice by slice, and overwrites one place of in each, is laid anew before
the loop if it is split along the dim of that place: each device then reads what is there, and
writes it back unless the place is its own, and wants that dim outermost. It does not for a slice of
fewer than three dims, or where the dim is the outermost already; and what is made by the program
itself is made so at once. (Seen with caches of keys for v5e, v5p and v6e; jax 0.10.2, libtpu
0.0.42.1.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from cost_models.fitted import LANES
from passes.ir.graph import Graph, Type
from passes.ir.sharding import BROADCAST
from passes.liveness import Liveness
from passes.tile_padding import padded

_AS_IT_LIES = 2**19
_NARROWEST = 8

# How often memory is passed over for that: once to copy the table for a gather; for its gradient
# three times to copy it and the state that is updated with it, there and back, once to fill it with
# zeros and five times to update both. Counted in a step of Adagrad on v5e.
PASSES = {"gather": (1, 0), "scatter-add": (3, 6)}


class Copied(NamedTuple):
    """The steps during which a copy lies there.

    early: the first step at which it can be made, which it is beside a gather. along: of a stack
    the dim that must be split.
    """

    begin: int
    end: int
    early: int
    along: int = BROADCAST


_NEVER: Mapping[int, Copied] = {}


def laid_anew(shape: Sequence[int]) -> bool:
    """Whether a table of this shape on one device is laid anew by those who pick rows of it."""
    return len(shape) == 2 and LANES <= shape[0] < _AS_IT_LIES and shape[1] < LANES


def slice_laid_anew(shape: Sequence[int], along: int) -> bool:
    """Whether a slice on one device is laid anew where one place of it is overwritten along a dim.

    >>> [slice_laid_anew((64, 128, 16), d) for d in range(3)], slice_laid_anew((1, 128, 16), 1)
    ([False, True, True], False)
    """
    dims = [d for d, n in enumerate(shape) if n > 1]
    return len(dims) > 2 and along in dims[1:]


def copy_bytes(
    type: Type, axes: Sequence[int], sizes: Sequence[int], along: int = BROADCAST
) -> float:
    """Bytes per device of a copy in whole tiles; 0 where there is none. along: as of Copied."""
    shape = list(type.shape)
    for d, n in zip(axes, sizes, strict=True):
        if d > BROADCAST:
            shape[d] //= n
    if along > BROADCAST:
        kept = along in axes and slice_laid_anew(shape[1:], along - 1)
        return math.prod(shape) * type.bits / 8 * padded(shape, {along}) if kept else 0.0
    kept = laid_anew(shape) and shape[1] >= _NARROWEST
    return shape[0] * LANES * type.bits / 8 if kept else 0.0


def copied(graph: Graph, live: Liveness, platform: str) -> Mapping[int, Copied]:
    """Per table and stack that may be laid anew the steps during which a copy of it lies there.

    Whether it is depends on its sharding: copy_bytes.
    """
    if platform != "tpu":
        return _NEVER
    found = {**_tables(graph, live), **dict(_stacks(graph, live))}
    return {v: copy for v, copy in found.items() if live.stored[v]}


def _tables(graph: Graph, live: Liveness) -> Mapping[int, Copied]:
    """Tables that are picked from, or updated by what was gathered for the picked."""
    found: dict[int, Copied] = {}

    def note(v: int, step: int) -> None:
        early = live.spans[v][0]
        first = early if graph.values[v].kind == "result" else step
        begin = found[v].begin if v in found else first
        found[v] = Copied(begin, max(step + 1, found[v].end if v in found else 0), early)

    updates: dict[int, Type] = {}  # the gradients, and what is made of them
    for op in graph.ops:
        first = op.inputs[0] if op.inputs else -1
        if op.name in PASSES and len(graph.values[first].shape) == 2:
            table = op.outputs[0] if op.name == "scatter-add" else first
            note(table, live.when[op.id])
            if op.name == "scatter-add":
                updates[table] = graph.values[table].type
        gradient = next((updates[v] for v in op.inputs if v in updates), None)
        if gradient is None or not op.rule.fuses:
            continue
        for v in op.inputs:
            if graph.values[v].type == gradient and (
                v in updates or graph.values[v].kind != "result"
            ):
                note(v, live.when[op.id])
        updates |= {v: gradient for v in op.outputs if graph.values[v].type == gradient}
    return found


def _stacks(graph: Graph, live: Liveness) -> Iterator[tuple[int, Copied]]:
    """Given stacks, one place of each slice of which a loop overwrites."""
    for op, (stack, along) in overwritten(graph).items():
        loop = graph.regions[graph.ops[op].region]
        begin, end = live.when[loop.begin], live.when[loop.end - 1] + 1
        yield stack, Copied(begin, end, begin, along + 1)


def overwritten(graph: Graph) -> Mapping[int, tuple[int, int]]:
    """Per operation that overwrites one place of a slice of a given stack: the stack, the dim."""
    out: dict[int, tuple[int, int]] = {}
    makers = graph.producers()
    for op in graph.ops:
        maker = makers[op.inputs[0]] if op.name == "dynamic_update_slice" else -1
        if maker < 0 or graph.ops[maker].name != "scan_slice":
            continue
        stack = graph.ops[maker].inputs[0]
        whole, part = (graph.values[v].shape for v in op.inputs[:2])
        one = [d for d, (n, m) in enumerate(zip(whole, part, strict=True)) if n > m == 1]
        if len(one) == 1 and graph.values[stack].kind != "result":
            out[op.id] = stack, one[0]
    return out
