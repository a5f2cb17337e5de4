"""What lies in memory when?  Bytes per device at each step, with every resharded copy.

The problem leaves resharded copies out, and what values lend one another; here all of it is counted
for one choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from passes.ahead import first_gather, gathers_ahead, gathers_combined
from passes.answer import Change
from passes.bags import bags, tile_bytes
from passes.compiler import sums_whole
from passes.cut_chains import whole_beside_slices, whole_parts
from passes.filled import copies_at_once, made_ahead, made_as_read
from passes.ir.graph import LOOPS, Graph, Op
from passes.ir.plan import Axes
from passes.ir.sharding import PARTIAL, Sharding
from passes.late_updates import updated_last
from passes.lent import Span, lent
from passes.priced import Priced
from passes.quotients import kept_for_exchanges
from passes.relaid import LAID_BACK, Copied, as_laid, copy_bytes, in_groups
from passes.reshard_copies import turned_bytes
from passes.restacked import restacked
from passes.sliced import Sliced, sliced, takes_a_slice
from passes.tile_padding import DOT, batch_dims, padded, wasteful
from passes.vmem import in_vmem, may_lie_there


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes on every device for a value, or for a resharded copy of it, over [begin, end)."""

    begin: int
    end: int
    nbytes: float
    value: int
    axes: Axes
    copy: bool


def held(priced: Priced, values: Sequence[Axes], changed: Sequence[Change]) -> Iterator[Held]:
    """All that lies in memory: every value, and resharded copies where they live.

    A result that is made otherwise than it is kept lies there twice, such as summands.
    """
    graph = priced.graph
    tpu = priced.cluster.platform == "tpu"
    made = made_as_read(priced, changed)
    slices = {v: s for v, s in sliced(priced, changed).items() if v not in made}
    yield from _values(priced, values, changed, slices, made)
    if priced.copied:
        yield from _laid_anew(priced, values, changed)
    yield from _restacked(priced, values, changed)
    if tpu:
        yield from _spread(priced, values)
        yield from _in_tiles(priced, values)
        yield from _turned(priced, changed)
        for begin, end, c in whole_parts(priced, changed):
            size = lying_bytes(c.value, c.nbytes, c.source, priced)
            yield Held(begin, end, size, c.value, c.source, True)
    for v, begin, end in copies_at_once(priced):
        axes = made.get(v, values[v])
        size = lying_bytes(v, graph.values[v].type.nbytes, axes, priced)
        yield Held(begin, end, size, v, axes, True)
    if priced.cluster.platform == "gpu":
        for v, begin, end in made_ahead(priced, values):
            size = lying_bytes(v, priced.fusion.kept.of_value[v], values[v], priced)
            yield Held(begin, end, size, v, values[v], True)
    for c, change in held_changes(priced, changed):
        if c.value not in made and (c.value not in slices or not takes_a_slice(graph, c)):
            yield change


def _values(
    priced: Priced,
    values: Sequence[Axes],
    changed: Sequence[Change],
    slices: Mapping[int, Sliced],
    made: Mapping[int, Axes],
) -> Iterator[Held]:
    """Every value where it lies, and the slices that lie in place of some."""
    live, kept = priced.live, priced.fusion.kept
    whole = whole_beside_slices(priced, changed) if priced.cluster.platform == "tpu" else {}
    weights = kept_for_exchanges(priced, values, changed)
    moved = _moved(priced, changed) if priced.cluster.platform == "gpu" else {}
    replaced = {w.replaces for w in whole.values()}
    for v, axes in enumerate(values):
        begin, end = live.spans[v]
        end = min(end, moved.get(v, end))
        if v in whole:
            begin, end, _ = whole[v]
        begin, end = weights.get(v, (begin, end))
        if v in slices:
            end, until, taken = slices[v]
            for c in taken:
                size = lying_bytes(c.value, c.nbytes, c.target, priced)
                start = live.when[c.op] if begin < end else begin
                yield Held(start, until, size, c.value, c.target, True)
        if begin < end and v not in replaced:
            axes = made.get(v, axes)
            size = lying_bytes(v, kept.of_value[v], axes, priced)
            yield Held(begin, end, size * priced.fusion.parts.get(v, 1), v, axes, False)


def _moved(priced: Priced, changed: Sequence[Change]) -> dict[int, int]:
    """By value one past its last step, where all who read it read one copy of it.

    XLA moves it among the devices once, and what has moved is all that is left of it (hidden values
    of experts, in a step on 8 A100; jax 0.10.2).
    """
    graph, makers, readers = priced.graph, priced.graph.producers(), priced.graph.consumers()
    out = dict[int, int]()
    for c in changed:
        if c.side != "copy" or c.value in graph.outputs or makers[c.value] < 0:
            continue
        near = graph.ops[makers[c.value]].region == graph.ops[c.op].region
        if near and all(priced.copies.get(r) == c.shared for r in readers[c.value]):
            out[c.value] = priced.live.when[c.op] + 1
    return out


def _restacked(priced: Priced, values: Sequence[Axes], changed: Sequence[Change]) -> Iterator[Held]:
    """Stacks that a GPU's loops want in another order, given and returned."""
    for r in restacked(priced.stacks, priced.graph, values, changed, priced.mesh.sizes):
        size = local_bytes(priced.fusion.kept.of_value[r.stack], values[r.stack], priced)
        yield Held(r.begin, r.end, size, r.stack, values[r.stack], True)


def _laid_anew(priced: Priced, values: Sequence[Axes], changed: Sequence[Change]) -> Iterator[Held]:
    """Copies of tables, of their state and of stacks, as the compiler lays them anew."""
    fitted = priced.cluster.chip.fitted
    gather = first_gather(priced, changed)
    resharded = {c.value for c in changed if any(m.kind in LAID_BACK for m in c.moves)}
    copies = dict[int, Copied]()
    sizes = dict[int, float]()
    for v, most in priced.copied.items():
        copy = as_laid(most, v, resharded)
        size = copy_bytes(priced.graph.values[v].type, values[v], priced.mesh.sizes, copy.along)
        begin = min(copy.begin, max(copy.early, gather))
        if size and begin < copy.end:
            copies[v] = copy._replace(begin=begin)
            sizes[v] = size / 2 if copy.narrow else size
    if fitted is not None and fitted.handed_on:
        copies = in_groups(copies, sizes, fitted.vmem)
    for v, copy in copies.items():
        yield Held(copy.begin, copy.end, sizes[v], v, values[v], True)


def _spread(priced: Priced, values: Sequence[Axes]) -> Iterator[Held]:
    """Operands of batched products that are laid anew for them, with the batch outside."""
    graph, kept = priced.graph, priced.fusion.kept
    for op in graph.ops:
        if op.name != DOT:
            continue
        step = priced.live.when[op.id]
        for k, (v, dims) in enumerate(zip(op.inputs, op.rule.operands, strict=True)):
            outer = batch_dims(op.rule, dims)
            if not outer or outer == priced.fusion.outer[v]:
                continue
            shape = Sharding(values[v]).local_shape(graph.values[v].shape, priced.mesh.sizes)
            if wasteful(shape, outer):
                size = local_bytes(kept.sent(v, (op.id, k) in kept.narrow), values[v], priced)
                yield Held(step, step + 1, size * padded(shape, outer), v, values[v], True)


def _in_tiles(priced: Priced, values: Sequence[Axes]) -> Iterator[Held]:
    """Bags of short rows, each row along the lanes of a tile, while they are added up or made."""
    graph, sizes = priced.graph, priced.mesh.sizes
    fitted = priced.cluster.chip.fitted
    for o, v in bags(graph).items() if fitted is not None and fitted.tile_folded else ():
        shape = Sharding(values[v]).local_shape(graph.values[v].shape, sizes)
        nbytes = tile_bytes(shape, graph.values[v].type.bits)
        if nbytes:
            step = priced.live.when[o]
            yield Held(step, step + 1, nbytes, v, values[v], True)


def _turned(priced: Priced, changed: Sequence[Change]) -> Iterator[Held]:
    """Bags of short rows, each row along the lanes of a tile, beside an all-to-all of theirs."""
    for c in changed:
        if c.tiles:
            kind, step = priced.graph.values[c.value].type, priced.live.when[c.op]
            nbytes = turned_bytes(kind.shape, c.tiles, kind.bits)
            yield Held(step, step + 1, nbytes, c.value, c.source, True)


def held_changes(priced: Priced, changed: Sequence[Change]) -> Iterator[tuple[Change, Held]]:
    """What lies in memory for each reshard: its copy, or the summands it sums."""
    live = priced.live
    last: dict[tuple[int, int], int] = {}
    for (op, k), copy in priced.copies.items():
        key = copy, priced.graph.ops[op].inputs[k]
        last[key] = max(last.get(key, 0), live.when[op])
    early = {**gathers_ahead(priced, changed), **gathers_combined(priced, changed)}
    for n, c in enumerate(changed):
        sent = any(m.kind != "slice" for m in c.moves)
        begin = live.when[c.op]
        if c.side == "result" or not (sent or live.stored[c.value]):
            continue
        end = last[c.shared, c.value] if c.side == "copy" else begin
        size = lying_bytes(c.value, c.nbytes, c.target, priced)
        yield c, Held(early.get(n, begin), end + 1, size, c.value, c.target, True)
    late = early and sums_whole(priced.cluster.platform)
    yield from _summands(priced, changed, updated_last(priced.graph) if late else {})


def _summands(
    priced: Priced, changed: Sequence[Change], late: Mapping[int, int]
) -> Iterator[tuple[Change, Held]]:
    """Results that lie there as they are made, too.

    Not where a TPU hands them on in its VMEM. But those of what a loop stacks up, as of gradients,
    it keeps to the end of the loop's body (steps of LLaMA for v5e:4x4). Outside loops it sums them
    whole, and each reader takes its part of the whole sum, which lies there until the last of them
    (gradients in steps of MLPs, GPT and LLaMA for v5e, v5p and v6e; jax 0.10.2, libtpu 0.0.42.1).
    late: products, each with the one that the update of its sum waits for.
    """
    graph, live = priced.graph, priced.live
    fitted = priced.cluster.chip.fitted
    near = 0.0 if fitted is None else fitted.handed_on * fitted.vmem
    stacked = frozenset[int]() if fitted is None else _stacked(graph)
    whole, consumers = sums_whole(priced.cluster.platform), graph.consumers()
    for c in changed:
        if c.side != "result" or all(m.kind == "slice" for m in c.moves):
            continue
        begin = live.when[c.op]
        end = begin + 1
        if c.value in stacked:
            loop = graph.innermost(graph.ops[c.op].region, LOOPS)
            end = max(end, live.when[graph.regions[loop].end - 1])
        elif whole and PARTIAL in c.source and not graph.ops[c.op].region:
            end = max(end, _last_read(priced, c.value, consumers))
            end = max(end, live.when[late[c.op]] + 1 if c.op in late else 0)
        size = lying_bytes(c.value, c.nbytes, c.source, priced)
        if size > near or c.value in stacked:
            yield c, Held(begin, end, size, c.value, c.source, True)


def _stacked(graph: Graph) -> frozenset[int]:
    """Values that are only stacked up by their loop, perhaps computed on element by element."""
    out: set[int] = set()
    readers = graph.consumers()
    for v in range(len(graph.values) - 1, -1, -1):
        if readers[v] and all(_stacks(graph.ops[c], k, out) for c, k in readers[v]):
            out.add(v)
    return frozenset(out)


def _stacks(op: Op, operand: int, stacked: set[int]) -> bool:
    """Whether it stacks up what it reads, or makes what is only stacked up of it."""
    if op.name == "region_exit":
        return op.outputs[operand] in stacked
    return op.name == "scan_stack" or (op.rule.fuses and stacked.issuperset(op.outputs))


def _last_read(priced: Priced, value: int, consumers: Sequence[Sequence[tuple[int, int]]]) -> int:
    """One past the last read of a value, or of what is computed from it in one kernel."""
    graph, live = priced.graph, priced.live
    last, made, seen = 0, [value], {value}
    while made:
        v = made.pop()
        if live.stored[v]:
            last = max(last, live.spans[v][1])
            continue
        readers = (graph.ops[o] for o, _ in consumers[v])
        new = {u for op in readers if not op.is_link for u in op.outputs} - seen
        made += new
        seen |= new
    return last


def memory(priced: Priced, found: Sequence[Held]) -> npt.NDArray[np.float64]:
    """Bytes per device at each step of the program: of its HBM, without what lies in VMEM."""
    change = np.zeros(priced.live.steps + 1)
    made = _made(priced, found)
    inside = _lent(priced, found, made)
    for k, h in enumerate(found):
        if k not in inside:
            change[h.begin] += h.nbytes
            change[h.end] -= h.nbytes
    near = (_span(found[k]) for k in made if k not in inside)
    return np.cumsum(change) - in_vmem(near, priced.live.steps + 1, _vmem(priced))


def _vmem(priced: Priced) -> float:
    """Bytes of the VMEM that results are handed on in; 0 where they are not."""
    fitted = priced.cluster.chip.fitted
    return 0.0 if fitted is None or not fitted.handed_on else fitted.vmem


def _span(h: Held) -> Span:
    return Span(h.begin, h.end, h.nbytes)


def _made(priced: Priced, found: Sequence[Held]) -> list[int]:
    """Places of what the program makes, or copies, for itself: no argument, and no result."""
    makers, results = priced.graph.producers(), set(priced.graph.outputs)
    return [
        k
        for k, h in enumerate(found)
        if (h.copy or makers[h.value] >= 0) and h.value not in results
    ]


def _lent(priced: Priced, found: Sequence[Held], made: Sequence[int]) -> frozenset[int]:
    """Places of what lies in memory that is idle: of results, and of arguments given away.

    made: as of _made. Not of what a TPU's VMEM may take, which is placed there first.
    """
    idle = {v: (begin, end) for v, begin, end in priced.live.idle}
    relaid = {h.value: h.end for h in found if h.copy and h.value in priced.stacks.made}
    pieces = list[Span]()
    for h in found:
        if not h.copy and h.value in idle:
            begin, end = idle[h.value]
            pieces.append(Span(begin, relaid.get(h.value, end), h.nbytes))
    vmem = _vmem(priced)
    needed = [k for k in made if not may_lie_there(_span(found[k]), vmem)]
    return frozenset(needed[i] for i in lent(pieces, [_span(found[k]) for k in needed]))


def peak_memory(priced: Priced, values: Sequence[Axes], changed: Sequence[Change]) -> float:
    """Bytes per device at the fullest moment, resharded copies counted where they live."""
    return float(memory(priced, list(held(priced, values, changed))).max(initial=0.0))


def local_bytes(nbytes: float, axes: Axes, priced: Priced) -> float:
    """Bytes one device holds of a value with this sharding."""
    return math.ceil(nbytes / Sharding(axes).shards(priced.mesh.sizes))


def lying_bytes(v: int, nbytes: float, axes: Axes, priced: Priced) -> float:
    """Bytes that a value, or a copy of it, takes in one device's memory: on TPU in whole tiles."""
    size = local_bytes(nbytes, axes, priced)
    if priced.cluster.platform != "tpu":
        return size
    shape = Sharding(axes).local_shape(priced.graph.values[v].shape, priced.mesh.sizes)
    return size * padded(shape, priced.fusion.outer[v])
