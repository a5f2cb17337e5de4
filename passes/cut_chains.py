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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from passes.answer import Change
from passes.ir.graph import Op
from passes.priced import Priced
from passes.tile_padding import DOT

# These have no elements of their own: slices of them are made of the slice of what is spread out.
_SPREAD = frozenset({"broadcast_in_dim", "iota"})

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


def _slices(stored: Sequence[bool], c: Change) -> bool:
    local = bool(c.moves) and all(m.kind == "slice" for m in c.moves)
    return local and c.side != "result" and not stored[c.value]


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
