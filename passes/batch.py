"""Which dim of which inputs is the batch?  The one whose split reaches the most FLOPs.

The inputs asked are those that are no state (no result takes their place). A candidate's split is
followed forwards through the rules; an operation whose result it splits counts with its FLOPs. One
that sums over it does not: so do the rows of a weight, of a function that returns no new weights.
Other inputs that the split reaches backwards (labels, masks) belong to the same batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from passes.ir.graph import Graph, Hint
from passes.ir.mesh import Mesh
from passes.propagate import propagate

_MOST = 16  # candidates looked at, of different types


def find_batch(graph: Graph, state: Sequence[int]) -> tuple[int, ...]:
    """Input values whose leading dim is the batch; empty where no split reaches any FLOPs.

    state: inputs that results replace (parameters, optimizer state).
    """
    candidates = [
        v
        for v in graph.inputs
        if v not in state and graph.values[v].shape and graph.values[v].shape[0] > 1
    ]
    alike: dict[tuple[tuple[int, ...], str], int] = {}
    for v in candidates:  # layers have weights alike
        alike.setdefault((graph.values[v].shape, graph.values[v].type.dtype), v)
    # Whole numbers (tokens, labels, ids) first: a weight is none.
    order = sorted(alike.values(), key=lambda v: "int" not in graph.values[v].type.dtype)
    best = 0.0
    found: tuple[int, ...] = ()
    for v in order[:_MOST]:
        parts = _smallest_factor(graph.values[v].shape[0])
        flops, dims = reach(graph, {v: 0}, candidates, parts)
        if flops > best * 1.001:
            best, found = flops, tuple(u for u, d in dims.items() if d == 0)
    return found


def reach(
    graph: Graph, seeds: Mapping[int, int], candidates: Sequence[int], parts: int
) -> tuple[float, dict[int, int]]:
    """FLOPs split when these dims of inputs are, and which dim of each candidate is then."""
    mesh = Mesh(("batch",), (parts,))
    hints = [_split(graph, v, dim) for v, dim in seeds.items()]
    found = propagate(graph, mesh, hints).shardings
    total = 0.0
    for op in graph.ops:
        if any(found[u].axes[0] >= 0 for u in op.outputs):
            total += op.rule.flops * graph.trips(op.region)
    return total, {u: found[u].axes[0] for u in candidates if found[u].axes[0] >= 0}


def _split(graph: Graph, v: int, dim: int) -> Hint:
    dims = tuple(("batch",) if d == dim else None for d in range(len(graph.values[v].shape)))
    return Hint(v, dims, "batch", 0, hard=False)


def _smallest_factor(n: int) -> int:
    for p in range(2, int(n**0.5) + 1):
        if n % p == 0:
            return p
    return n
