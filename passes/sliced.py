"""Which whole values is only a slice kept of, from when on?

Where the devices take each its part of a value that lies whole on all of them, XLA takes the slice
once, as soon as the first reader needs it, for all who read the same slice later: what is computed
again in a reader, such as a transpose, is computed of the slice. So the whole value dies when the
last of its slices has been taken, unless somebody reads it whole (mixed heads of an attention that
maps over blocks, in a step for v5e; jax 0.10.2, libtpu 0.0.42.1). XLA:GPU does the same with what
products make; what is computed on elements it does not write whole where all who read it take
slices: the kernel computes no more than the slice (softmax and its gradient read by products, and
exp of a product, for H100 and A100; jax 0.10.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from passes.answer import Change
from passes.ir.graph import Graph
from passes.ir.plan import Axes
from passes.priced import Priced

# What hands on elements as they are, in another order.
_MOVES = frozenset({"copy", "expand_dims", "reshape", "squeeze", "transpose"})


class Sliced(NamedTuple):
    """A whole value dies at the step `end`; slices of it lie there instead up to `until`.

    One that never lies there whole ends where it begins, and its slices begin there. taken: the
    changes that take the slices, one for each.
    """

    end: int
    until: int
    taken: tuple[Change, ...]


def sliced(priced: Priced, changed: Sequence[Change]) -> Mapping[int, Sliced]:
    """By value those outside loops of which only slices are left before their last reader."""
    graph, live = priced.graph, priced.live
    cuts = {(c.op, c.index): c for c in changed if takes_a_slice(graph, c)}
    gpu = priced.cluster.platform == "gpu"
    out: dict[int, Sliced] = {}
    producers = graph.producers()
    made = {_moved(graph, live.stored, producers, c.value) for c in cuts.values()}
    for v in sorted(made - set(graph.outputs)):
        if not live.stored[v] or graph.values[v].kind != "result":
            continue
        reads = _reads(graph, live.stored, v, cuts)
        if reads is None:
            continue
        whole, taken = reads
        steps = [live.when[c.op] for c in taken]
        end, until = max([*steps, *(live.when[o] for o in whole)]) + 1, live.spans[v][1]
        maker = graph.ops[producers[v]]
        if gpu and not whole and maker.rule.fuses and not maker.is_link:
            end = live.spans[v][0]
        if end < until:
            out[v] = Sliced(end, until, taken)
    return out


def takes_a_slice(graph: Graph, c: Change) -> bool:
    """Whether a reader outside loops takes its part of what is there whole."""
    slices = bool(c.moves) and all(m.kind == "slice" for m in c.moves)
    return slices and c.side != "result" and not graph.ops[c.op].region


def _moved(graph: Graph, stored: Sequence[bool], producers: Sequence[int], v: int) -> int:
    """What lies in memory and is only moved inside readers to be this value; perhaps itself."""
    while not stored[v] and producers[v] >= 0 and graph.ops[producers[v]].name in _MOVES:
        v = graph.ops[producers[v]].inputs[0]
    return v


def _reads(
    graph: Graph, stored: Sequence[bool], v: int, cuts: Mapping[tuple[int, int], Change]
) -> tuple[list[int], tuple[Change, ...]] | None:
    """Operations that read a value whole, and the slices taken of it; None if not all are known."""
    consumers = graph.consumers()
    whole, taken = list[int](), dict[tuple[int, Axes], Change]()
    waiting = [v]
    while waiting:
        for o, k in consumers[waiting.pop()]:
            op = graph.ops[o]
            if op.region or op.is_link:
                return None
            if (o, k) in cuts:
                c = cuts[o, k]
                taken.setdefault((c.value, c.target), c)
            elif all(stored[u] for u in op.outputs):
                whole.append(o)
            elif op.name in _MOVES:
                waiting += op.outputs
            else:
                return None
    return whole, tuple(taken.values())
