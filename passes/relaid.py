"""What does XLA:TPU lay anew, tables and stacks, and what do their copies take?

XLA:TPU lays a table of few columns with its rows along the lanes, without any waste. From one of
many rows it picks rows as it lies. A table of fewer it lays anew, each row in a tile's row, and
updates it there: 128 elements for each of the few. So it does with the state that is updated by
the table's gradient. It copies the table when rows are picked, and the rest for the update; but
from the first gather among the devices on, these copies are what runs beside it, as they wait for
nothing. (Seen on tables of 2 to 64 columns and 65536 to 2^21 rows, with Adagrad on 1, 4 and 16
devices of v5e, v5p and v6e; between 2^18 and 2^19 rows the turn was not looked for.)

A gradient that is resharded once it is summed, from rows to columns or to all devices, comes as the
table lies, and updates it so; not one that is only summed over devices. Then the table has a copy
for those who pick only, and its state has none. Such a copy is narrow where all that is picked is
wanted narrow: XLA converts while it copies, in the time that a wide copy takes. (The same step of
Adagrad with and without such a change, 4 to 32 columns of 200000 rows; for v5e, v5p and v6e. Picked
and not updated: for v5p and v6e. Not counted: Adam and momentum, and SGD of 4 columns, have such a
gradient laid back too, without any change; SGD of 32 columns does not, on v5p and v6e.)

XLA's scheduler counts no time for a copy, and little memory is no reason to wait. Where it waits
for a collective and has nothing else to do, it makes all the copies of which rows are picked after
that. On v5p, which has small kernels left to fill its waits with, mostly all lie there before the
first row is picked: 4 of 4, 8 of 8 twice, 12 of 12, but once 5 of 8. On v5e and v6e they come in
two groups, mostly: 5 of 8 five times, 3 and 4 of 4, 7 and 9 of 12; in VMEM lie one or two copies of
49 MiB, or five of 16. Which wait it is hangs on the scheduler's estimates by a few percent, so two
halves are counted. (Steps of DLRM, the tables split by columns over 16 devices, 8192 to 32768
cases; its reasons as the scheduler logs them. By two halves the peaks of seven such steps for v5e
and v6e come out at 0.72 to 1.04 of the compiled ones.)

A cache that a scan takes slice by slice, and overwrites one place of in each, is laid anew before
the loop if it is split along the dim of that place: each device then reads what is there, and
writes it back unless the place is its own, and wants that dim outermost. It does not for a slice of
fewer than three dims, or where the dim is the outermost already; and what is made by the program
itself is made so at once. (Seen with caches of keys for v5e, v5p and v6e; jax 0.10.2, libtpu
0.0.42.1.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from cost_models.fitted import LANES
from passes.ir.graph import Graph, Type
from passes.ir.sharding import BROADCAST
from passes.liveness import Liveness
from passes.stored_bytes import StoredBytes
from passes.tile_padding import padded

# From a table of so many rows, or more, rows are picked as it lies.
AS_IT_LIES = 2**19

# The part of VMEM in which copies for those who pick only lie.
_IN_VMEM = 6 / 10

# How a gradient is resharded that then comes as its table lies.
LAID_BACK = frozenset({"all_gather", "all_to_all"})

# What hands on picked rows as they are.
_STACKS = frozenset({"concatenate", "stack"})

# How often memory is passed over for that: once to copy the table for a gather; for its gradient
# three times to copy it and the state that is updated with it, there and back, once to fill it with
# zeros and five times to update both. Counted in a step of Adagrad on v5e.
PASSES = {"gather": (1, 0), "scatter-add": (3, 6)}


class Copied(NamedTuple):
    """The steps during which a copy lies there.

    early: the first step at which it can be made, which it is beside a gather. along: of a stack
    the dim that must be split. gradient: by which a table, or its state, is updated. picked: where
    a table's copy ends that is for those who pick only. narrow: whether that one is half as wide.
    """

    begin: int
    end: int
    early: int
    along: int = BROADCAST
    gradient: int = -1
    picked: int = 0
    narrow: bool = False


_NEVER: Mapping[int, Copied] = {}


def laid_anew(shape: Sequence[int]) -> bool:
    """Whether a table of this shape on one device is laid anew by those who pick rows of it."""
    return len(shape) == 2 and LANES <= shape[0] < AS_IT_LIES and shape[1] < LANES


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
    return shape[0] * LANES * type.bits / 8 if laid_anew(shape) else 0.0


def copied(graph: Graph, live: Liveness, kept: StoredBytes, platform: str) -> Mapping[int, Copied]:
    """Per table and stack that may be laid anew the steps during which a copy of it lies there.

    Whether it is depends on its sharding, and on what becomes of its gradient: copy_bytes, as_laid.
    """
    if platform != "tpu":
        return _NEVER
    found = {**_tables(graph, live, kept), **dict(_stacks(graph, live))}
    return {v: copy for v, copy in found.items() if live.stored[v]}


def as_laid(copy: Copied, v: int, resharded: Set[int]) -> Copied:
    """What is left of a value's copy where these values, or gradients, are resharded."""
    if copy.gradient in resharded or (copy.picked and copy.gradient < 0):
        return copy._replace(end=0 if v in resharded else copy.picked)
    return copy._replace(narrow=False)


def in_groups(
    copies: Mapping[int, Copied], sizes: Mapping[int, float], vmem: float
) -> dict[int, Copied]:
    """Copies that take HBM where those for who picks only are made in two groups.

    The second group is made when the first has been picked from; of both some lie in VMEM.
    """
    alone = sorted((c.end, v) for v, c in copies.items() if 0 < c.picked == c.end)
    half = (len(alone) + 1) // 2
    out = dict(copies)
    for group, begin in ((alone[:half], 0), (alone[half:], alone[half - 1][0] - 1 if alone else 0)):
        room = _IN_VMEM * vmem
        for _, v in reversed(group):
            room -= sizes[v]
            if room >= 0:
                del out[v]
            else:
                out[v] = copies[v]._replace(begin=max(begin, copies[v].begin))
    return out


def _tables(graph: Graph, live: Liveness, kept: StoredBytes) -> Mapping[int, Copied]:
    """Tables that are picked from, or updated by what was gathered for the picked."""
    found: dict[int, Copied] = {}

    def note(v: int, step: int, gradient: int) -> None:
        early = live.spans[v][0]
        first = early if graph.values[v].kind == "result" else step
        old = found.get(v, Copied(first, 0, early))
        gradient = max(gradient, old.gradient)
        found[v] = old._replace(end=max(step + 1, old.end), gradient=gradient)

    consumers = graph.consumers()
    updates: dict[int, int] = {}  # the gradients, and what is made of them
    for op in graph.ops:
        first = op.inputs[0] if op.inputs else -1
        if op.name in PASSES and len(graph.values[first].shape) == 2:
            if op.name == "gather":
                note(first, live.when[op.id], -1)
                narrow = _narrow(graph, kept, consumers, op.outputs[0])
                found[first] = _picked(found[first], narrow)
            else:
                table = op.outputs[0]
                updates[table] = table
                note(table, live.when[op.id], table)
        gradient = next((updates[v] for v in op.inputs if v in updates), None)
        if gradient is None or not op.rule.fuses:
            continue
        alike = graph.values[gradient].type
        for v in op.inputs:
            given = graph.values[v].kind != "result"
            if graph.values[v].type == alike and (v in updates or given):
                note(v, live.when[op.id], gradient)
        updates |= {v: gradient for v in op.outputs if graph.values[v].type == alike}
    return found


def _picked(copy: Copied, narrow: bool) -> Copied:
    """A table's copy from which rows are picked once more."""
    return copy._replace(picked=copy.end, narrow=narrow and (copy.narrow or not copy.picked))


def _narrow(
    graph: Graph, kept: StoredBytes, consumers: Sequence[Sequence[tuple[int, int]]], v: int
) -> bool:
    """Whether all who read a value want it as bfloat16, perhaps stacked up with others."""
    readers = ((graph.ops[o], k) for o, k in consumers[v])
    return graph.values[v].type.dtype == "float32" and all(
        (op.id, k) in kept.narrow
        or (op.name in _STACKS and kept.of_value[out] < graph.values[out].type.nbytes)
        for op, k in readers
        for out in op.outputs[:1]
    )


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
