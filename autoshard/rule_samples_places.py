"""Sample equations whose results depend on places: indexing, windows, sorting, linear algebra."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.rule_samples import Sample, c64, f32, i32


def place_samples() -> Iterator[Sample]:
    """All of them."""
    yield from _dynamic_slices()
    yield from _gathers()
    yield from _scatters()
    yield from _convolutions()
    yield from _windows()
    yield from _running()
    yield from _sorts()
    yield from _matrices()
    yield from _ragged()


def _dynamic_slices() -> Iterator[Sample]:
    yield Sample(
        "dynamic_slice", "one dim",
        lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 6)), (f32(4, 6), i32()),
    )  # fmt: skip
    yield Sample(
        "dynamic_slice", "both dims",
        lambda x, i: lax.dynamic_slice(x, (i, i), (2, 4)), (f32(4, 6), i32()),
    )  # fmt: skip
    yield Sample(
        "dynamic_update_slice", "one dim",
        lambda x, y, i: lax.dynamic_update_slice(x, y, (i, 0)), (f32(4, 6), f32(2, 6), i32()),
    )  # fmt: skip
    yield Sample(
        "dynamic_update_slice", "both dims",
        lambda x, y, i: lax.dynamic_update_slice(x, y, (i, i)), (f32(4, 6), f32(2, 4), i32()),
    )  # fmt: skip
    yield Sample(
        "dynamic_update_slice", "no dim",
        lambda x, y, i: lax.dynamic_update_slice(x, y, (i, 0)), (f32(4, 6), f32(4, 6), i32()),
    )  # fmt: skip


def _gathers() -> Iterator[Sample]:
    take = jnp.take
    for mode in ("clip", "fill", "promise_in_bounds"):
        yield Sample(
            "gather", f"rows of a table, {mode}",
            lambda x, i, m=mode: x.at[i].get(mode=m), (f32(4, 6), i32(8)),
        )  # fmt: skip
    yield Sample("gather", "embedding", lambda x, i: take(x, i, axis=0), (f32(4, 6), i32(2, 8)))
    yield Sample("gather", "columns", lambda x, i: take(x, i, axis=1), (f32(4, 6), i32(8)))
    yield Sample(
        "gather", "two index arrays", lambda x, i, j: x[i, j], (f32(4, 6, 8), i32(2), i32(2))
    )
    yield Sample(
        "gather", "along a dim",
        lambda x, i: jnp.take_along_axis(x, i, axis=1), (f32(4, 6), i32(4, 2)),
    )  # fmt: skip
    yield Sample("gather", "batched", jax.vmap(lambda x, i: x[i]), (f32(4, 6, 8), i32(4, 2)))
    yield Sample(
        "gather", "slices",
        jax.vmap(lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 6)), (None, 0)), (f32(4, 6), i32(8)),
    )  # fmt: skip
    yield Sample(
        "gather", "batched slices",
        jax.vmap(lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 6))), (f32(8, 4, 6), i32(8)),
    )  # fmt: skip


def _scatters() -> Iterator[Sample]:
    def at(method: str) -> Callable[..., Any]:
        return lambda x, i, y: getattr(x.at[i], method)(y)

    for method, name in (
        ("set", "scatter"), ("add", "scatter-add"), ("subtract", "scatter-sub"),
        ("multiply", "scatter-mul"), ("min", "scatter-min"), ("max", "scatter-max"),
    ):  # fmt: skip
        yield Sample(name, "rows of a table", at(method), (f32(4, 6), i32(8), f32(8, 6)))
    yield Sample("scatter-add", "embedding", at("add"), (f32(4, 6), i32(2, 8), f32(2, 8, 6)))
    yield Sample("scatter-add", "one row", at("add"), (f32(4, 6), i32(), f32(6)))
    yield Sample(
        "scatter-add", "columns", lambda x, i, y: x.at[:, i].add(y), (f32(4, 6), i32(8), f32(4, 8))
    )
    yield Sample(
        "scatter-add", "batched", jax.vmap(at("add")), (f32(4, 6, 8), i32(4, 2), f32(4, 2, 8))
    )
    yield Sample("scatter", "batched", jax.vmap(at("set")), (f32(4, 6, 8), i32(4, 2), f32(4, 2, 8)))
    yield Sample("scatter", "a static row", lambda x, y: x.at[1].set(y), (f32(4, 6), f32(6)))
    yield Sample(
        "scatter", "two index arrays",
        lambda x, i, j, y: x.at[i, j].set(y), (f32(4, 6), i32(2), i32(2), f32(2)),
    )  # fmt: skip


def _convolutions() -> Iterator[Sample]:
    def conv(**options: Any) -> Callable[[Any, Any], Any]:
        settings = {"window_strides": (1, 1), "padding": "SAME", **options}
        return lambda x, w: lax.conv_general_dilated(x, w, **settings)

    image, kernel = f32(2, 4, 8, 8), f32(6, 4, 3, 3)
    yield Sample("conv_general_dilated", "same", conv(), (image, kernel))
    yield Sample("conv_general_dilated", "valid", conv(padding="VALID"), (image, kernel))
    yield Sample("conv_general_dilated", "strided", conv(window_strides=(2, 2)), (image, kernel))
    yield Sample(
        "conv_general_dilated", "dilated kernel", conv(rhs_dilation=(2, 2)), (image, kernel)
    )
    yield Sample(
        "conv_general_dilated", "transposed", conv(lhs_dilation=(2, 2), padding=((2, 1), (2, 1))),
        (image, kernel),
    )  # fmt: skip
    yield Sample(
        "conv_general_dilated", "channels last",
        conv(dimension_numbers=("NHWC", "HWIO", "NHWC")), (f32(2, 8, 8, 4), f32(3, 3, 4, 6)),
    )  # fmt: skip
    yield Sample(
        "conv_general_dilated", "grouped", conv(feature_group_count=2), (image, f32(6, 2, 3, 3))
    )
    yield Sample(
        "conv_general_dilated", "depthwise", conv(feature_group_count=4), (image, f32(4, 1, 3, 3))
    )
    yield Sample(
        "conv_general_dilated", "batch groups", conv(batch_group_count=2), (f32(4, 4, 8, 8), kernel)
    )
    for label, strides in (("", (1, 1)), (", strided", (2, 2))):
        function = conv(window_strides=strides)
        grown = f32(2, 6, 8 // strides[0], 8 // strides[1])
        yield Sample(
            "conv_general_dilated", f"gradient of the kernel{label}",
            lambda x, w, g, f=function: jax.linear_transpose(lambda v: f(x, v), w)(g),
            (image, kernel, grown),
        )  # fmt: skip
        yield Sample(
            "conv_general_dilated", f"gradient of the image{label}",
            lambda x, w, g, f=function: jax.linear_transpose(lambda v: f(v, w), x)(g),
            (image, kernel, grown),
        )  # fmt: skip
    yield Sample("conv_general_dilated", "one by one", conv(), (image, f32(6, 4, 1, 1)))
    yield Sample(
        "conv_general_dilated", "patches",
        conv(window_strides=(2, 2), padding="VALID"), (image, f32(6, 4, 2, 2)),
    )  # fmt: skip
    yield Sample(
        "conv_general_dilated", "one dim, causal",
        lambda x, w: lax.conv_general_dilated(x, w, (1,), ((2, 0),)), (f32(2, 4, 8), f32(6, 4, 3)),
    )  # fmt: skip


def _windows() -> Iterator[Sample]:
    def pool(start: float, function: Any, window: Any, strides: Any, padding: str) -> Any:
        return lambda x: lax.reduce_window(x, np.float32(start), function, window, strides, padding)

    image = f32(2, 8, 8, 4)
    for name, start, function in (
        ("sum", 0, lax.add),
        ("max", -np.inf, lax.max),
        ("min", np.inf, lax.min),
    ):
        yield Sample(
            f"reduce_window_{name}", "pooling",
            pool(start, function, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), (image,),
        )  # fmt: skip
        yield Sample(
            f"reduce_window_{name}", "overlapping",
            pool(start, function, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"), (image,),
        )  # fmt: skip
    yield Sample(
        "reduce_window", "the user's function",
        pool(0, lambda a, b: a + b + a * b, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), (image,),
    )  # fmt: skip
    window = pool(-np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    yield Sample("select_and_scatter_add", "", jax.grad(lambda x: window(x).sum()), (image,))
    forward = pool(-np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    yield Sample(
        "select_and_gather_add", "", lambda x, t: jax.jvp(forward, (x,), (t,))[1], (image, image)
    )


def _running() -> Iterator[Sample]:
    for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"):
        function = getattr(lax, name)
        yield Sample(name, "last dim", lambda x, f=function: f(x, axis=1), (f32(4, 6),))
        yield Sample(name, "first dim", lambda x, f=function: f(x, axis=0), (f32(4, 6),))
    yield Sample(
        "cumsum", "from the end", lambda x: lax.cumsum(x, axis=1, reverse=True), (f32(4, 6),)
    )


def _sorts() -> Iterator[Sample]:
    yield Sample("sort", "last dim", lambda x: lax.sort(x, dimension=1), (f32(4, 6),))
    yield Sample("sort", "first dim", lambda x: lax.sort(x, dimension=0), (f32(4, 6),))
    yield Sample(
        "sort", "key and value", lambda x, y: lax.sort((x, y), dimension=1, num_keys=1),
        (f32(4, 6), f32(4, 6)),
    )  # fmt: skip
    yield Sample("top_k", "", lambda x: lax.top_k(x, 2), (f32(4, 6),))
    yield Sample("top_k", "batched", lambda x: lax.top_k(x, 2), (f32(2, 4, 6),))
    yield Sample("approx_top_k", "", lambda x: lax.approx_max_k(x, 2), (f32(4, 6),))


def _matrices() -> Iterator[Sample]:
    square = (f32(4, 6, 6),)
    yield Sample("cholesky", "", lambda x: lax.linalg.cholesky(x, symmetrize_input=False), square)
    yield Sample("eigh", "", lambda x: lax.linalg.eigh(x, symmetrize_input=False), square)
    yield Sample("svd", "", lax.linalg.svd, (f32(4, 6, 8),))
    yield Sample(
        "householder_product", "", lax.linalg.householder_product, (f32(4, 8, 6), f32(4, 6))
    )
    yield Sample("ormqr", "", lax.linalg.ormqr, (f32(4, 8, 6), f32(4, 6), f32(4, 8, 2)))
    yield Sample("qr", "", lax.linalg.qr, (f32(4, 8, 6),))
    yield Sample("lu", "", lax.linalg.lu, square)
    yield Sample("eig", "", lax.linalg.eig, square)
    yield Sample("schur", "", lax.linalg.schur, square)
    yield Sample("hessenberg", "", lax.linalg.hessenberg, square)
    yield Sample("tridiagonal", "", lambda x: lax.linalg.tridiagonal(x, lower=True), square)
    yield Sample(
        "lu_pivots_to_permutation", "",
        lambda p: lax.linalg.lu_pivots_to_permutation(p, 6), (i32(4, 6),),
    )  # fmt: skip
    for left in (True, False):
        yield Sample(
            "triangular_solve", "left" if left else "right",
            lambda a, b, side=left: lax.linalg.triangular_solve(a, b, left_side=side, lower=True),
            (f32(4, 6, 6), f32(4, 6, 6)), low=1.0, high=2.0,
        )  # fmt: skip
    yield Sample(
        "tridiagonal_solve", "", lax.linalg.tridiagonal_solve,
        (f32(4, 6), f32(4, 6), f32(4, 6), f32(4, 6, 2)), low=1.0, high=2.0,
    )  # fmt: skip
    yield Sample("symmetric_product", "", _symmetric_product, (f32(4, 6, 8), f32(4, 6, 6)))
    for label, kind, lengths, type_ in (
        ("complex", "fft", (6,), c64), ("inverse", "ifft", (6,), c64), ("real", "rfft", (6,), f32),
        ("inverse real", "irfft", (6,), c64), ("two dims", "fft", (4, 6), c64),
    ):  # fmt: skip
        last = 4 if kind == "irfft" else 6
        yield Sample(
            "fft", label, lambda x, k=kind, n=lengths: lax.fft(x, k, n), (type_(2, 4, last),)
        )
    yield Sample("cholesky_update", "", lax.linalg.cholesky_update, (f32(6, 6), f32(6)))


def _symmetric_product(a: Any, c: Any) -> Any:
    return lax.linalg.symmetric_product(a, c)


def _ragged() -> Iterator[Sample]:
    yield Sample(
        "ragged_dot_general", "rows by group", lax.ragged_dot, (f32(8, 4), f32(2, 4, 6), i32(2))
    )
    for label, contract, ragged, group, shapes in (
        ("summed by group", (((0,), (0,)), ((), ())), [0], [], (f32(8, 4), f32(8, 6))),
        ("batch by group", (((2,), (1,)), ((0,), (0,))), [0], [], (f32(8, 4, 6), f32(8, 6, 2))),
    ):
        numbers = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=contract,
            lhs_ragged_dimensions=ragged,
            rhs_group_dimensions=group,
        )
        yield Sample(
            "ragged_dot_general", label,
            lambda a, b, g, n=numbers: lax.ragged_dot_general(a, b, g, n), (*shapes, i32(2)),
        )  # fmt: skip
