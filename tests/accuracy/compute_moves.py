"""Convolutions, and what moves data: the cases of `compute_cases` that transformers do least of.

XLA:TPU estimates no cycles for gathers, scatters, sorts and reversals: none of them is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from compute_case import Case, array
from jax import lax

Fn = Callable[..., Any]


# --- convolutions


def build_convolution(case: Case) -> tuple[Fn, list[jax.ShapeDtypeStruct]]:
    """op: `forward`, or the gradient of `input` or `weights`."""
    n, h, c, o, window, stride = case.sizes
    out = -(-h // stride)
    dtype = case.dtypes[0]
    x, w = array((n, h, h, c), dtype), array((window, window, c, o), dtype)

    def forward(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    g = array((n, out, out, o), dtype)
    if case.op == "forward":
        return forward, [x, w]
    if case.op == "input":
        return lambda w, g: jax.linear_transpose(lambda x: forward(x, w), x)(g)[0], [w, g]
    return lambda x, g: jax.linear_transpose(lambda w: forward(x, w), w)(g)[0], [x, g]


def convolutions() -> Iterator[Case]:
    for sizes in [
        (32, 56, 64, 64, 3, 1), (32, 56, 64, 256, 1, 1), (32, 56, 256, 64, 1, 1),
        (32, 28, 128, 128, 3, 1), (32, 14, 256, 256, 3, 1), (32, 7, 512, 512, 3, 1),
        (8, 224, 3, 64, 7, 2), (32, 56, 128, 128, 3, 2), (32, 14, 256, 1024, 1, 1),
        (128, 32, 64, 64, 3, 1), (4, 64, 320, 320, 3, 1), (16, 224, 3, 768, 16, 16),
    ]:  # fmt: skip
        for op in ("forward", "input", "weights"):
            for dtype in ("bfloat16", "float32") if sizes[0] == 8 else ("bfloat16",):
                yield Case("conv", op, sizes, (dtype,))


# --- what moves data


def _transpose(order: tuple[int, ...], x: Any) -> Any:
    return jnp.transpose(x, order)


def build_move(case: Case) -> tuple[Fn, list[jax.ShapeDtypeStruct]]:
    """op: a name and its numbers: `transpose 0 2 1 3`, `gather 8192`, `topk 8`."""
    name, *numbers = case.op.split()
    fn, args = _MOVES[name](case.sizes, tuple(map(int, numbers)), case.dtypes[0])
    return fn, args


def _moved(fn: Callable[[tuple[int, ...], Any], Any]) -> Callable[..., Any]:
    """A move of one array: fn gets its numbers and the array."""
    return lambda sizes, k, dtype: (partial(fn, k), [array(sizes, dtype)])


def _sliced(sizes: tuple[int, ...], k: tuple[int, ...], dtype: str) -> Any:
    args = [array(sizes, dtype), array((), "int32")]
    return lambda x, i: lax.dynamic_slice_in_dim(x, i, k[1], k[0]), args


def _padded(k: tuple[int, ...], x: Any) -> Any:
    return jnp.pad(x, [(1, k[1]) if d == k[0] else (0, 0) for d in range(x.ndim)])


_MOVES: dict[str, Callable[..., Any]] = {
    "transpose": _moved(_transpose),
    "reshape": _moved(lambda k, x: x.reshape(k)),
    "concatenate": lambda sizes, k, dtype: (
        lambda *xs: jnp.concatenate(xs, k[0]), [array(sizes, dtype)] * k[1],
    ),
    "pad": _moved(_padded),
    "slice": _moved(lambda k, x: lax.slice_in_dim(x, k[1], x.shape[k[0]], axis=k[0])),
    "dynamic_slice": _sliced,
    "cumsum": _moved(lambda k, x: jnp.cumsum(x, k[0])),
    "one_hot": lambda sizes, k, dtype: (
        lambda i: jax.nn.one_hot(i, k[0], dtype=dtype), [array(sizes, "int32")],
    ),
    "random_bits": lambda sizes, k, dtype: (
        lambda key: jax.random.bits(jax.random.wrap_key_data(key), sizes), [array((2,), "uint32")],
    ),
    "dropout": lambda sizes, k, dtype: (
        lambda key, x: jnp.where(
            jax.random.bernoulli(jax.random.wrap_key_data(key), 0.9, x.shape), x / 0.9, 0
        ).astype(x.dtype),
        [array((2,), "uint32"), array(sizes, dtype)],
    ),
}  # fmt: skip


def name_of(op: str) -> str:
    """`gather` of `gather 8192`."""
    return op.split()[0]


def moves() -> Iterator[Case]:
    b, f = "bfloat16", "float32"
    listed: list[tuple[str, tuple[int, ...]]] = [
        *(("transpose 1 0", s) for s in [(4096, 4096), (768, 3072), (50257, 768), (8192, 64)]),
        *(("transpose 0 2 1 3", s) for s in [(8, 1024, 12, 64), (16, 2048, 16, 128)]),
        *(("transpose 0 2 3 1", s) for s in [(8, 1024, 12, 64), (4, 2048, 16, 128)]),
        ("transpose 0 3 1 2", (8, 56, 56, 64)), ("transpose 1 0 2", (64, 512, 1024)),
        ("transpose 0 2 1", (64, 512, 512)),
        ("reshape 8 1024 12 64", (8, 1024, 768)), ("reshape 8 1024 768", (8, 1024, 12, 64)),
        ("reshape 8192 1024", (8, 1024, 1024)),
        ("reshape 16777216", (4096, 4096)), ("reshape 16 1024 16 128", (16384, 2048)),
        *((f"concatenate {a} 2", (4096, 2048)) for a in (0, 1)),
        ("concatenate 1 3", (16, 512, 768)), ("concatenate 2 2", (16, 512, 64)),
        ("pad 0 1", (4096, 2048)), ("pad 1 1", (4096, 2048)), ("pad 1 128", (4096, 2048)),
        ("slice 0 1", (8192, 2048)), ("slice 1 1", (8192, 2048)), ("slice 1 1024", (8192, 2048)),
        ("dynamic_slice 0 1", (24, 4096, 2048)), ("dynamic_slice 0 512", (4096, 4096)),
        ("dynamic_slice 1 512", (4096, 4096)),
        *((f"cumsum {a}", s) for s in [(1024, 1024), (4096, 4096), (64, 32768)] for a in (0, 1)),
        ("one_hot 50257", (1024,)), ("one_hot 1024", (8192,)), ("one_hot 64", (16384,)),
        ("random_bits", (4096, 4096)), ("random_bits", (8, 1024, 768)),
        ("dropout", (8, 1024, 768)), ("dropout", (8192, 4096)),
    ]  # fmt: skip
    for op, sizes in listed:
        for dtype in (b, f) if name_of(op) == "transpose" else (f,):
            yield Case("move", op, sizes, (dtype,))
