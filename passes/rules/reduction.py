"""What may a reduction split?  Every dim: a kept one for good, a reduced one leaving partials.

The reduction's `op` says how partial results are put together: add, max, min, mul, and, or with the
plain collective of that name. `argmax` and `argmin` travel as (value, index) pairs. There is no
collective for xor or the user's own function (XLA's CPU and GPU backends refuse one): what these
reduce stays whole.
"""

from __future__ import annotations

from collections.abc import Collection

from passes.ir.graph import Signature
from passes.ir.rule import Rule
from passes.rules.factors import Factors
from passes.rules.registry import rule

_OPS = {
    "argmax": "argmax",
    "argmin": "argmin",
    "reduce_and": "and",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_or": "or",
    "reduce_prod": "mul",
    "reduce_sum": "add",
}


@rule(*_OPS)
def reduction(s: Signature) -> Rule:
    """`i k -> i`, k reduced. Only a sum lets partial sums pass."""
    op = _OPS[s.name]
    f = Factors()
    shape = s.operands[0].shape
    axes = frozenset(s.params["axes"])
    dims = [f.reduction(n, op) if d in axes else f.parallel(n) for d, n in enumerate(shape)]
    kept = [dim for d, dim in enumerate(dims) if d not in axes]
    linear = ((0,),) if op == "add" else ()
    return f.rule([dims], [kept], linear=linear, flops=float(s.operands[0].size))


@rule("reduce_xor")
def reduce_xor(s: Signature) -> Rule:
    """`i k -> i`, k whole."""
    return _by_function(s, 1, s.params["axes"])


@rule("reduce")
def reduce(s: Signature) -> Rule:
    """Any number of arrays reduced together by the user's function, each from its start value."""
    return _by_function(s, len(s.results), s.params["dimensions"])


def _by_function(s: Signature, count: int, axes: Collection[int]) -> Rule:
    f = Factors()
    shape = s.operands[0].shape
    dims = [f.whole(n) if d in axes else f.parallel(n) for d, n in enumerate(shape)]
    kept = [dim for d, dim in enumerate(dims) if d not in axes]
    return f.rule(
        [dims] * count + [()] * (len(s.operands) - count),
        [kept] * count,
        flops=float(s.operands[0].size * count),
    )
