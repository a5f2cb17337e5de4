"""Which values lie whole because one of their readers takes a slice of what is made of them?

XLA:TPU computes a chain of operations on elements inside its readers, and where a reader wants its
device's part of what the chain gives, it takes the slice before the chain. That goes up to the
first value that has another reader, such as a sum over a row. There the slice stops: this value is
written out by the kernel that makes it, as wide as it is there, and in place of the product that it
was converted from. (Seen on weights of an attention, of which one product takes the keys of its own
device: the f32 exponentials lie there beside the scores; jax 0.10.2, libtpu 0.0.42.1, v5e. XLA:GPU
keeps what is sliced.) What a forward pass reads whole lies there until a backward pass takes its
slice. Behind a chain it does not (a ResNet for v6e, a mixture of experts for v5e); why was not
found, so behind a chain only a slice that is taken soon counts.

Nor does a slice go up beyond an operation that cuts a part out of a value: what is cut out is
written whole, by one kernel for all parts of the value (one for each where they are strided), and
the kernels that read it take their device's slice. So beside a gathered value of hidden columns lie
both of its halves, value and gate. What is read whole by operations on elements is cut out inside
them, beside a part that is sliced, too. (One part, two and three, of a gathered value, of a
product's, of a chain's and of an argument, along the split dim and another, bf16 and f32, read by
operations on elements, by products and by sums, for v5e; parts of a gathered value for v6e and v5p;
jax 0.10.2, libtpu 0.0.42.1.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from passes.answer import Change
from passes.ir.graph import Op
from passes.priced import Priced
from passes.tile_padding import DOT

# These have no elements of their own: slices of them are made of the slice of what is spread out.
_SPREAD = frozenset({"broadcast_in_dim", "iota"})

# What makes parts of a value, and what says another shape of one.
_CUTS = frozenset({"slice", "split"})
_NAMED_ANEW = frozenset({"reshape", "squeeze"})

_SOON = 100  # operations: more than one layer's attention with its gradient has


class Whole(NamedTuple):
    """A value that fusion computes anew lies there over [begin, end); `replaces` does not."""

    begin: int
    end: int
    replaces: int | None


def whole_beside_slices(priced: Priced, changed: Sequence[Change]) -> Mapping[int, Whole]:
    """By value that is not stored otherwise."""
    graph, live = priced.graph, priced.live
    slicing = {(c.op, c.index): c for c in changed if _slices(live.stored, c)}
    if not slicing:
        return {}
    consumers = graph.consumers()
    last: dict[int, int] = {}  # when the slice is taken, by value of which only a slice is computed
    out: dict[int, Whole] = {}
    for op in reversed(graph.ops):
        if not _chain(op) or any(live.stored[v] for v in op.outputs):
            continue
        for v in op.outputs:
            direct = [slicing[read] for read in consumers[v] if read in slicing]
            others = [graph.ops[o] for o, k in consumers[v] if (o, k) not in slicing]
            cut = [u for o in others for u in o.outputs if u in last]
            taken = [live.when[c.op] for c in direct] + [last[u] for u in cut]
            if taken and len({c.target for c in direct}) + len(others) == 1:
                last[v] = max(taken)
            elif taken and (direct or max(taken) - live.when[op.id] < _SOON):
                out[v] = Whole(live.when[op.id], max(taken) + 1, _converted(priced, op))
    return out


class Part(NamedTuple):
    """A part of a value lies there whole over [begin, end), for the slice that is taken of it."""

    begin: int
    end: int
    taken: Change


def whole_parts(priced: Priced, changed: Sequence[Change]) -> Iterator[Part]:
    """Parts that lie whole before each device takes its slice; those of one value at once."""
    graph, when, producers = priced.graph, priced.live.when, priced.graph.producers()
    parts = dict[int, list[Change]]()  # by the value that they are parts of
    for c in changed:
        if c.side == "result" and _is_local(c):
            op = graph.ops[c.op]
            while op.name in _NAMED_ANEW and producers[op.inputs[0]] >= 0:
                op = graph.ops[producers[op.inputs[0]]]
            if op.name in _CUTS:
                parts.setdefault(op.inputs[0], []).append(c)
    for taken in parts.values():
        for c in taken:
            begin = when[c.op]
            last = max(when[d.op] for d in taken if when[d.op] < begin + _SOON)
            yield Part(begin, last + 1, c)


def _slices(stored: Sequence[bool], c: Change) -> bool:
    return c.side != "result" and not stored[c.value] and _is_local(c)


def _is_local(c: Change) -> bool:
    """Whether each device only takes its slice of what is there."""
    return bool(c.moves) and all(m.kind == "slice" for m in c.moves)


def _chain(op: Op) -> bool:
    return op.rule.fuses and not op.is_link and op.name not in _SPREAD


def _converted(priced: Priced, op: Op) -> int | None:
    """The product that nobody reads but this conversion."""
    if op.name != "convert_element_type":
        return None
    graph, (source,) = priced.graph, op.inputs
    alone = len(graph.consumers()[source]) == 1 and source not in graph.outputs
    made = graph.producers()[source]
    product = made >= 0 and graph.ops[made].name == DOT
    return source if alone and product and priced.live.stored[source] else None
