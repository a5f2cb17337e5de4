"""By how much is an array larger in a TPU's memory?  It lies there in whole tiles.

XLA:TPU stores the two minor dims of an array in tiles of 8 x 128 elements, of 1, 2 or 4 rows where
there are no more (docs.jax.dev/en/latest/pallas/tpu/details.html; `T(8,128)` in a compiled
program). Which dims are minor it is free to choose: counted is the choice that wastes least. But
what a batched product makes keeps the batch outside, and so does what is computed from it element
by element: scores of 197 x 197 places take 200 x 256. And what a convolution reads and makes has
its features and its batch on the tiles, whatever follows from it element by element or by windows:
16 images of 224 x 224 x 3 lie as 224 x 224 tiles of 4 x 128.

Where the batch outside wastes a lot, more than three times the memory, the operands of a product
are laid anew for it, and its result is laid back for its readers: products of 9 x 9 and 9 x 64,
16384 of them, take 16 x 128 for each while they run. Where it wastes less, chains go on as they
are. (Steps of ViT, ResNet and DLRM for v5e, v5p and v6e; jax 0.10.2, libtpu 0.0.42.1.)
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import lru_cache

from cost_models.fitted import LANES
from passes.ir.graph import Graph
from passes.ir.rule import Dim, Rule

DOT = "dot_general"
_ROWS = 8
_A_LOT = 3.0


def outer_dims(graph: Graph) -> tuple[frozenset[int], ...]:
    """Per value the dims that are not minor: the batch of a product, the space of a convolution."""
    out = [frozenset[int]()] * len(graph.values)
    spread: set[int] = set()
    for op in graph.ops:
        if op.name == "conv_general_dilated":
            numbers, given = op.params["dimension_numbers"], op.inputs[0]
            out[op.outputs[0]] = frozenset(numbers["out_spec"][2:])
            if graph.values[given].kind == "result" and not out[given]:
                out[given] = frozenset(numbers["lhs_spec"][2:])
        elif op.name == DOT:
            v = op.outputs[0]
            out[v] = batch_dims(op.rule, op.rule.results[0])
            spread.update([v] if wasteful(graph.values[v].type.shape, out[v]) else [])
        elif not op.is_link and (op.rule.fuses or op.name.startswith(_WINDOWS)):
            for v in op.outputs:
                like = [u for u in op.inputs if _same_dims(graph, u, v, op.rule.fuses)]
                out[v] = next((out[u] for u in like if out[u] and u not in spread), out[v])
    return tuple(out)


_WINDOWS = ("reduce_window", "select_and_scatter", "select_and_gather")


def _same_dims(graph: Graph, u: int, v: int, same_sizes: bool) -> bool:
    a, b = graph.values[u].type.shape, graph.values[v].type.shape
    return a == b if same_sizes else len(a) == len(b)


def batch_dims(rule: Rule, dims: Sequence[Dim]) -> frozenset[int]:
    """Which of these dims, of an operand or the result of a product, are its batch."""
    batch = {f for dim in rule.results[0] if rule.is_batch(dim) for f in dim}
    return frozenset(d for d, dim in enumerate(dims) if batch.intersection(dim))


def wasteful(shape: Sequence[int], outer: Set[int]) -> bool:
    """Whether an array takes a lot more memory with these dims outside than it need.

    >>> wasteful((16384, 9, 64), {0}), wasteful((16, 12, 197, 197), {0, 1})
    (True, False)
    """
    return bool(outer) and padded(shape, outer) >= _A_LOT * padded(shape)


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
