"""What may an operation split that only moves elements about?  The dims that it leaves alone.

A dim that is cut, padded, joined or turned round stays in one piece: its pieces would lie at other
places after the operation than before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from passes.ir.graph import Signature
from passes.ir.rule import Dim, Rule
from passes.rules.factors import Factors
from passes.rules.registry import rule

_LINEAR = ((0,),)


def _without(dims: Sequence[Dim], axis: int) -> list[Dim]:
    return [d for n, d in enumerate(dims) if n != axis]


def _touched(s: Signature) -> float:
    """Bytes of an operation that reads only as much as it writes."""
    return 2.0 * sum(t.nbytes for t in s.results)


@rule("broadcast_in_dim")
def broadcast_in_dim(s: Signature) -> Rule:
    """`i -> j i`: new dims may be split, the operand then being the same everywhere."""
    f = Factors()
    out = f.parallel_dims(s.results[0].shape)
    shape = s.operands[0].shape
    places = s.params["broadcast_dimensions"]
    operand = [() if n == 1 else out[d] for n, d in zip(shape, places, strict=True)]
    # Further operands are the lengths of a shape that is only known at run time.
    extra = [()] * (len(s.operands) - 1)
    return f.rule([operand, *extra], [out], linear=_LINEAR, fuses=True)


@rule("broadcast_to")
def broadcast_to(s: Signature) -> Rule:
    """As numpy broadcasts: the last dims line up."""
    f = Factors()
    out = f.parallel_dims(s.results[0].shape)
    shape = s.operands[0].shape
    skip = len(out) - len(shape)
    operand = [() if n == 1 else out[skip + d] for d, n in enumerate(shape)]
    return f.rule([operand], [out], linear=_LINEAR, fuses=True)


@rule("concatenate")
def concatenate(s: Signature) -> Rule:
    """`i a, i b -> i c`, the joined dim whole in all of them."""
    axis = s.params["dimension"]
    f = Factors()
    out = [f.whole(n) if d == axis else f.parallel(n) for d, n in enumerate(s.results[0].shape)]
    operands = [
        [f.whole(n) if d == axis else out[d] for d, n in enumerate(t.shape)] for t in s.operands
    ]
    return f.rule(operands, [out], linear=(tuple(range(len(operands))),), fuses=True)


@rule("empty", "empty2", "iota", "iota_2x32_shape")
def iota(s: Signature) -> Rule:
    """`-> i j`: every device can make its own piece."""
    f = Factors()
    out = f.parallel_dims(s.results[0].shape)
    flops = 0.0 if s.name.startswith("empty") else float(s.results[0].size)
    extra = [()] * len(s.operands)
    return f.rule(extra, [out] * len(s.results), flops=flops, fuses=True)


@rule("pad")
def pad(s: Signature) -> Rule:
    """Padded dims stay whole. Linear in the array and the padding value together."""
    f = Factors()
    operand: list[Dim] = []
    out: list[Dim] = []
    config = s.params["padding_config"]
    sizes = zip(s.operands[0].shape, s.results[0].shape, strict=True)
    for (low, high, inner), (before, after) in zip(config, sizes, strict=True):
        moves = low or high or (inner and before > 1)
        operand.append(f.whole(before) if moves else f.parallel(before))
        out.append(f.whole(after) if moves else operand[-1])
    return f.rule([operand, ()], [out], linear=((0, 1),), fuses=True)


@rule("reshape")
def reshape(s: Signature) -> Rule:
    """Common factors of the old and the new dims, from the outside in.

    While the sizes passed so far are equal on both sides, the next factor is the greatest common
    divisor of what is left of the current dims; where that is one, both sides go on alone, in
    pieces that stay whole, until they are level again. What lies inside such a piece stays whole
    too. (Shardy decomposes in the same way.)
    """
    f = Factors()
    if s.operands[0].size == 0:
        operands = [f.whole_dims(t.shape) for t in s.operands]
        return f.rule(operands, [f.whole_dims(s.results[0].shape)], fuses=True)
    shape = s.operands[0].shape
    order = s.params.get("dimensions") or tuple(range(len(shape)))
    read, new = _decompose(f, [shape[d] for d in order], s.results[0].shape)
    old: list[Dim] = [()] * len(shape)
    for dims, d in zip(read, order, strict=True):
        old[d] = dims
    extra = [()] * (len(s.operands) - 1)
    return f.rule([old, *extra], [new], linear=_LINEAR, fuses=True)


def _decompose(
    f: Factors, before: Sequence[int], after: Sequence[int]
) -> tuple[list[Dim], list[Dim]]:
    """Factors of each dim on both sides of a reshape of a non-empty array."""
    old, new = _Side(before), _Side(after)
    while old.left > 1 or new.left > 1:
        common = math.gcd(old.left, new.left)
        if common > 1 and old.passed == new.passed:
            inside = old.has_whole or new.has_whole
            shared = f.whole(common) if inside else f.parallel(common)
            old.take(common, shared)
            new.take(common, shared)
        else:
            for side in (old, new):
                alone = side.left // common if side.left > common else common
                side.has_whole = True
                side.take(alone, f.whole(alone))
    return old.dims, new.dims


class _Side:
    """One side of a reshape, read from its first dim to its last."""

    __slots__ = ("_at", "_shape", "dims", "has_whole", "left", "passed")

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = shape
        self.dims: list[Dim] = [()] * len(shape)
        self._at = -1
        self.left = 1  # what is left of the current dim
        self.passed = 1  # product of all factors taken so far
        self.has_whole = False  # whether a piece of the current dim stays whole
        self._next()

    def _next(self) -> None:
        while self.left == 1 and self._at + 1 < len(self._shape):
            self._at += 1
            self.has_whole = False
            self.left = self._shape[self._at]

    def take(self, size: int, factor: Dim) -> None:
        """Take a factor of this size off the current dim."""
        if size > 1:
            self.dims[self._at] += factor
            self.left //= size
            self.passed *= size
            self._next()


@rule("rev")
def rev(s: Signature) -> Rule:
    """Reversed dims stay whole."""
    turned = s.params["dimensions"]
    f = Factors()
    shape = s.operands[0].shape
    dims = [f.whole(n) if d in turned else f.parallel(n) for d, n in enumerate(shape)]
    return f.rule([dims], [dims], linear=_LINEAR, fuses=True)


@rule("slice")
def slice_(s: Signature) -> Rule:
    """A dim that is cut stays whole; it reads no more than it writes."""
    f = Factors()
    operand: list[Dim] = []
    out: list[Dim] = []
    for before, after in zip(s.operands[0].shape, s.results[0].shape, strict=True):
        operand.append(f.parallel(before) if before == after else f.whole(before))
        out.append(operand[-1] if before == after else f.whole(after))
    return f.rule([operand], [out], linear=_LINEAR, moved=_touched(s), fuses=True)


@rule("split")
def split(s: Signature) -> Rule:
    """Consecutive slices along one dim, which stays whole."""
    axis = s.params["axis"]
    f = Factors()
    shape = s.operands[0].shape
    dims = [f.whole(n) if d == axis else f.parallel(n) for d, n in enumerate(shape)]
    results = [
        [f.whole(n) if d == axis else dims[d] for d, n in enumerate(t.shape)] for t in s.results
    ]
    return f.rule([dims], results, linear=_LINEAR, moved=_touched(s), fuses=True)


@rule("squeeze")
def squeeze(s: Signature) -> Rule:
    """Dims of length one disappear."""
    f = Factors()
    operand = f.parallel_dims(s.operands[0].shape)
    gone = s.params["dimensions"]
    out = [dim for d, dim in enumerate(operand) if d not in gone]
    return f.rule([operand], [out], linear=_LINEAR, fuses=True)


@rule("stack")
def stack(s: Signature) -> Rule:
    """Equal arrays side by side along a new dim, which stays whole."""
    axis = s.params["axis"]
    f = Factors()
    operand = f.parallel_dims(s.operands[0].shape)
    out = [*operand[:axis], f.whole(len(s.operands)), *operand[axis:]]
    count = len(s.operands)
    return f.rule([operand] * count, [out], linear=(tuple(range(count)),), fuses=True)


@rule("tile")
def tile(s: Signature) -> Rule:
    """`i -> (r i)`: a repeated dim is as many times the old one."""
    f = Factors()
    operand: list[Dim] = []
    out: list[Dim] = []
    for repeats, n in zip(s.params["reps"], s.operands[0].shape, strict=True):
        operand.append(f.parallel(n))
        out.append(f.parallel(repeats) + operand[-1])
    return f.rule([operand], [out], linear=_LINEAR, fuses=True)


@rule("transpose")
def transpose(s: Signature) -> Rule:
    """`i j -> j i`."""
    f = Factors()
    operand = f.parallel_dims(s.operands[0].shape)
    out = [operand[d] for d in s.params["permutation"]]
    return f.rule([operand], [out], linear=_LINEAR, fuses=True)


@rule("unstack")
def unstack(s: Signature) -> Rule:
    """One result for each index of a dim, which stays whole."""
    axis = s.params["axis"]
    f = Factors()
    shape = s.operands[0].shape
    dims = [f.whole(n) if d == axis else f.parallel(n) for d, n in enumerate(shape)]
    return f.rule([dims], [_without(dims, axis)] * len(s.results), linear=_LINEAR, fuses=True)
