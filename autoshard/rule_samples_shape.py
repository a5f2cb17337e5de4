"""Sample equations of products, reductions, shape changes and random numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.rule_samples import Sample, f32, flags, has, i32, keys, u32


def shape_samples() -> Iterator[Sample]:
    """All of them."""
    yield from _products()
    yield from _reductions()
    yield from _reshapes()
    yield from _broadcasts()
    yield from _joins_and_cuts()
    yield from _orders()
    yield from _random()


def _products() -> Iterator[Sample]:
    def dot(*contract: Any) -> Callable[[Any, Any], Any]:
        return lambda a, b: lax.dot_general(a, b, contract)

    for label, subscripts, a, b in (
        ("matrices", "ik,kj->ij", (4, 6), (6, 8)),
        ("matrix and vector", "ik,k->i", (4, 6), (6,)),
        ("vectors", "k,k->", (6,), (6,)),
        ("outer", "i,j->ij", (4,), (6,)),
        ("one batch dim", "bik,bkj->bij", (2, 4, 6), (2, 6, 8)),
        ("two batch dims", "abik,abjk->abij", (2, 4, 6, 8), (2, 4, 10, 8)),
        ("two summed dims", "ikl,klj->ij", (4, 6, 2), (6, 2, 8)),
        ("many free dims", "bsd,dhk->bshk", (2, 4, 6), (6, 8, 10)),
        ("transposed weight", "id,jd->ij", (4, 6), (8, 6)),
    ):
        yield Sample("dot_general", label, partial(jnp.einsum, subscripts), (f32(*a), f32(*b)))
    yield Sample(
        "dot_general", "batch dims in the middle", dot(((0,), (2,)), ((1,), (0,))),
        (f32(6, 2, 4), f32(2, 8, 6)),
    )  # fmt: skip
    yield Sample("dot_general", "integers", jnp.matmul, (i32(4, 6), i32(6, 8)))
    yield Sample("dot_general", "a batch of length one", jnp.matmul, (f32(1, 4, 6), f32(1, 6, 8)))
    yield Sample(
        "scaled_dot", "blocks of two",
        lambda a, b, p, q: lax.scaled_dot(
            a.astype(jnp.float8_e4m3fn), b.astype(jnp.float8_e4m3fn),
            lhs_scale=p.astype(jnp.float8_e8m0fnu), rhs_scale=q.astype(jnp.float8_e8m0fnu),
            dimension_numbers=(((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32,
        ),
        (f32(2, 4, 8), f32(2, 8, 6), f32(2, 4, 4), f32(2, 4, 6)),
    )  # fmt: skip


def _reductions() -> Iterator[Sample]:
    for name in ("sum", "max", "min", "prod"):
        reduce = getattr(lax, f"reduce_{name}")
        for axes in ((1,), (0,), (0, 2), (0, 1, 2)):
            yield Sample(
                f"reduce_{name}", f"axes {axes}",
                lambda x, f=reduce, a=axes: f(x, a), (f32(4, 6, 8),),
            )  # fmt: skip
    for name in ("and", "or"):
        reduce = getattr(lax, f"reduce_{name}")
        yield Sample(f"reduce_{name}", "", lambda x, f=reduce: f(x, (1,)), (flags(4, 6),))
    yield Sample("reduce_xor", "", lambda x: lax.reduce_xor(x, (1,)), (i32(4, 6),))
    yield Sample("reduce_sum", "integers", lambda x: lax.reduce_sum(x, (0,)), (i32(4, 6),))
    for function in (lax.argmax, lax.argmin):
        name = function.__name__
        yield Sample(name, "last dim", lambda x, f=function: f(x, 1, np.int32), (f32(4, 6),))
        yield Sample(
            name, "first of three", lambda x, f=function: f(x, 0, np.int32), (f32(4, 6, 8),)
        )
    yield Sample(
        "reduce", "the user's function",
        lambda x: lax.reduce(x, np.float32(0), lambda a, b: a + b + a * b, (1,)), (f32(4, 6),),
    )  # fmt: skip
    yield Sample(
        "reduce", "two arrays together",
        lambda x, y: lax.reduce(
            (x, y), (np.float32(0), np.float32(1)), lambda a, b: (a[0] + b[0], a[1] * b[1]), (0,)
        ),
        (f32(4, 6), f32(4, 6)),
    )  # fmt: skip


def _reshapes() -> Iterator[Sample]:
    for before, after in (
        ((4, 6), (24,)), ((24,), (4, 6)), ((4, 6), (6, 4)), ((4, 6), (8, 3)), ((2, 4, 6), (8, 6)),
        ((8, 6), (2, 4, 6)), ((2, 4, 6), (2, 24)), ((2, 4, 6), (48,)), ((2, 4, 6), (6, 4, 2)),
        ((4, 6), (4, 1, 6)), ((4, 1, 6), (4, 6)), ((1,), ()), ((), (1, 1)), ((3, 5), (5, 3)),
        ((4, 6, 10), (24, 2, 5)), ((12, 2), (8, 3)), ((2, 3, 4), (6, 2, 2)), ((0, 4), (4, 0)),
        ((4, 6, 3, 5), (4, 6, 5, 3)), ((6, 4), (4, 6)), ((12,), (2, 3, 2)), ((2, 6), (4, 3)),
    ):  # fmt: skip
        yield Sample(
            "reshape", f"{before} to {after}",
            lambda x, to=after: lax.reshape(x, to), (f32(*before),),
        )  # fmt: skip
    yield Sample("squeeze", "two dims", lambda x: lax.squeeze(x, (0, 2)), (f32(1, 4, 1, 6),))


def _broadcasts() -> Iterator[Sample]:
    for label, before, after, places in (
        ("of a scalar", (), (4, 6), ()),
        ("new first dim", (6,), (4, 6), (1,)),
        ("new last dim", (4,), (4, 6), (0,)),
        ("new middle dim", (4, 6), (4, 2, 6), (0, 2)),
        ("stretched dim", (4, 1), (4, 6), (0, 1)),
    ):
        yield Sample(
            "broadcast_in_dim", label,
            lambda x, to=after, at=places: lax.broadcast_in_dim_p.bind(
                x, shape=to, broadcast_dimensions=at, sharding=None
            ),
            (f32(*before),),
        )  # fmt: skip
    yield Sample("broadcast_in_dim", "a new dim", lambda x: lax.expand_dims(x, (1,)), (f32(4, 6),))
    for dim in (0, 1):
        yield Sample(
            "iota", f"along dim {dim}",
            lambda d=dim: lax.broadcasted_iota(np.int32, (4, 6), d), (),
        )  # fmt: skip
    yield Sample("tile", "both dims", lambda x: jnp.tile(x, (2, 4)), (f32(4, 6),))
    yield Sample("tile", "one dim", lambda x: jnp.tile(x, (1, 2)), (f32(4, 6),))
    yield Sample("empty", "", lambda: lax.empty((4, 6), np.float32), ())


def _joins_and_cuts() -> Iterator[Sample]:
    for axis in (0, 1):
        yield Sample(
            "concatenate", f"along dim {axis}",
            lambda x, y, a=axis: lax.concatenate((x, y), a), (f32(4, 6), f32(4, 6)),
        )  # fmt: skip
    yield Sample(
        "concatenate", "three arrays",
        lambda *xs: lax.concatenate(xs, 0), (f32(2, 6), f32(4, 6), f32(6, 6)),
    )  # fmt: skip
    for label, config in (
        ("after", ((0, 0, 0), (0, 2, 0))), ("before", ((1, 0, 0), (0, 0, 0))),
        ("between", ((0, 0, 1), (0, 0, 0))), ("cutting", ((0, -1, 0), (0, 0, 0))),
        ("shifting", ((1, -1, 0), (0, 0, 0))), ("nothing", ((0, 0, 0), (0, 0, 0))),
        ("all", ((1, 2, 1), (2, 1, 1))),
    ):  # fmt: skip
        yield Sample(
            "pad", label, lambda x, v, c=config: lax.pad_p.bind(x, v, padding_config=c),
            (f32(4, 6), f32()),
        )  # fmt: skip
    for label, begin, end, stride in (
        ("one dim", (0, 0), (4, 3), None), ("both dims", (1, 2), (3, 6), None),
        ("strided", (0, 0), (4, 6), (2, 1)), ("nothing cut", (0, 0), (4, 6), None),
    ):  # fmt: skip
        yield Sample(
            "slice", label,
            lambda x, b=begin, e=end, s=stride: lax.slice_p.bind(
                x, start_indices=b, limit_indices=e, strides=s
            ),
            (f32(4, 6),),
        )  # fmt: skip
    yield Sample("split", "equal parts", lambda x: jnp.split(x, 2, axis=1), (f32(4, 6),))
    yield Sample("split", "unequal parts", lambda x: jnp.split(x, [1], axis=0), (f32(4, 6),))
    yield Sample("stack", "first", lambda x, y: lax.stack((x, y), axis=0), (f32(4, 6), f32(4, 6)))
    yield Sample("stack", "last", lambda x, y: lax.stack((x, y), axis=2), (f32(4, 6), f32(4, 6)))
    yield Sample("unstack", "first", lambda x: lax.unstack(x, axis=0), (f32(4, 6),))
    yield Sample("unstack", "last", lambda x: lax.unstack(x, axis=1), (f32(4, 6),))


def _orders() -> Iterator[Sample]:
    for order in ((1, 0, 2), (2, 1, 0), (1, 2, 0)):
        yield Sample(
            "transpose", f"{order}", lambda x, o=order: lax.transpose(x, o), (f32(4, 6, 8),)
        )
    for dims in ((0,), (1,), (0, 1)):
        yield Sample("rev", f"dims {dims}", lambda x, d=dims: lax.rev(x, d), (f32(4, 6),))


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _random() -> Iterator[Sample]:
    for impl, shape in itertools.product(("threefry2x32", "rbg"), ((), (2,))):
        label = f"{impl}, {len(shape)} key dims"
        many = jax.vmap if shape else _once
        key = keys(*shape, impl=impl)
        yield Sample("random_bits", label, many(lambda k: jax.random.bits(k, (4, 6))), (key,))
        yield Sample("random_split", label, many(lambda k: jax.random.split(k, 4)), (key,))
        yield Sample("random_fold_in", label, many(lambda k: jax.random.fold_in(k, 3)), (key,))
        yield Sample("random_unwrap", label, jax.random.key_data, (key,))
    yield Sample(
        "random_bits", "eight bits", lambda k: jax.random.bits(k, (4, 6), "uint8"), (keys(),)
    )
    yield Sample("random_seed", "", jax.random.key, (i32(),))
    yield Sample("random_wrap", "", lambda x: jax.random.wrap_key_data(x), (u32(4, 2),))
    yield Sample("random_gamma", "", lambda k, a: jax.random.gamma(k, a), (keys(), f32(4, 6)))
    yield Sample("rng_bit_generator", "", lambda k: lax.rng_bit_generator(k, (4, 6)), (u32(4),))
    if has("rng_uniform"):
        yield Sample("rng_uniform", "", lambda a, b: lax.rng_uniform(a, b, (4, 6)), (f32(), f32()))
