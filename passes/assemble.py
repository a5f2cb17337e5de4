"""From a choice to a Plan: shardings, strategies, reshards, and what each of them costs.

Everything here is read off the choice; nothing is decided any more. The memory is counted again,
exactly: with the resharded copies, which the problem leaves out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from passes.compiler import compiler_options, sums_whole
from passes.constraints import asked
from passes.decisions import DimMap
from passes.ir.graph import LOOPS, Graph, Op
from passes.ir.plan import (
    Axes,
    Cost,
    Move,
    OpPlan,
    Plan,
    TensorPlan,
    fingerprint,
    signature_of,
)
from passes.ir.sharding import PARTIAL, Sharding
from passes.lent import Span, lent
from passes.op_cost import NEAR, OpCost
from passes.price import Priced
from passes.relaid import copy_bytes
from passes.reshard import (
    WHOLE,
    Step,
    Waited,
    reshard_seconds,
    reshard_sent,
    steps,
    waited_seconds,
)
from passes.solve.problem import Solution
from passes.strategies import (
    NOWHERE,
    Strategy,
    group_of,
    parts,
)
from passes.tile_padding import padded
from passes.vmem import in_vmem


@dataclass(frozen=True, slots=True)
class Change:
    """One value changed from one sharding to another: for an operand of op, or after a result.

    nbytes: of the whole value, as it is sent. waited: what a step loses by a gather.
    """

    op: int
    side: str
    index: int
    value: int
    source: Axes
    target: Axes
    shared: int
    moves: tuple[Step, ...]
    trips: float
    nbytes: float
    waited: Waited


def value_axes(priced: Priced, choice: Sequence[int]) -> tuple[Axes, ...]:
    """The sharding of every value under a choice."""
    out: list[Axes] = []
    groups = priced.decisions.groups
    known: dict[tuple[int, DimMap], Axes] = {}
    for v, g in enumerate(priced.decisions.group_of):
        mapping = groups[g].members[v]
        if (g, mapping) not in known:
            node = priced.node_of_group[g]
            chosen = priced.meanings[node].choices[choice[node]] if node >= 0 else priced.only[g]
            inverse = {d: i for i, d in enumerate(mapping) if d >= 0}
            known[g, mapping] = tuple(inverse[e] if e >= 0 else e for e in chosen)
        out.append(known[g, mapping])
    return tuple(out)


def op_strategies(priced: Priced, choice: Sequence[int]) -> tuple[Strategy, ...]:
    """The strategy of every operation under a choice."""
    return tuple(
        table[choice[owner]] if owner >= 0 else table[0]
        for owner, table in zip(priced.owner, priced.tables, strict=True)
    )


def changes(
    priced: Priced, choice: Sequence[int], values: Sequence[Axes], chosen: Sequence[Strategy]
) -> tuple[Change, ...]:
    """Every reshard, in program order; a shared copy's counts once, at its first reader."""
    out: list[Change] = []
    made: set[tuple[int, int]] = set()
    shared = {op for op, _ in priced.copies}
    agree: dict[int, bool] = {}
    for op, first in zip(priced.graph.ops, priced.like, strict=True):
        if first not in agree:
            wants, gives = priced.layouts.of(op.rule, chosen[op.id])
            have = [values[v] for v in (*op.inputs, *op.outputs)]
            agree[first] = have == [*wants, *gives]
        if not agree[first] or op.id in shared:
            layout = priced.layouts.of(op.rule, chosen[op.id])
            out += _changes_of(priced, op, choice, values, layout, made)
    return tuple(out)


def _changes_of(
    priced: Priced,
    op: Op,
    choice: Sequence[int],
    values: Sequence[Axes],
    layout: tuple[Sequence[Axes], Sequence[Axes]],
    made: set[tuple[int, int]],
) -> Iterator[Change]:
    """Those of one operation. layout: what it wants and gives. made: copies that are there."""
    wants, gives = layout
    all_values = priced.graph.values
    for k, v in enumerate(op.inputs):
        if all_values[v].type.size <= 1 or all_values[v].kind == "literal":
            continue
        have = values[v]
        copy = priced.copies.get((op.id, k), -1)
        if copy >= 0:
            through = priced.meanings[copy].choices[choice[copy]]
            if (copy, v) not in made and have != through:
                yield _change(
                    priced, op, ("copy", k, v), (have, through), copy in priced.narrow, copy
                )
            made.add((copy, v))
            have = through
        if have != wants[k]:
            narrow = (op.id, k) in priced.fusion.kept.narrow
            yield _change(priced, op, ("operand", k, v), (have, wants[k]), narrow, copy)
    for k, v in enumerate(op.outputs):
        if all_values[v].type.size > 1 and gives[k] != values[v]:
            yield _change(priced, op, ("result", k, v), (gives[k], values[v]), False)


def _change(
    priced: Priced,
    op: Op,
    place: tuple[str, int, int],
    axes: tuple[Axes, Axes],
    narrow: bool,
    shared: int = -1,
) -> Change:
    (side, k, v), (source, target) = place, axes
    moves = steps(source, target, priced.mesh.sizes, sums_whole(priced.cluster.platform))
    assert moves is not None, f"{op.name} can not get value {v} from {source} to {target}"
    trips = priced.graph.trips(op.region)
    nbytes = _sent_bytes(priced, side, v, source, narrow)
    hides = side != "result"
    share = priced.overlap.waited(v, op.id, trips, nbytes) if hides else WHOLE
    return Change(op.id, side, k, v, source, target, shared, moves, trips, nbytes, share)


def _sent_bytes(priced: Priced, side: str, v: int, source: Axes, narrow: bool) -> float:
    """Bytes of a whole value as it is sent: summands as they are made, to a narrow reader half."""
    if PARTIAL not in source:
        return priced.fusion.kept.sent(v, narrow)
    if side == "result":
        return priced.graph.values[v].type.nbytes
    return priced.fusion.kept.of_value[v]


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
    graph, live, parts = priced.graph, priced.live, priced.fusion.parts
    for value in graph.values:
        begin, end = live.spans[value.id]
        if begin < end:
            axes = values[value.id]
            size = lying_bytes(value.id, priced.fusion.kept.of_value[value.id], axes, priced)
            size *= parts.get(value.id, 1)
            yield Held(begin, end, size, value.id, axes, False)
    for v, (begin, end) in priced.copied.items():
        size = copy_bytes(graph.values[v].type, values[v], priced.mesh.sizes)
        if size:
            yield Held(begin, end, size, v, values[v], True)
    for _, copy in held_changes(priced, changed):
        yield copy


def held_changes(priced: Priced, changed: Sequence[Change]) -> Iterator[tuple[Change, Held]]:
    """What lies in memory for each reshard: its copy, or the summands it sums."""
    live = priced.live
    last: dict[tuple[int, int], int] = {}
    for (op, k), copy in priced.copies.items():
        key = copy, priced.graph.ops[op].inputs[k]
        last[key] = max(last.get(key, 0), live.when[op])
    for c in changed:
        sent = any(m.kind != "slice" for m in c.moves)
        begin = live.when[c.op]
        if c.side == "result" or not (sent or live.stored[c.value]):
            continue
        end = last[c.shared, c.value] if c.side == "copy" else begin
        size = lying_bytes(c.value, c.nbytes, c.target, priced)
        yield c, Held(begin, end + 1, size, c.value, c.target, True)
    yield from _summands(priced, changed)


def _summands(priced: Priced, changed: Sequence[Change]) -> Iterator[tuple[Change, Held]]:
    """Results that lie there as they are made, too.

    Not where a TPU hands them on in its VMEM. But those of what a loop stacks up, as of gradients,
    it keeps to the end of the loop's body (steps of LLaMA for v5e:4x4), and those that wait for a
    loop to end it keeps whole until they are read, or sums them whole (the gradient of the head in
    steps of GPT and LLaMA for v5e, v5p and v6e; jax 0.10.2, libtpu 0.0.42.1).
    """
    graph, live = priced.graph, priced.live
    fitted = priced.cluster.chip.fitted
    near = 0.0 if fitted is None else NEAR * fitted.vmem
    stacked = frozenset[int]() if fitted is None else _stacked(graph)
    whole, consumers = sums_whole(priced.cluster.platform), graph.consumers()
    loops = [live.when[r.begin] for r in graph.regions if r.kind in LOOPS and r.begin < r.end]
    for c in changed:
        if c.side != "result" or all(m.kind == "slice" for m in c.moves):
            continue
        begin = live.when[c.op]
        end = begin + 1
        if c.value in stacked:
            loop = graph.innermost(graph.ops[c.op].region, LOOPS)
            end = max(end, live.when[graph.regions[loop].end - 1])
        elif whole and PARTIAL in c.source and not graph.ops[c.op].region:
            last = _last_read(priced, c.value, consumers)
            end = last if any(begin < loop < last for loop in loops) else end
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
    inside = _lent(priced, found) if priced.cluster.platform == "gpu" else frozenset[int]()
    for k, h in enumerate(found):
        if k in inside:
            continue
        change[h.begin] += h.nbytes
        change[h.end] -= h.nbytes
    return np.cumsum(change) - _in_vmem(priced, found)


def _in_vmem(priced: Priced, found: Sequence[Held]) -> npt.NDArray[np.float64] | float:
    """Bytes of what is made, or copied, and needs no HBM, at each step; 0 but on a TPU."""
    fitted = priced.cluster.chip.fitted
    if fitted is None:
        return 0.0
    makers, results = priced.graph.producers(), set(priced.graph.outputs)
    made = (h for h in found if (h.copy or makers[h.value] >= 0) and h.value not in results)
    spans = (Span(h.begin, h.end, h.nbytes) for h in made)
    return in_vmem(spans, priced.live.steps + 1, fitted.vmem)


def _lent(priced: Priced, found: Sequence[Held]) -> frozenset[int]:
    """Places of what lies in the memory of results that are not there yet."""
    graph, live = priced.graph, priced.live
    makers, results = graph.producers(), set(graph.outputs)
    idle, needed, places = list[Span](), list[Span](), list[int]()
    for k, h in enumerate(found):
        maker = makers[h.value]
        if h.value in results and h.begin == 0 and maker >= 0 and not h.copy:
            begin = graph.regions[graph.ops[maker].region].begin  # a stack: its loop's first step
            stack = graph.ops[maker].name == "scan_stack"
            idle.append(Span(0, live.when[begin if stack else maker], h.nbytes))
        elif h.value not in results and maker >= 0:
            needed.append(Span(h.begin, h.end, h.nbytes))
            places.append(k)
    return frozenset(places[i] for i in lent(idle, needed))


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


@dataclass(frozen=True, slots=True)
class Answer:
    """A choice read back: shardings of values, strategies and seconds of ops, and all reshards."""

    values: tuple[Axes, ...]
    strategies: tuple[Strategy, ...]
    seconds: tuple[float, ...]
    changes: tuple[Change, ...]


def read_back(priced: Priced, choice: Sequence[int]) -> Answer:
    """What a choice means for every value and operation."""
    values, chosen = value_axes(priced, choice), op_strategies(priced, choice)
    return Answer(values, chosen, _seconds(priced, chosen), changes(priced, choice, values, chosen))


def _seconds(priced: Priced, chosen: Sequence[Strategy]) -> tuple[float, ...]:
    """Compute seconds per step of every operation; like operations are priced once."""
    graph, known = priced.graph, {}
    cost = OpCost(graph, priced.fusion, priced.mesh, priced.cluster, priced.links, priced.layouts)
    trips = [graph.trips(r.id) for r in graph.regions]
    out: list[float] = []
    for op, strategy, first in zip(graph.ops, chosen, priced.like, strict=True):
        if first < op.id or op.is_link:
            out.append(0.0 if op.is_link else out[first])
            continue
        traffic = priced.fusion.traffic[op.id]
        key = (id(op.rule), strategy, id(traffic), op.id in priced.fusion.kept.one_pass)
        if key not in known:
            known[key] = cost.seconds(op, strategy)
        out.append(known[key] * trips[op.region])
    return tuple(out)


def cost_of(priced: Priced, choice: Sequence[int]) -> Cost:
    """The predicted cost of a choice."""
    return _cost(priced, read_back(priced, choice))


def _cost(priced: Priced, answer: Answer) -> Cost:
    graph, sizes = priced.graph, priced.mesh.sizes
    comm = exposed = sent = 0.0
    for c in answer.changes:
        comm += reshard_seconds(c.moves, c.nbytes, priced.links) * c.trips
        exposed += waited_seconds(c.moves, c.nbytes, priced.links, c.waited) * c.trips
        sent += reshard_sent(c.moves, c.nbytes, sizes) * c.trips
    compute = sum(answer.seconds)
    flops = sum(
        graph.ops[o].rule.flops
        / parts(answer.strategies[o], sizes)
        * graph.trips(graph.ops[o].region)
        * times
        for o, times in Counter(priced.like).items()
        if graph.ops[o].rule.flops
    )
    return Cost(
        step_time=compute + exposed,
        compute_time=compute,
        comm_time=comm,
        peak_memory=peak_memory(priced, answer.values, answer.changes),
        comm_bytes=sent,
        flops=flops,
    )


def assemble(
    priced: Priced, solution: Solution, solver: str, limit: float, notes: Sequence[str] = ()
) -> Plan:
    """The plan that a solution stands for."""
    graph = priced.graph
    answer = read_back(priced, solution.choice)
    values = answer.values
    wanted = asked(priced, solution.choice, values, answer.strategies)
    signature = signature_of(graph)
    return Plan(
        name=graph.name,
        fingerprint=fingerprint(signature),
        signature=signature,
        cluster=priced.cluster.to_dict(),
        mesh=tuple(zip(priced.mesh.names, priced.mesh.sizes, strict=True)),
        solver=solver,
        status=solution.status,
        gap=solution.gap,
        memory_limit=limit,
        cost=_cost(priced, answer),
        arguments=tuple(_tensor(priced, v, graph.values[v].name, values[v]) for v in graph.inputs),
        results=tuple(
            _tensor(priced, v, name, values[v])
            for v, name in zip(graph.outputs, graph.output_names, strict=True)
        ),
        ops=_op_plans(priced, answer),
        values=wanted.values,
        reshards=wanted.reshards,
        donated=tuple(i for i, v in enumerate(graph.inputs) if v in graph.donated),
        notes=(*graph.notes, *notes),
        compiler_options=compiler_options(priced.cluster),
    )


def _tensor(priced: Priced, v: int, name: str, axes: Axes) -> TensorPlan:
    type = priced.graph.values[v].type
    spec = Sharding(axes).spec(len(type.shape), priced.mesh)
    hints = priced.decisions.groups[priced.decisions.group_of[v]].hints
    return TensorPlan(
        name, type.shape, type.dtype, type.nbytes, spec, hints[0].origin if hints else ""
    )


def _op_plans(priced: Priced, answer: Answer) -> tuple[OpPlan, ...]:
    by_op: dict[int, list[Change]] = {}
    for c in answer.changes:
        by_op.setdefault(c.op, []).append(c)
    return tuple(_op_plan(priced, op, answer, by_op.get(op.id, ())) for op in priced.graph.ops)


def _op_plan(priced: Priced, op: Op, answer: Answer, changed: Sequence[Change]) -> OpPlan:
    graph, mesh = priced.graph, priced.mesh
    trips = graph.trips(op.region)
    values, strategy = answer.values, answer.strategies[op.id]
    split = parts(strategy, mesh.sizes)
    return OpPlan(
        id=op.id,
        name=op.name,
        source=op.source,
        factors=op.rule.notation(),
        strategy=tuple(
            (mesh.names[a], op.rule.factors[s].name if s >= 0 else f"partial operand {group_of(s)}")
            for a, s in enumerate(strategy)
            if s != NOWHERE
        ),
        result=" ".join(
            Sharding(values[v]).text(graph.values[v].shape, _short(graph, v), mesh)
            for v in op.outputs
        ),
        seconds=answer.seconds[op.id],
        bytes=sum(local_bytes(graph.values[v].type.nbytes, values[v], priced) for v in op.outputs),
        flops=op.rule.flops / split * trips,
        trips=trips,
        collectives=tuple(m for c in changed for m in moves_of(priced, op, c)),
    )


def _short(graph: Graph, v: int) -> str:
    return str(graph.values[v].type).split("[")[0]


def moves_of(priced: Priced, op: Op, change: Change) -> list[Move]:
    """The collectives of one change of sharding."""
    value = priced.graph.values[change.value]
    what = value.name or f"{value.type} of {op.name}"
    return [
        Move(
            kind=s.kind,
            axes=(priced.mesh.names[s.axis],),
            nbytes=s.larger * change.nbytes,
            seconds=reshard_seconds([s], change.nbytes, priced.links),
            source=op.source,
            value=what,
            trips=change.trips,
        )
        for s in change.moves
        if s.kind != "slice"
    ]
