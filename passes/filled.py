"""How often does a filled constant lie there, and which part of it?

XLA:GPU makes the zeros of a scattered gradient as an array, to which the scatter adds in place.
Gradients of tables of one shape are added to copies of one constant: it makes all of them in one
kernel, before the first is added to. So they lie there together, and each becomes a gradient.
Where all who read a constant take the same slice of it, it makes no more than the slice. (Steps of
DLRM with 3, 5, 8 and 16 tables of one shape, split by rows and by columns, for A100 and H100; jax
0.10.2.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from passes.answer import Change
from passes.ir.plan import Axes
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
