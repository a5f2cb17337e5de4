"""Which operations are compiled to learn what XLA:TPU counts for each?  Shares of real models.

A case is plain text, so that it is one row of a table: a kind, an operation, sizes, dtypes. `build`
makes the function and its arguments of it.

    product  an einsum over b, m, n, k                      sizes b m n k
    map      an elementwise chain                           sizes of the array
    alone    one operation that nothing is fused with       sizes of the operand
    reduce   of an elementwise chain                        sizes of the array
    chain    softmax, layer norm, adamw: several kernels    sizes of the array
    conv     NHWC and its two gradients                     sizes N H C O window stride
    move     transposes, slices, gathers, sorts, ...        sizes of the array, and what op says
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from compute_case import Case, array
from compute_moves import build_convolution, build_move, convolutions, moves
from jax import lax

Fn = Callable[..., Any]


def build(case: Case) -> tuple[Fn, list[jax.ShapeDtypeStruct]]:
    """The function of a case and what it is called with."""
    return _BUILD[case.kind](case)


def ahead(case: Case, ridge: float) -> bool:
    """Whether XLA would fetch an operand ahead: a product that computes longer than it reads.

    XLA:TPU copies an operand into VMEM beside the kernels before it. A program of one product has
    none before it, so that one which waits for memory is compiled without such copies: they would
    come for nothing. ridge: FLOP/s over bytes/s of the chip.
    """
    if case.kind != "product":
        return False
    b, m, n, k = case.sizes
    size = [jnp.dtype(d).itemsize for d in case.dtypes]
    moved = b * (m * k * size[0] + k * n * size[1] + m * n * size[2])
    return 2 * b * m * n * k > ridge * moved


# --- products


def _product(case: Case) -> tuple[Fn, list[jax.ShapeDtypeStruct]]:
    size = dict(zip("bmnk", case.sizes, strict=True))
    left, right, _ = re.split(r",|->", case.op)
    a, b, out = case.dtypes
    args = [array(tuple(size[c] for c in s), d) for s, d in ((left, a), (right, b))]
    wide = jnp.dtype(out)
    return lambda x, y: jnp.einsum(case.op, x, y, preferred_element_type=wide), args


def _products() -> Iterator[Case]:
    b, f = "bfloat16", "float32"
    plain, grads = "mk,kn->mn", ("mk,nk->mn", "km,kn->mn")
    shapes = [
        *((m, 4096, 4096) for m in (1, 8, 64, 128, 256, 512, 1024, 4096)),
        *((4096, n, 4096) for n in (8, 64, 128, 512, 1000, 16384)),
        *((4096, 4096, k) for k in (8, 64, 128, 512, 1000, 1024)),
        *((s, s, s) for s in (64, 128, 256, 512, 1000, 1024, 2048)),
        *((1024, 1024, k) for k in (64, 128, 256, 16384)),
        *((m, 3072, 768) for m in (512, 8192)),
        *((m, 768, 3072) for m in (512, 8192)),
        *((m, 768, 768) for m in (512, 2048, 8192)),
        (8192, 192, 768), (8192, 768, 192), (4096, 3141, 768), (1024, 50257, 768),
        (4096, 768, 3141), (64, 1280, 5120), (4096, 1280, 5120), (8, 11008, 4096),
        (2048, 11008, 4096), (8, 4096, 1376), (2048, 1376, 4096), (2048, 4096, 1376),
        (768, 3072, 8192), (768, 768, 65536), (197 * 16, 768, 768), (32, 128, 65536),
        (24, 4096, 72), (128, 8, 8192), (8192, 8192, 8192),
    ]  # fmt: skip
    for m, n, k in shapes:
        yield Case("product", plain, (1, m, n, k), (b, b, b))
    for m, n, k in shapes[::3]:
        yield Case("product", plain, (1, m, n, k), (f, f, f))
    for m, n, k in shapes[1::6]:
        yield Case("product", plain, (1, m, n, k), (b, b, f))
        yield Case("product", plain, (1, m, n, k), (f, f, b))
    for m, n, k in shapes[::8]:
        for op in grads:
            yield Case("product", op, (1, m, n, k), (b, b, b))
    batched = [
        (64, 2048, 2048, 64), (32, 2048, 2048, 128), (48, 1024, 1024, 64),
        (256, 512, 512, 64), (1024, 128, 128, 64), (192, 197, 197, 64),
        (128, 1, 2048, 128), (16, 256, 4096, 80),
    ]  # fmt: skip
    for size in batched:
        q, k, d = size[1:]
        yield Case("product", "bmk,bnk->bmn", size, (b, b, b))
        yield Case("product", "bmk,bkn->bmn", (size[0], q, d, k), (b, b, b))
        yield Case("product", "bkm,bkn->bmn", (size[0], k, d, q), (b, b, b))
        yield Case("product", "bmk,bnk->bmn", size, (b, b, f))
    for size in batched[::2]:
        q, k, d = size[1:]
        yield Case("product", "bmk,bnk->bmn", size, (f, f, f))
        yield Case("product", "bmk,bkn->bmn", (size[0], q, d, k), (f, f, f))
    for size in [(16, 512, 4096, 1024), (8, 1024, 1024, 1024), (64, 64, 512, 512)]:  # experts
        yield Case("product", "bmk,bkn->bmn", size, (b, b, b))


# --- elementwise

MAPS: dict[str, Callable[[Any], Any]] = {
    "add": lambda x: x + x,
    "mul": lambda x: x * x + 1,
    "max": lambda x: jnp.maximum(x, 0.5) + x,
    "select": lambda x: jnp.where(x > 1, x + 1, x * 2),
    "abs": lambda x: jnp.abs(x) - 1,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "log": jnp.log,
    "tanh": jnp.tanh,
    "logistic": lax.logistic,
    "rsqrt": lax.rsqrt,
    "sqrt": jnp.sqrt,
    "div": lambda x: 3 / (x + 1),
    "erf": lax.erf,
    "erf_inv": lax.erf_inv,
    "sin": jnp.sin,
    "pow": lambda x: jnp.abs(x) ** 2.3,
    "floor": lambda x: jnp.floor(x) * 1.5,
    "convert": lambda x: x.astype(jnp.int32).astype(x.dtype) * 1.5,
}


def _map(case: Case) -> tuple[Fn, list[jax.ShapeDtypeStruct]]:
    """op: `exp*16` runs one operation over and over; `3>2` reads three arrays and writes two."""
    found = re.fullmatch(r"(\w+)\*(\d+)", case.op)
    if found:

        def repeated(x: Any) -> Any:
            for _ in range(int(found[2])):
                x = MAPS[found[1]](x)
            return x * 2

        return repeated, [array(case.sizes, case.dtypes[0])]
    reads, writes = map(int, case.op.split(">"))

    def mixed(*xs: Any) -> Any:
        total = sum(x.astype(case.dtypes[1]) * (k + 2) for k, x in enumerate(xs))
        return tuple((total * (k + 3)).astype(case.dtypes[1]) for k in range(writes))

    return mixed, [array(case.sizes, case.dtypes[0])] * reads


def _maps() -> Iterator[Case]:
    large = (4096, 1024)
    for name in MAPS:
        yield Case("map", f"{name}*4", large, ("float32", "float32"))
    for name in ("mul", "exp", "logistic", "erf"):
        yield Case("map", f"{name}*4", large, ("bfloat16", "bfloat16"))
    pairs = [(a, b) for a in ("float32", "bfloat16") for b in ("float32", "bfloat16")]
    pairs += [("int32", "float32"), ("int8", "bfloat16"), ("float32", "int8"), ("int32", "int32")]
    for sizes in [(1024, 768), (4096, 4096), (3, 5, 1024, 64)]:
        for a, b in pairs:
            yield Case("map", "1>1", sizes, (a, b))
    for op in ("2>1", "3>1", "5>1", "1>2", "2>2", "4>2"):
        for a, b in pairs[:4]:
            yield Case("map", op, (8192, 1024), (a, b))
    for sizes in [(1000,), (100_000,), (1, 4096), (7, 333, 129), (50257, 48)]:
        for dtype in ("float32", "bfloat16"):
            yield Case("map", "2>1", sizes, (dtype, dtype))


# --- operations that nothing is fused with

_ALONE: dict[str, Fn] = {
    "exp": jnp.exp,
    "add": jnp.add,
    "max": lambda x: jnp.max(x, -1),
    "sum": lambda x: lax.reduce(x, x.dtype.type(0), lax.add, (0,)),
    "broadcast": lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], 8, x.shape[1])),
}


def _alone(case: Case) -> tuple[Fn, list[jax.ShapeDtypeStruct]]:
    """op: `add`, or `convert` to the second dtype."""
    args = [array(case.sizes, case.dtypes[0])] * (2 if case.op == "add" else 1)
    if case.op == "convert":
        wanted = jnp.dtype(case.dtypes[1])
        return lambda x: x.astype(wanted), args
    return _ALONE[case.op], args


def _alones() -> Iterator[Case]:
    b, f = "bfloat16", "float32"
    for sizes in [(4096, 4096), (1024, 768), (8192, 3072), (512, 50304)]:
        for dtype in (b, f):
            for op in _ALONE:
                if op != "broadcast" or sizes[0] < 8192:
                    yield Case("alone", op, sizes, (dtype, dtype))
        yield Case("alone", "convert", sizes, (b, f))
        yield Case("alone", "convert", sizes, (f, b))


# --- reductions


def _reduce(case: Case) -> tuple[Fn, list[jax.ShapeDtypeStruct]]:
    """op: `sum 1 2`, over these axes."""
    name, *axes = case.op.split()
    over: Any = tuple(map(int, axes))
    over = over[0] if name == "argmax" else over
    reduced: Fn = getattr(jnp, name)
    wide = case.dtypes[1]
    if name == "argmax":
        return lambda x: reduced(x * 2, over), [array(case.sizes, case.dtypes[0])]
    return (
        lambda x: reduced((x * x).astype(wide), over),
        [array(case.sizes, case.dtypes[0])],
    )


def _reduces() -> Iterator[Case]:
    b, f = "bfloat16", "float32"
    for sizes in [(4096, 4096), (512, 50257)]:
        for op in ("sum 0", "sum 1", "sum 0 1", "max 1", "argmax 1"):
            for d in ((b, b), (f, f), (b, f)):
                yield Case("reduce", op, sizes, d)
    for sizes in [(16, 12, 1024, 1024), (8, 1024, 12, 64), (64, 56, 56, 64), (4, 1024, 3072)]:
        for op, d in (
            ("sum 0", (b, b)),
            ("sum 1", (f, f)),
            ("sum 0 1", (b, f)),
            (f"sum {len(sizes) - 1}", (f, f)),
        ):
            yield Case("reduce", op, sizes, d)


# --- chains of several kernels


def softmax(x: Any) -> Any:
    """In float32, back to the dtype of x."""
    return jax.nn.softmax(x.astype(jnp.float32) * 0.125).astype(x.dtype)


def softmax_gradient(y: Any, g: Any) -> Any:
    """Of what softmax gave, and the gradient of it."""
    y, g = y.astype(jnp.float32), g.astype(jnp.float32)
    return (y * (g - jnp.sum(y * g, -1, keepdims=True))).astype(jnp.bfloat16)


def layer_norm(x: Any, scale: Any) -> Any:
    """In float32, back to the dtype of x."""
    y = x.astype(jnp.float32) * 2
    y = y - y.mean(-1, keepdims=True)
    return (y * lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def rms_norm(x: Any, scale: Any) -> Any:
    """In float32, back to the dtype of x."""
    y = x.astype(jnp.float32)
    return (y * lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def gelu(x: Any) -> Any:
    """By tanh."""
    return jax.nn.gelu(x)


def adamw(p: Any, g: Any, m: Any, v: Any) -> Any:
    """One parameter's step, moments in float32."""
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    return p - 1e-3 * (m / 0.9 / (jnp.sqrt(v / 0.95) + 1e-8) + 0.1 * p), m, v


CHAINS: dict[str, tuple[Fn, int, bool]] = {  # function, whole operands, whether a scale follows
    "softmax": (softmax, 1, False),
    "softmax_gradient": (softmax_gradient, 2, False),
    "layer_norm": (layer_norm, 1, True),
    "rms_norm": (rms_norm, 1, True),
    "gelu": (gelu, 1, False),
    "adamw": (adamw, 4, False),
}


def _chain(case: Case) -> tuple[Fn, list[jax.ShapeDtypeStruct]]:
    fn, whole, scaled = CHAINS[case.op]
    args = [array(case.sizes, case.dtypes[0])] * whole
    return fn, args + [array(case.sizes[-1:], "float32")] * scaled


def _chains() -> Iterator[Case]:
    sizes: dict[str, list[tuple[int, ...]]] = {
        "softmax": [(4, 12, 1024, 1024), (4096, 50257), (8, 16, 512, 512)],
        "layer_norm": [(8192, 768), (4096, 4096), (512, 768)],
        "gelu": [(8192, 3072), (4096, 16384), (16, 1024, 1280)],
        "adamw": [(768, 3072), (4096, 4096), (50257, 768), (768,), (12, 3072, 768)],
    }
    sizes["softmax_gradient"], sizes["rms_norm"] = sizes["softmax"], sizes["layer_norm"]
    for op, shapes in sizes.items():
        for shape in shapes:
            for dtype in ("float32",) if op == "adamw" else ("bfloat16", "float32"):
                yield Case("chain", op, shape, (dtype,))


_BUILD = {
    "product": _product,
    "map": _map,
    "alone": _alone,
    "reduce": _reduce,
    "chain": _chain,
    "conv": build_convolution,
    "move": build_move,
}


def cases() -> list[Case]:
    """All of them, each once."""
    made = (_products(), _maps(), _alones(), _reduces(), _chains(), convolutions(), moves())
    return list(dict.fromkeys(case for some in made for case in some))
