"""What does the user's own jax.checkpoint keep, and what does it compute again?

Its parts stay as the user wrote them. What they take from the forward half is kept for them anyway;
what they compute again is not to be computed a third time. In the forward half nothing is left of
`jax.checkpoint`: an equation there belongs to it where a part that is computed again does the same
with the same operands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from passes.ir.graph import Graph, Op


def of_user(graph: Graph) -> frozenset[int]:
    """Operations in parts that `jax.checkpoint` computes again, whatever lies in these."""
    return frozenset(op.id for op in graph.ops if graph.innermost(op.region, ("remat",)))


def done_again(
    graph: Graph, forward: Iterable[Op], again: Iterable[Op], same: Mapping[int, int]
) -> frozenset[int]:
    """Those of the forward operations that are done again. again: in order.

    same: from values that `again` reads to those of the forward half that they are.
    """
    known: dict[Any, Op] = {}
    for op in forward:
        known.setdefault(_key(graph, op, op.inputs), op)
    now = dict(same)
    out = set()
    for op in again:
        twin = known.get(_key(graph, op, tuple(now.get(v, v) for v in op.inputs)))
        if twin is not None:
            out.add(twin.id)
            now.update(zip(op.outputs, twin.outputs, strict=True))
    return frozenset(out)


def _key(graph: Graph, op: Op, inputs: tuple[int, ...]) -> Any:
    types = tuple(graph.values[v].type for v in op.outputs)
    return op.name, inputs, types, repr(sorted(op.params.items()))
