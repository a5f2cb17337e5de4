"""Which shardings is XLA asked for, and where?

A value gets a constraint where a decision begins; what is tied to it follows. Where an operation
wants an operand otherwise than its value is, or makes a result otherwise, the shardings on the way
are asked for one after the other, from the value's own on, so that XLA's partitioner makes the
moves that were priced. Without the first, XLA lets the value's maker have what its reader wants:
train steps of LLaMA and of experts sent up to half as much again (jax 0.10.2).

A product whose result is only transposed is asked for its sharding behind the transpose: XLA:TPU
makes one kernel of the two, but not across a constraint (jax 0.10.2, libtpu 0.0.42.1). An
all-to-all between the two is asked for on the side where the dims that it changes come first:
XLA:TPU lays an array anew where they do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from passes.ir.graph import Graph, Op
from passes.ir.plan import Axes, Reshard
from passes.ir.sharding import BROADCAST, PARTIAL
from passes.priced import Priced
from passes.reshard import path
from passes.strategies import Strategy, divides


@dataclass(frozen=True, slots=True)
class Asked:
    """values: per value the sharding it is constrained to, None where it follows from others.

    reshards: of operands, and of results that are made otherwise than they are kept.
    """

    values: tuple[Axes | None, ...]
    reshards: tuple[Reshard, ...]


def asked(
    priced: Priced, choice: Sequence[int], values: Sequence[Axes], chosen: Sequence[Strategy]
) -> Asked:
    """What the lowering asks of XLA. values: of every value its sharding; chosen: strategies."""
    found = {(r.op, r.operand): r for r in _reshards(priced, choice, values, chosen)}
    constrained = _constrained(priced, values)
    for o, k in found:
        inputs = priced.graph.ops[o].inputs
        if k < len(inputs) and PARTIAL not in values[inputs[k]]:
            constrained[inputs[k]] = values[inputs[k]]
    for op, transpose in _transposed(priced, values, chosen, found):
        to = transpose.params["permutation"]
        if constrained[op.outputs[0]] is not None:
            constrained[op.outputs[0]] = None
            constrained[transpose.outputs[0]] = values[transpose.outputs[0]]
        made = found.pop((op.id, len(op.inputs)), None)
        if made is not None:
            way = tuple(_permuted(axes, to) for axes in made.path)
            found[transpose.id, 1] = Reshard(transpose.id, 1, way)
    return Asked(tuple(constrained), tuple(found[key] for key in sorted(found)))


def _transposed(
    priced: Priced,
    values: Sequence[Axes],
    chosen: Sequence[Strategy],
    found: Mapping[tuple[int, int], Reshard],
) -> Iterator[tuple[Op, Op]]:
    """Products, each with the transpose that alone reads its result and does not reshard it."""
    graph, consumers = priced.graph, priced.graph.consumers()
    for op in graph.ops:
        v = op.outputs[0] if op.name == "dot_general" else -1
        if v < 0 or v in graph.outputs or len(consumers[v]) != 1:
            continue
        reader = graph.ops[consumers[v][0][0]]
        if reader.name != "transpose" or reader.region != op.region:
            continue
        made = priced.layouts.of(op.rule, chosen[op.id])[1][0]
        to = reader.params["permutation"]
        same = _permuted(values[v], to) == values[reader.outputs[0]]
        pairs = [(a, b) for a, b in zip(made, values[v], strict=True) if a != b]
        changed = {d for pair in pairs for d in pair}
        places = [] if PARTIAL in made else [(d, to.index(d)) for d in changed if d >= 0]
        behind = sum(after for _, after in places) <= sum(before for before, _ in places)
        if same and behind and (reader.id, 0) not in found and (reader.id, 1) not in found:
            yield op, reader


def _permuted(axes: Axes, permutation: Sequence[int]) -> Axes:
    """The sharding of a transposed value."""
    return tuple(permutation.index(e) if e >= 0 else e for e in axes)


def _constrained(priced: Priced, values: Sequence[Axes]) -> list[Axes | None]:
    """Which values get a constraint: where a decision begins; what is tied to it follows.

    What is made of no argument, such as a mask, gets none: a device makes the part that its readers
    want. XLA:GPU takes a constrained one for more than it is, and keeps it through a loop in full
    (a forward pass of GPT on 8 H100: 1.25 GiB of 3.14; jax 0.10.2). XLA:TPU does not.
    """
    graph, group_of_value = priced.graph, priced.decisions.group_of
    out: list[Axes | None] = [None] * len(graph.values)
    free = set[int]() if priced.cluster.platform == "tpu" else of_no_argument(graph)
    keep = {*graph.inputs, *graph.outputs}
    for v in keep:
        out[v] = values[v]
    for op in graph.ops:
        groups = {group_of_value[v] for v in op.inputs}
        for v in op.outputs:
            if PARTIAL in values[v] or graph.values[v].type.size <= 1:
                continue
            begins = v not in free and (op.is_link or group_of_value[v] not in groups)
            if v in keep or begins:
                out[v] = values[v]
    return out


def of_no_argument(graph: Graph) -> set[int]:
    """Values that depend on no argument and no effect, in whatever trip of a loop."""
    found = {v.id for v in graph.values if v.kind in ("argument", "constant")}
    known = -1
    while known < len(found):
        known = len(found)
        for op in graph.ops:
            if op.effects or not found.isdisjoint(op.inputs):
                found.update(op.outputs)
        for carry, after in graph.ties:
            if after in found:
                found.add(carry)
    return {v.id for v in graph.values} - found


def _reshards(
    priced: Priced, choice: Sequence[int], values: Sequence[Axes], chosen: Sequence[Strategy]
) -> Iterator[Reshard]:
    """What the lowering has to do to operands, and to results made otherwise than they are kept."""
    for op in priced.graph.ops:
        wants, gives = priced.layouts.of(op.rule, chosen[op.id])
        yield from _operand_reshards(priced, choice, op, values, wants)
        if not op.is_link:
            yield from _result_reshards(priced, op, values, gives)


def _operand_reshards(
    priced: Priced, choice: Sequence[int], op: Op, values: Sequence[Axes], wants: Sequence[Axes]
) -> Iterator[Reshard]:
    graph = priced.graph
    for k, v in enumerate(op.inputs):
        if graph.values[v].type.size <= 1 or graph.values[v].kind == "literal":
            continue
        if PARTIAL in wants[k]:
            continue
        copy = priced.copies.get((op.id, k), -1)
        have = priced.meanings[copy].choices[choice[copy]] if copy >= 0 else values[v]
        through, way = _way(priced, v, values[v], have), _way(priced, v, have, wants[k])
        if through:
            yield Reshard(op.id, k, way, copy, through)
        elif way:
            yield Reshard(op.id, k, way)


def _result_reshards(
    priced: Priced, op: Op, values: Sequence[Axes], gives: Sequence[Axes]
) -> Iterator[Reshard]:
    for k, v in enumerate(op.outputs):
        made, kept = gives[k], values[v]
        if priced.graph.values[v].type.size <= 1 or made == kept or PARTIAL in kept:
            continue
        first = _first(op, k, made, kept)
        way = _way(priced, v, made if first is None else first, kept)[:-1]
        if first is not None:
            way = (first, *way)
        if way:
            yield Reshard(op.id, len(op.inputs) + k, way)


def _way(priced: Priced, v: int, source: Axes, target: Axes) -> tuple[Axes, ...]:
    """What can be asked for on the way: no partial value, and no dim in unequal parts."""
    shape, sizes = priced.graph.values[v].shape, priced.mesh.sizes
    asked = path(source, target, sizes)
    return tuple(a for a in asked if PARTIAL not in a and divides(a, shape, sizes))


def _first(op: Op, k: int, made: Axes, kept: Axes) -> Axes | None:
    """The sharding in which a result is asked for first, where that is not a step of its reshard.

    An operation is not computed in a third way when XLA is told in which sharding its result is
    made. Partial sums are made by the first step, but for two cases in which XLA's partitioner is
    wrong (jax 0.10.2): told to scatter the sum of what it gathers from split rows, it may make an
    invalid program; and it adds wrong blocks of a dot_general that is partial over several axes
    when one of the sums is to be scattered over a batch dim that another axis splits.
    """
    if PARTIAL not in made:
        return made
    sums = [a for a, e in enumerate(made) if e == PARTIAL]
    batch = [d for d, dim in enumerate(op.rule.results[k]) if op.rule.is_batch(dim)]
    several = len(sums) > 1 and any(kept[a] in batch and kept[a] in made for a in sums)
    if op.name == "gather" or several:
        return tuple(BROADCAST if e == PARTIAL else e for e in made)
    return None
