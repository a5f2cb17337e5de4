"""What may a product split whose rows fall into groups of any length, or whose operands are scaled?

`ragged_dot` is the product of a mixture of experts: rows sorted by expert, one weight matrix each,
and the number of rows of each expert. Three kinds, by the dim that is ragged:

* rows: `i k, g k j, g -> i j`. Rows and columns are parallel, k is reduced, and so is g: a device
  with some of the experts computes their rows and leaves zeros in the others.
* the summed dim: `k i, k j, g -> g i j` (gradients of the weights). k is reduced, the groups of the
  result are parallel: each device sums the rows of its own groups.
* a batch dim: a plain batched product, the group sizes play no part.

Every device sees all group sizes, because a group's place follows from those before it.
XLA's CPU and GPU programs are a masked dense product in which all of this holds; libtpu 0.0.42
gathers rows and experts for its own ragged product on TPU, and splits only k and columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from passes.ir.graph import Signature
from passes.ir.rule import Dim, Rule
from passes.rules.factors import Factors
from passes.rules.registry import rule


@rule("ragged_dot_general")
def ragged_dot_general(s: Signature) -> Rule:
    """See above; FLOP are those of the rows there are, not of a padded product."""
    numbers = s.params["ragged_dot_dimension_numbers"]
    (left_sum, right_sum), (left_batch, right_batch) = numbers["dot_dimension_numbers"]
    groups = numbers["rhs_group_dimensions"]
    left_shape, right_shape, sizes = (t.shape for t in s.operands[:3])
    left_free = _others(len(left_shape), (*left_sum, *left_batch))
    right_free = _others(len(right_shape), (*right_sum, *right_batch, *groups))
    f = Factors()
    left = {a: f.parallel(left_shape[a]) for a in (*left_batch, *left_free)}
    left |= {a: f.reduction(left_shape[a], "add") for a in left_sum}
    right = {b: left[a] for a, b in zip(left_batch, right_batch, strict=True)}
    right |= {b: left[a] for a, b in zip(left_sum, right_sum, strict=True)}
    right |= {b: f.reduction(right_shape[b], "add") for b in groups}
    right |= {b: f.parallel(right_shape[b]) for b in right_free}
    out = [left[a] for a in (*left_batch, *left_free)] + [right[b] for b in right_free]
    flops = 2.0 * s.results[0].size * math.prod(left_shape[a] for a in left_sum)
    outer = [*left_batch, *left_free]  # what may stand before the groups in the group sizes
    if numbers["lhs_ragged_dimensions"][0] in left_sum:
        out.insert(0, f.parallel(sizes[-1]))
        flops /= max(1, sizes[-1])  # each row belongs to one group only
        outer = [*left_batch, *left_sum]
    group_sizes = [left[a] for a in outer[: len(sizes) - 1]] + [f.whole(sizes[-1])]
    more = [f.whole_dims(t.shape) for t in s.operands[3:]]
    operands = [_in_order(left), _in_order(right), group_sizes, *more]
    return f.rule(operands, [out], linear=((0,), (1,)), flops=flops)


def _others(rank: int, dims: Sequence[int]) -> list[int]:
    return [d for d in range(rank) if d not in dims]


def _in_order(dims: Mapping[int, Dim]) -> list[Dim]:
    return [dims[d] for d in sorted(dims)]


@rule("scaled_matmul_wrapper")
def scaled_matmul(s: Signature) -> Rule:
    """`b i (k a), b j (k a), b i k, b j k -> b i j`: one scale for a summed elements."""
    batch, rows, summed = s.operands[0].shape
    columns = s.operands[1].shape[1]
    blocks = s.operands[2].shape[2]
    f = Factors()
    b, i, j = f.parallel(batch), f.parallel(rows), f.parallel(columns)
    k = f.reduction(blocks, "add")
    inner = k + f.whole(summed // blocks)
    flops = 2.0 * batch * rows * columns * summed
    return f.rule(
        [(b, i, inner), (b, j, inner), (b, i, k), (b, j, k)],
        [(b, i, j)],
        linear=((0,), (1,)),
        flops=flops,
    )
