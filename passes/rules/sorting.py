"""What may a sort split?  Every dim but the one along which it compares.

FLOP here are comparisons: n log2 n for a sort of n, n for the selection of a few.
"""

from __future__ import annotations

import math

from passes.ir.graph import Signature
from passes.ir.rule import Rule
from passes.rules.factors import Factors
from passes.rules.registry import rule


@rule("sort")
def sort(s: Signature) -> Rule:
    """`i a, i a -> i a, i a`: keys and what travels with them (an argsort's positions)."""
    axis = s.params["dimension"]
    shape = s.operands[0].shape
    f = Factors()
    dims = [f.whole(n) if d == axis else f.parallel(n) for d, n in enumerate(shape)]
    count = len(s.operands)
    flops = s.operands[0].size * math.log2(max(2, shape[axis])) * s.params["num_keys"]
    return f.rule([dims] * count, [dims] * count, flops=flops)


@rule("approx_top_k", "top_k")
def top_k(s: Signature) -> Rule:
    """`i a -> i c, i c`: values and positions."""
    shape = s.operands[0].shape
    axis = s.params["axis" if s.name == "top_k" else "reduction_dimension"] % len(shape)
    f = Factors()
    dims = [f.whole(n) if d == axis else f.parallel(n) for d, n in enumerate(shape)]
    out = [f.whole(n) if d == axis else dims[d] for d, n in enumerate(s.results[0].shape)]
    # An approximate one may have further operands; they only say how good it must be.
    more = [f.whole_dims(t.shape) for t in s.operands[1:]]
    return f.rule([dims, *more], [out] * len(s.results), flops=float(s.operands[0].size))
