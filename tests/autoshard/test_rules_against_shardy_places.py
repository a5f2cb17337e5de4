"""More of Shardy's opinion on operations whose results depend on places.

Products of options (modes, groups, gradients, pooling kinds, batch dims) that
`autoshard.rule_samples` has one example of each. The comparison is the same: sets of factors that
may be split, each with its kind, length and places. A difference that is not listed fails, and so
does a listed one that is gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import passes.rules  # noqa: F401
from autoshard.jax_compat import jax_version
from autoshard.rule_samples import Sample, Spec, c64, equation, f32, i32
from autoshard.shardy import ask_shardy
from autoshard.signature import signature
from passes.ir.rule import Rule
from passes.rules.registry import hand_rule

MODES = ("clip", "fill", "promise_in_bounds")
FORMS = (
    "rows, 2-d", "middle", "pairs", "pairs apart", "row of a stretch", "along 0", "vmapped",
)  # fmt: skip


def gathers() -> Iterator[Sample]:
    forms: dict[str, tuple[Callable[..., Any], tuple[Spec, ...]]] = {
        "rows, 2-d": (lambda x, i, mode: x.at[i].get(mode=mode), (f32(8, 10), i32(4, 6))),
        "middle": (lambda x, i, mode: x.at[:, i].get(mode=mode), (f32(8, 10, 2), i32(4))),
        "pairs": (lambda x, i, mode: x.at[i, i].get(mode=mode), (f32(8, 10), i32(4))),
        "pairs apart": (lambda x, i, mode: x.at[i, :, i].get(mode=mode), (f32(8, 10, 6), i32(4))),
        "row of a stretch": (lambda x, i, mode: x.at[i, 2:6].get(mode=mode), (f32(8, 10), i32(4))),
        "along 0": (
            lambda x, i, mode: jnp.take_along_axis(x, i, 0, mode=mode), (f32(8, 10), i32(4, 10)),
        ),
    }  # fmt: skip
    for mode in MODES:
        for name, (fn, args) in forms.items():
            yield Sample("gather", f"{name}, {mode}", partial(fn, mode=mode), args)
        rows = jax.vmap(lambda x, i, mode=mode: x.at[i].get(mode=mode))
        yield Sample("gather", f"vmapped, {mode}", rows, (f32(4, 8, 10), i32(4, 6)))


def scatters() -> Iterator[Sample]:
    kinds = {
        "scatter": "set", "scatter-add": "add", "scatter-max": "max", "scatter-min": "min",
        "scatter-mul": "multiply", "scatter-sub": "subtract",
    }  # fmt: skip
    for name, method in kinds.items():

        def rows(x: Any, i: Any, u: Any, method: str = method) -> Any:
            return getattr(x.at[i], method)(u, mode="drop")

        def middle(x: Any, i: Any, u: Any, method: str = method) -> Any:
            return getattr(x.at[:, i], method)(u, mode="drop")

        def pairs(x: Any, i: Any, u: Any, method: str = method) -> Any:
            return getattr(x.at[i, i], method)(u, mode="drop")

        yield Sample(name, "rows, 2-d", rows, (f32(8, 10), i32(4, 6), f32(4, 6, 10)))
        yield Sample(name, "middle", middle, (f32(8, 10, 2), i32(4), f32(8, 4, 2)))
        yield Sample(name, "pairs", pairs, (f32(8, 10), i32(4), f32(4)))
        yield Sample(name, "vmapped", jax.vmap(rows), (f32(4, 8, 10), i32(4, 6), f32(4, 6, 10)))
    cache = jax.vmap(lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)))
    yield Sample("scatter", "cache, one row", cache, (f32(4, 8, 6), f32(4, 1, 6), i32(4)))
    yield Sample("scatter", "cache, two rows", cache, (f32(4, 8, 6), f32(4, 2, 6), i32(4)))
    embed = jax.grad(lambda t, i: jnp.sum(t[i] ** 2))
    yield Sample("scatter-add", "gradient of an embedding", embed, (f32(8, 10), i32(4, 6)))


def slices() -> Iterator[Sample]:
    for rows in (1, 2, 8):
        yield Sample(
            "dynamic_slice", f"{rows} of 8 rows",
            lambda x, i, rows=rows: lax.dynamic_slice(x, (i, 0), (rows, 6)), (f32(8, 6), i32()),
        )  # fmt: skip
        yield Sample(
            "dynamic_update_slice", f"{rows} of 8 rows",
            lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)),
            (f32(8, 6), f32(rows, 6), i32()),
        )  # fmt: skip


def convolutions() -> Iterator[Sample]:
    """Each with the gradients of both operands."""

    def conv(strides: Any = (1, 1), padding: Any = "SAME", **more: Any) -> Callable[..., Any]:
        return lambda x, w: lax.conv_general_dilated(x, w, strides, padding, **more)

    cases = {
        "plain": (conv(), f32(2, 4, 8, 8), f32(6, 4, 3, 3)),
        "valid": (conv(padding="VALID"), f32(2, 4, 8, 8), f32(6, 4, 3, 3)),
        "stride 2": (conv((2, 2)), f32(2, 4, 8, 16), f32(6, 4, 3, 3)),
        "patches": (conv((2, 2), "VALID"), f32(2, 4, 8, 16), f32(6, 4, 2, 2)),
        "dilated window": (conv(rhs_dilation=(2, 2)), f32(2, 4, 8, 8), f32(6, 4, 3, 3)),
        "groups": (conv(feature_group_count=2), f32(2, 8, 8, 8), f32(12, 4, 3, 3)),
        "depthwise": (conv(feature_group_count=8), f32(2, 8, 8, 8), f32(8, 1, 3, 3)),
        "depthwise, multiplied": (conv(feature_group_count=4), f32(2, 4, 8, 8), f32(12, 1, 3, 3)),
        "batch groups": (conv(batch_group_count=2), f32(6, 4, 8, 8), f32(10, 4, 3, 3)),
        "one dim": (
            lambda x, w: lax.conv_general_dilated(x, w, (1,), "SAME"), f32(2, 4, 8), f32(6, 4, 3),
        ),
    }  # fmt: skip
    for name, (fn, x, w) in cases.items():
        out = jax.eval_shape(fn, x, w)

        def to_picture(g: Any, w: Any, fn: Any = fn, x: Any = x) -> Any:
            return jax.linear_transpose(lambda y: fn(y, w), x)(g)

        def to_weights(g: Any, x: Any, fn: Any = fn, w: Any = w) -> Any:
            return jax.linear_transpose(lambda v: fn(x, v), w)(g)

        yield Sample("conv_general_dilated", name, fn, (x, w))
        grad = f32(*out.shape)
        yield Sample("conv_general_dilated", f"{name}, to the picture", to_picture, (grad, w))
        yield Sample("conv_general_dilated", f"{name}, to the weights", to_weights, (grad, x))


def windows() -> Iterator[Sample]:
    shapes = {
        "apart": ((1, 2, 2), (1, 2, 2), "VALID"),
        "overlapping": ((1, 3, 3), (1, 2, 2), "SAME"),
        "valid": ((1, 3, 1), (1, 1, 1), "VALID"),
        "everything": ((1, 8, 8), (1, 1, 1), "VALID"),
    }
    for case, window in shapes.items():
        for kind, combine, start in (("sum", lax.add, 0.0), ("max", lax.max, -jnp.inf)):
            pool = partial(
                lambda x, combine, start, window: lax.reduce_window(x, start, combine, *window),
                combine=combine, start=start, window=window,
            )  # fmt: skip
            yield Sample(f"reduce_window_{kind}", case, pool, (f32(2, 8, 8),))


def batched() -> Iterator[Sample]:
    """Sorts and linear algebra with two batch dims."""
    yield Sample("sort", "three dims", lambda x: lax.sort(x, dimension=1), (f32(4, 6, 8),))
    yield Sample("sort", "argsort", lambda x: jnp.argsort(x, axis=0), (f32(4, 6),))
    yield Sample("approx_top_k", "three dims", lambda x: lax.approx_min_k(x, 3), (f32(2, 4, 6),))
    la, square, tall = lax.linalg, f32(2, 4, 6, 6), f32(2, 4, 8, 6)
    for name, fn, args in (
        ("cholesky", partial(la.cholesky, symmetrize_input=False), (square,)),
        ("eig", la.eig, (square,)),
        ("eigh", partial(la.eigh, symmetrize_input=False), (square,)),
        ("hessenberg", la.hessenberg, (square,)),
        ("householder_product", la.householder_product, (tall, f32(2, 4, 6))),
        ("lu", la.lu, (square,)),
        ("lu", la.lu, (tall,)),
        ("qr", la.qr, (tall,)),
        ("schur", la.schur, (square,)),
        ("svd", la.svd, (tall,)),
        ("svd", partial(la.svd, compute_uv=False), (tall,)),
        ("tridiagonal", la.tridiagonal, (square,)),
        ("fft", jnp.fft.fft2, (c64(2, 4, 6),)),
        ("fft", jnp.fft.ifft, (c64(2, 4, 6),)),
        ("fft", jnp.fft.fftn, (c64(2, 4, 6),)),
        ("fft", jnp.fft.irfft2, (c64(2, 4, 6),)),
    ):
        shape = "x".join(map(str, args[0].shape))
        yield Sample(name, f"{getattr(fn, '__name__', 'options')} {shape}", fn, args)
    for axis in (0, 1, 2):
        yield Sample("cumsum", f"axis {axis}", lambda x, a=axis: lax.cumsum(x, a), (f32(4, 6, 8),))


SAMPLES = (
    *gathers(), *scatters(), *slices(), *convolutions(), *windows(), *batched()
)  # fmt: skip
FILLED = (
    "It lowers to a gather and a choice between its result and NaN, which partial sums do not "
    "pass; but an index out of range is out of range on every device."
)
APART = (
    "Shardy splits a dim under any window with an exchange between neighbours; we see that these "
    "windows do not overlap, so that whole windows may be split off freely."
)
ONE_ROW = (
    "Shardy keeps a dim in which one row is written whole; XLA's partitioner lets the owner write."
)
DIFFERENT = {f"gather: {name}, fill": FILLED for name in FORMS} | {
    "conv_general_dilated: patches": APART,
    "conv_general_dilated: patches, to the picture": APART,
    "reduce_window_sum: apart": APART,
    "reduce_window_max: apart": APART,
    "scatter: cache, one row": ONE_ROW,
}
if jax_version() < (0, 11):
    DIFFERENT["dynamic_update_slice: 2 of 8 rows"] = (
        "Shardy lets every device write its part of the stretch; XLA's partitioner gathers."
    )
else:
    DIFFERENT["dynamic_update_slice: 1 of 8 rows"] = ONE_ROW


def groupings(rule: Rule) -> frozenset[tuple[str, int, frozenset[tuple[int, int, int]]]]:
    """The factors that may be split, each with the places (tensor, dim, stride) it indexes."""
    places: list[set[tuple[int, int, int]]] = [set() for _ in rule.factors]
    for t, dims in enumerate((*rule.operands, *rule.results)):
        for d, factors in enumerate(dims):
            for n, f in enumerate(factors):
                stride = math.prod(rule.factors[g].size for g in factors[n + 1 :])
                places[f].add((t, d, stride))
    return frozenset(
        (f.op or f.kind, f.size, frozenset(places[n]))
        for n, f in enumerate(rule.factors)
        if f.size > 1 and f.kind in ("parallel", "reduction") and places[n]
    )


def test_enough_cases_and_no_stale_reason() -> None:
    names = [str(s) for s in SAMPLES]
    assert len(set(names)) == len(names) >= 70
    assert set(DIFFERENT) <= set(names)
    assert all(DIFFERENT.values())


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_rule_is_shardys(sample: Sample) -> None:
    eqn = equation(sample)
    ours = hand_rule(signature(eqn))
    assert ours is not None
    theirs, reason = ask_shardy(eqn)
    agree = theirs is not None and groupings(ours) == groupings(theirs)
    listed = DIFFERENT.get(str(sample))
    if listed is None:
        assert agree, f"\nours:   {ours}\nShardy: {theirs or reason}"
    else:
        assert not agree, f"no longer differs from Shardy: take {sample} off the list ({listed})"
