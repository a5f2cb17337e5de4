"""What may a convolution split?  Batch, features of both sides, groups, and space with a halo.

In letters, for one spatial dim: `b i x, o i w -> b o x`, where i is reduced, x takes a halo from
its neighbours and the window w is whole. With groups the features fall apart, groups outermost:
`b (g i) x, (g o) i w -> b (g o) x` for `feature_group_count` (g is all features in a depthwise
convolution), `(g b) i x, (g o) i w -> b (g o) x` for `batch_group_count`.

The gradient of the weights is a convolution with a small result and a window as large as the
picture. There the window is split together with the picture, and partial results are left:
`b i x, o i x -> b o w`, x reduced, with a halo on the left operand.

FLOP: 2 for each product of a weight and an element, not counting the zeros that dilation puts
between the elements (8 for complex numbers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from passes.ir.graph import Signature
from passes.ir.rule import Dim, Rule
from passes.rules.factors import Factors, is_complex
from passes.rules.registry import rule
from passes.rules.windows import Window, split_window


class _Spatial(NamedTuple):
    """Dims of one spatial dim in picture, weights and result."""

    left: Dim
    right: Dim
    out: Dim


def _spatial(f: Factors, read: int, made: int, w: Window) -> _Spatial:
    turned = w.transposed(made)
    if not w.fits(read, made) and turned.fits(read, w.size):
        pieces = math.gcd(read, w.size)
        moving = f.add(pieces, "reduction", op="add", halo=turned.halo)
        return _Spatial(
            moving + f.whole(read // pieces), moving + f.whole(w.size // pieces), f.whole(made)
        )
    left, out = split_window(f, read, made, w)
    return _Spatial(left, f.whole(w.size), out)


def _windows(s: Signature, spatial: Sequence[int]) -> list[Window]:
    p = s.params
    low = (pad[0] for pad in p["padding"])
    return [
        Window(*of_dim)
        for of_dim in zip(
            (s.operands[1].shape[d] for d in spatial),
            p["window_strides"],
            low,
            p["lhs_dilation"],
            p["rhs_dilation"],
            strict=True,
        )
    ]


@rule("conv_general_dilated")
def conv_general_dilated(s: Signature) -> Rule:
    """The one convolution of jax: plain, strided, dilated, transposed, grouped."""
    numbers = s.params["dimension_numbers"]
    left_batch, left_feature, *left_space = numbers["lhs_spec"]
    right_out, right_in, *right_space = numbers["rhs_spec"]
    out_batch, out_feature, *out_space = numbers["out_spec"]
    left_shape, right_shape = s.operands[0].shape, s.operands[1].shape
    made = s.results[0]
    feature_groups, batch_groups = s.params["feature_group_count"], s.params["batch_group_count"]
    f = Factors()
    batch = f.parallel(made.shape[out_batch])
    group = f.parallel(feature_groups * batch_groups)  # one of the two is 1
    feature = f.reduction(right_shape[right_in], "add")
    outs = f.parallel(right_shape[right_out] // (feature_groups * batch_groups))
    left: list[Dim] = [()] * len(left_shape)
    right: list[Dim] = [()] * len(right_shape)
    out: list[Dim] = [()] * len(made.shape)
    left[left_batch] = group + batch if batch_groups > 1 else batch
    left[left_feature] = group + feature if feature_groups > 1 else feature
    right[right_out] = out[out_feature] = group + outs
    right[right_in] = feature
    out[out_batch] = batch
    windows = _windows(s, right_space)
    for a, b, c, w in zip(left_space, right_space, out_space, windows, strict=True):
        left[a], right[b], out[c] = _spatial(f, left_shape[a], made.shape[c], w)
    products = made.size * right_shape[right_in] * math.prod(w.size for w in windows)
    each = 8.0 if is_complex(made) else 2.0
    flops = each * products / math.prod(s.params["lhs_dilation"])
    return f.rule([left, right], [out], linear=((0,), (1,)), flops=flops)
