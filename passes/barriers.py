"""Which huge values does a barrier hold back?  `held_back(graph, bodies, least)`.

Behind a barrier `jax.checkpoint` computes again what it did not save; XLA would merge it with the
first time otherwise. A huge value that a policy saved (`dots_saveable`) goes through the barrier,
too, which needs it whole. It is made again in blocks anyway, and can go by. So can what is cheap,
such as a mask that was drawn before.

In a graph a barrier is one operation for each of its operands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from passes.bodies import Body, Path
from passes.huge import BARRIER, PART, find_huge
from passes.ir.graph import Graph


def held_back(graph: Graph, bodies: Sequence[Body], least: float) -> Mapping[Path, frozenset[int]]:
    """By the path of a barrier the places of operands of more bytes that can go by."""
    out: dict[Path, set[int]] = {}
    large = PART * max((v.type.size for v in graph.values), default=0)
    for body in bodies:
        barriers = list(_barriers(graph, body))
        huge = find_huge(graph, body)
        for path, k, v in barriers:
            cheap = v in huge.leaves and graph.values[v].type.size >= large
            if (v in huge.values or cheap) and graph.values[v].type.nbytes > least:
                out.setdefault(path, set()).add(k)
    return {path: frozenset(places) for path, places in out.items()}


def _barriers(graph: Graph, body: Body) -> Iterator[tuple[Path, int, int]]:
    """The path of each barrier of a body, with the place of each of its operands, and the value."""
    n = len(body.path) + 1
    for op in graph.ops:
        if op.name == BARRIER and op.path[: n - 1] == body.path:
            if len(op.path) == n:
                yield op.path, 0, op.inputs[0]
            elif op.path[n:-1] == ("out",):
                yield op.path[:n], int(op.path[-1]), op.inputs[0]
