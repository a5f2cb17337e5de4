"""By how much is an array larger in a TPU's memory?  It lies there in whole tiles.

XLA:TPU stores the two minor dims of an array in tiles of 8 x 128 elements, of 1, 2 or 4 rows where
there are no more (docs.jax.dev/en/latest/pallas/tpu/details.html; `T(8,128)` in a compiled
program). Which dims are minor it is free to choose: counted is the choice that wastes least. But
what a batched product makes keeps the batch outside, and so does what is computed from it element
by element: scores of 197 x 197 places take 200 x 256, crossings of 16384 x 9 x 64 features 16 x
128 for each of the 16384 (steps of ViT and DLRM for v5e:4x4; jax 0.10.2, libtpu 0.0.42.1).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import lru_cache

from cost_models.fitted import LANES
from passes.ir.graph import Graph

_ROWS = 8


def outer_dims(graph: Graph) -> tuple[frozenset[int], ...]:
    """Per value the dims that are not minor: the batch of the product that it comes from."""
    out = [frozenset[int]()] * len(graph.values)
    for op in graph.ops:
        for v, dims in zip(op.outputs, op.rule.results, strict=True):
            if op.name == "dot_general":
                out[v] = frozenset(d for d, dim in enumerate(dims) if op.rule.is_batch(dim))
            elif op.rule.fuses and not op.is_link:
                shape = graph.values[v].type.shape
                same = [u for u in op.inputs if graph.values[u].type.shape == shape]
                out[v] = next((out[u] for u in same if out[u]), out[v])
    return tuple(out)


def padded(shape: Sequence[int], outer: Set[int] = frozenset()) -> float:
    """Elements in memory over elements of the array, at least 1. outer: as of `outer_dims`.

    >>> shapes = (16, 12, 197, 197), (4, 2048, 16, 64), (1000,), ()
    >>> [round(padded(shape), 3) for shape in shapes]
    [1.299, 1.0, 1.024, 1.0]
    >>> round(padded((16, 12, 197, 197), {0, 1}), 3)
    1.319
    """
    inner = tuple(sorted(n for d, n in enumerate(shape) if n > 1 and d not in outer))
    return _padded(inner or tuple(sorted(n for n in shape if n > 1)))


@lru_cache(maxsize=1 << 14)
def _padded(dims: tuple[int, ...]) -> float:
    if not dims:
        return 1.0
    lanes = [-(-n // LANES) * LANES / n for n in dims]
    if len(dims) == 1:
        return lanes[0]
    rows = [_whole_rows(n) / n for n in dims]
    return min(a * b for i, a in enumerate(lanes) for j, b in enumerate(rows) if i != j)


def _whole_rows(n: int) -> int:
    return -(-n // _ROWS) * _ROWS if n >= _ROWS else 1 << (n - 1).bit_length()
