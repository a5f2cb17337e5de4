"""What may a matrix product split?  Rows, columns, batches, and, leaving partial sums, the middle.

A product of b x i x k by b x k x j costs 2 b i j k FLOP: one multiplication and one addition for
each (b, i, j, k).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from passes.ir.graph import Signature
from passes.ir.rule import Dim, Rule
from passes.rules.factors import Factors, is_complex
from passes.rules.registry import rule

_Contract = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


def _names(letter: str, count: int) -> list[str]:
    """k, or k0, k1, ... when there are several."""
    return [letter] if count == 1 else [f"{letter}{n}" for n in range(count)]


def _free(rank: int, used: Sequence[int]) -> list[int]:
    return [d for d in range(rank) if d not in used]


def _split_dims(
    f: Factors, s: Signature, numbers: _Contract, summed: Sequence[int]
) -> tuple[list[Dim], list[Dim], list[Dim]]:
    """Factors of both operands and of the result; `summed` is the length of each summed factor."""
    (left_sum, right_sum), (left_batch, right_batch) = numbers
    left_shape, right_shape = s.operands[0].shape, s.operands[1].shape
    left: list[Dim] = [()] * len(left_shape)
    right: list[Dim] = [()] * len(right_shape)
    out: list[Dim] = []
    for a, b, name in zip(left_batch, right_batch, _names("b", len(left_batch)), strict=True):
        left[a] = right[b] = f.parallel(left_shape[a], name)
        out.append(left[a])
    left_free = _free(len(left_shape), (*left_sum, *left_batch))
    for a, name in zip(left_free, _names("i", len(left_free)), strict=True):
        left[a] = f.parallel(left_shape[a], name)
        out.append(left[a])
    pairs = zip(left_sum, right_sum, summed, _names("k", len(left_sum)), strict=True)
    for a, b, size, name in pairs:
        left[a] = right[b] = f.reduction(size, "add", name)
    right_free = _free(len(right_shape), (*right_sum, *right_batch))
    for b, name in zip(right_free, _names("j", len(right_free)), strict=True):
        right[b] = f.parallel(right_shape[b], name)
        out.append(right[b])
    return left, right, out


def _product_flops(s: Signature, numbers: _Contract) -> float:
    """FLOP of the product; a complex multiply-add is four real ones."""
    contracted = math.prod(s.operands[0].shape[d] for d in numbers[0][0])
    return (8.0 if is_complex(s.results[0]) else 2.0) * s.results[0].size * contracted


@rule("dot_general")
def dot_general(s: Signature) -> Rule:
    """`b i k, b k j -> b i j`, for any number of dims of each sort, in any order."""
    numbers = s.params["dimension_numbers"]
    f = Factors()
    summed = [s.operands[0].shape[d] for d in numbers[0][0]]
    left, right, out = _split_dims(f, s, numbers, summed)
    return f.rule([left, right], [out], linear=((0,), (1,)), flops=_product_flops(s, numbers))


@rule("scaled_dot")
def scaled_dot(s: Signature) -> Rule:
    """A product whose operands carry one scale for each block along the summed dims.

    Whole blocks may be split off; inside a block the summed dim stays in one piece.
    """
    numbers = s.params["dimension_numbers"]
    summed = numbers[0]
    shapes = [t.shape for t in s.operands]
    blocks = [
        math.gcd(shapes[2][a], shapes[3][b]) for a, b in zip(summed[0], summed[1], strict=True)
    ]
    f = Factors()
    left, right, out = _split_dims(f, s, numbers, blocks)
    tensors = [left, right, *(_scale_dims(d, shapes[n + 2]) for n, d in enumerate((left, right)))]
    for which, dims in enumerate(tensors):
        for count, dim in zip(blocks, summed[which % 2], strict=True):
            dims[dim] = tensors[which % 2][dim][:1] + f.whole(shapes[which][dim] // count)
    return f.rule(tensors, [out], linear=((0,), (1,)), flops=_product_flops(s, numbers))


def _scale_dims(dims: Sequence[Dim], shape: Sequence[int]) -> list[Dim]:
    """Dims of a scale: those of the operand it scales, where it is not broadcast."""
    return [() if n == 1 else d for n, d in zip(shape, dims, strict=True)]
