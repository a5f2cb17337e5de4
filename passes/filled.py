"""How often does a filled constant lie there, and which part of it?

XLA:GPU makes the zeros of a scattered gradient as an array, to which the scatter adds in place.
Gradients of tables of one shape are added to copies of one constant: it makes all of them in one
kernel, before the first is added to. So they lie there together, and each becomes a gradient.
Where all who read a constant take the same slice of it, it makes no more than the slice. (Steps of
DLRM with 3, 5, 8 and 16 tables of one shape, split by rows and by columns, for A100 and H100; jax
0.10.2.)

So it is with what loops start with: stacks full of zeros, and what is carried from a constant on.
Arrays of one shape and one constant are made for all loops ahead of the first (three layers'
attention over blocks of keys, each computed again in its backward half, for H100). XLA:TPU makes
each where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from passes.answer import Change
from passes.ir.graph import LOOPS, Graph
from passes.ir.plan import Axes
from passes.ir.sharding import Sharding
from passes.liveness import IN_PLACE
from passes.priced import Priced
from passes.sliced import takes_a_slice


def copies_at_once(priced: Priced) -> Iterator[tuple[int, int, int]]:
    """Filled constants and the steps [begin, end) of each further copy that is added to.

    The last who adds does so to the constant itself.
    """
    graph, when = priced.graph, priced.live.when
    consumers = graph.consumers()
    for v in priced.fusion.filled:
        readers = (graph.ops[o] for o, k in consumers[v] if k == 0)
        added = sorted(when[op.id] for op in readers if op.name in IN_PLACE and not op.region)
        yield from ((v, added[0], step) for step in added[1:-1])


def made_ahead(priced: Priced, values: Sequence[Axes]) -> Iterator[tuple[int, int, int]]:
    """What loops start with that lies there before its loop, and the steps [begin, end) of that."""
    graph, when, spans = priced.graph, priced.live.when, priced.live.spans
    like: dict[Any, list[tuple[int, int]]] = {}  # by what fills it and its type: steps and values
    for v, start, filler in _starts(graph):
        if spans[v][0] < spans[v][1]:
            kind = graph.values[v].type
            shape = tuple(Sharding(values[v]).local_shape(kind.shape, priced.mesh.sizes))
            like.setdefault((filler, kind.dtype, shape), []).append((when[start], v))
    for found in like.values():
        first = min(found)[0]
        yield from ((v, first, min(step, spans[v][0])) for step, v in found if first < spans[v][0])


def _starts(graph: Graph) -> Iterator[tuple[int, int, str]]:
    """Of loops inside no other: what each starts with, the operation where, and the constant."""
    makers = graph.producers()
    for op in graph.ops:
        if op.name == "scan_stack" and not graph.innermost(graph.regions[op.region].parent, LOOPS):
            yield op.outputs[0], graph.regions[op.region].begin, "0.0"
        elif op.name == "loop_enter" and not graph.innermost(op.region, LOOPS):
            filler = _filler(graph, makers, op.inputs[0])
            if filler and graph.values[op.inputs[0]].type.size > 1:
                yield op.outputs[0], op.id, filler


def _filler(graph: Graph, makers: Sequence[int], v: int) -> str:
    """The constant that fills a value; nothing where none does."""
    while makers[v] >= 0:
        op = graph.ops[makers[v]]
        if op.name not in ("broadcast_in_dim", "convert_element_type"):
            return ""
        v = op.inputs[0]
    return graph.values[v].name if graph.values[v].kind == "literal" else ""


def made_as_read(priced: Priced, changed: Sequence[Change]) -> Mapping[int, Axes]:
    """Filled constants of which all readers take the same slice: how it is split."""
    out: dict[int, Axes] = {}
    consumers = priced.graph.consumers()
    for v in priced.fusion.filled:
        cuts = [c for c in changed if c.value == v and takes_a_slice(priced.graph, c)]
        taken = {read for c in cuts for read in _reads(priced, c)}
        if len({c.target for c in cuts}) == 1 and taken.issuperset(consumers[v]):
            out[v] = cuts[0].target
    return out


def _reads(priced: Priced, c: Change) -> Iterator[tuple[int, int]]:
    """The reads, as (op, operand), that a change is for."""
    if c.side == "operand":
        yield c.op, c.index
    for (op, k), copy in priced.copies.items():
        if c.side == "copy" and copy == c.shared and priced.graph.ops[op].inputs[k] == c.value:
            yield op, k
