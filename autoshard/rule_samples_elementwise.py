"""Sample equations of the elementwise primitives: one or two of each, and the broadcast forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import ad_checkpoint, lax
from jax.experimental import layout
from jax.extend.core import primitives
from jax.scipy import special

from autoshard.annotation import annotate
from autoshard.rule_samples import Sample, Spec, c64, f32, flags, has, i32, keys, u32

_UNARY = (
    "abs", "acos", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil",
    "cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor",
    "is_finite", "lgamma", "log", "log1p", "log2", "logistic", "neg", "one_minus_square", "round",
    "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "tan", "tanh",
)  # fmt: skip
_BINARY = (
    "add", "atan2", "div", "eq", "ge", "gt", "igamma", "igammac", "le", "lt", "max", "min", "mul",
    "ne", "nextafter", "polygamma", "pow", "rem", "sub", "zeta",
)  # fmt: skip
_INTEGER = (
    "and", "mulhi", "or", "shift_left", "shift_right_arithmetic", "shift_right_logical", "xor",
)  # fmt: skip
_LAX_NAMES = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "not": "bitwise_not"}


def _lax(name: str) -> Callable[..., Any]:
    return getattr(lax, _LAX_NAMES.get(name, name))  # type: ignore[no-any-return]


def elementwise_samples() -> Iterator[Sample]:
    """All of them."""
    for name in _UNARY:
        if has(name):
            yield Sample(name, "", _lax(name), (f32(4, 6),))
    for name in _BINARY:
        yield Sample(name, "", _lax(name), (f32(4, 6), f32(4, 6)), low=1.2, high=3.0)
    for name in _INTEGER:
        if has(_LAX_NAMES.get(name, name)):
            yield Sample(name, "", _lax(name), (i32(4, 6), i32(4, 6)))
    for name in ("clz", "not", "population_count"):
        yield Sample(name, "", _lax(name), (i32(4, 6),))
    for name in ("conj", "imag", "real"):
        yield Sample(name, "", _lax(name), (c64(4, 6),))
    yield from _broadcast()
    yield from _with_parameters()
    yield from _several_operands()
    yield from _marks()


def _broadcast() -> Iterator[Sample]:
    for name in ("add", "mul", "max", "sub", "div"):
        yield Sample(name, "scalar on the right", _lax(name), (f32(4, 6), f32()))
        yield Sample(name, "scalar on the left", _lax(name), (f32(), f32(4, 6)))
        yield Sample(name, "a dim of length one", _lax(name), (f32(4, 6), f32(4, 1)))
        yield Sample(name, "scalars", _lax(name), (f32(), f32()))
    yield Sample("add", "one dim", lax.add, (f32(8), f32(8)))
    yield Sample("add", "four dims", lax.add, (f32(2, 4, 6, 8), f32(2, 4, 6, 8)))
    yield Sample("add", "no elements", lax.add, (f32(0, 4), f32(0, 4)))
    yield Sample("mul", "integers", lax.mul, (i32(4, 6), i32(4, 6)))
    yield Sample("mul", "complex", lax.mul, (c64(4, 6), c64(4, 6)))
    yield Sample("div", "integers", lax.div, (i32(4, 6), Spec((), np.int32)))


def _with_parameters() -> Iterator[Sample]:
    def convert(dtype: Any) -> Callable[[Any], Any]:
        return lambda x: lax.convert_element_type(x, dtype)

    yield Sample("acosh", "", lax.acosh, (f32(4, 6),), low=1.1, high=3.0)
    for source, target in (
        (f32, np.int32), (i32, np.float32), (f32, jnp.bfloat16), (flags, np.float32),
        (f32, np.float16), (i32, np.int8), (f32, jnp.float8_e4m3fn), (f32, np.complex64),
    ):  # fmt: skip
        label = f"{source(1).dtype} to {np.dtype(target).name}"
        yield Sample(
            "convert_element_type", label, convert(target), (source(4, 6),), low=1.2, high=3.0
        )
    yield Sample(
        "bitcast_convert_type", "same width",
        lambda x: lax.bitcast_convert_type(x, np.int32), (f32(4, 6),),
    )  # fmt: skip
    yield Sample(
        "bitcast_convert_type", "narrower",
        lambda x: lax.bitcast_convert_type(x, np.int8), (f32(4, 6),),
    )  # fmt: skip
    yield Sample(
        "bitcast_convert_type", "wider",
        lambda x: lax.bitcast_convert_type(x, np.float32), (Spec((4, 6, 2), np.int16),),
    )  # fmt: skip
    for power in (1, 2, 3, -2):
        yield Sample(
            "integer_pow", f"power {power}",
            lambda x, n=power: lax.integer_pow(x, n), (f32(4, 6),), low=1.0, high=2.0,
        )  # fmt: skip
    yield Sample("reduce_precision", "", lambda x: lax.reduce_precision(x, 5, 10), (f32(4, 6),))


def _several_operands() -> Iterator[Sample]:
    yield Sample("clamp", "scalar bounds", lax.clamp, (f32(), f32(4, 6), f32()))
    yield Sample("clamp", "array bounds", lax.clamp, (f32(4, 6), f32(4, 6), f32(4, 6)))
    yield Sample("complex", "", lax.complex, (f32(4, 6), f32(4, 6)))
    yield Sample("select_n", "two cases", lax.select_n, (flags(4, 6), f32(4, 6), f32(4, 6)))
    yield Sample("select_n", "scalar choice", lax.select_n, (flags(), f32(4, 6), f32(4, 6)))
    yield Sample(
        "select_n", "three cases", lax.select_n, (i32(4, 6), f32(4, 6), f32(4, 6), f32(4, 6)),
        index_high=3,
    )  # fmt: skip
    yield Sample(
        "optimization_barrier", "two arrays",
        lambda x, y: lax.optimization_barrier((x, y)), (f32(4, 6), f32(8)),
    )  # fmt: skip
    yield Sample(
        "regularized_incomplete_beta", "", special.betainc, (f32(4, 6), f32(4, 6), f32(4, 6))
    )
    yield Sample("igamma_grad_a", "", lax.igamma_grad_a, (f32(4, 6), f32(4, 6)))
    yield Sample("add_any", "", primitives.add_jaxvals_p.bind, (f32(4, 6), f32(4, 6)))
    for name in ("eq_to", "le_to", "lt_to"):
        yield Sample(name, "", getattr(lax, f"{name}_p").bind, (f32(4, 6), f32(4, 6)))
    yield Sample("threefry2x32", "", _threefry, (u32(2), u32(4, 6), u32(4, 6)))
    if has("polynomial"):
        yield Sample(
            "polynomial", "", lambda x, a, b: _lax("polynomial")(x, (a, b)),
            (f32(4, 6), f32(4, 6), f32(4, 6)),
        )  # fmt: skip


def _marks() -> Iterator[Sample]:
    """Primitives that compute nothing: names, copies, wishes about devices and layouts."""

    def constrain(x: Any) -> Any:
        mesh = jax.sharding.Mesh(jax.devices()[:1], ("a",))
        return lax.with_sharding_constraint(
            x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
        )

    for name, function in (
        ("autoshard_annotate", lambda x: annotate(x, "data", None)),
        ("copy", lambda x: jnp.array(x, copy=True)),
        ("dce_sink", lax.dce_sink),
        ("layout_constraint", lambda x: layout.with_layout_constraint(x, layout.Layout((1, 0)))),
        ("name", lambda x: ad_checkpoint.checkpoint_name(x, "kept")),
        ("sharding_constraint", constrain),
    ):
        yield Sample(name, "", function, (f32(4, 6),))
    yield Sample(
        "device_put", "two arrays", lambda x, y: jax.device_put((x, y)), (f32(4, 6), f32(8))
    )
    yield Sample("random_clone", "", jax.random.clone, (keys(4),))


def _threefry(key: Any, x: Any, y: Any) -> Any:
    from jax.extend.random import threefry2x32_p

    return threefry2x32_p.bind(key[0], key[1], x, y)
