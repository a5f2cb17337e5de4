"""Convolutions, pooling and running sums: what splits, and that the shards make it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from autoshard.rule_shards import faults, find
from passes.ir.rule import Rule

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def real(*shape: int) -> Any:
    return np.random.standard_normal(shape).astype(np.float32)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test draws the same numbers from np.random, whatever ran before it."""
    np.random.seed(0)


def check(name: str, fn: Callable[..., Any], *args: Any) -> Rule:
    """The rule of the last such equation, after its shards were seen to make up the whole."""
    eqn, numbers, rule = find(name, fn, *args)
    assert not faults(eqn, numbers, rule)
    return rule


def split_sizes(rule: Rule, kind: str) -> list[int]:
    return sorted(f.size for f in rule.factors if f.kind == kind and f.size > 1)


# Convolution.


def conv(strides: Any = (1, 1), padding: Any = "SAME", **more: Any) -> Callable[..., Any]:
    return lambda x, w: lax.conv_general_dilated(x, w, strides, padding, **more)


NHWC = ("NHWC", "HWIO", "NHWC")
CONVS = {
    "plain": (conv(), (2, 4, 8, 8), (6, 4, 3, 3), [2, 6], [4], [8, 8]),
    "nhwc": (conv(dimension_numbers=NHWC), (2, 8, 8, 4), (3, 3, 4, 6), [2, 6], [4], [8, 8]),
    "1x1": (conv(), (2, 4, 8, 6), (6, 4, 1, 1), [2, 6, 6, 8], [4], []),
    "1x1 stride 2": (conv((2, 2)), (2, 4, 8, 8), (6, 4, 1, 1), [2, 4, 4, 6], [4], []),
    "patches": (conv((4, 4), "VALID"), (2, 3, 8, 16), (6, 3, 4, 4), [2, 2, 4, 6], [3], []),
    "stride 2": (conv((2, 2)), (2, 4, 8, 16), (6, 4, 3, 3), [2, 6], [4], [4, 8]),
    "valid": (conv(padding="VALID"), (2, 4, 8, 8), (6, 4, 3, 3), [2, 6], [4], []),
    "dilated window": (conv(rhs_dilation=(2, 2)), (2, 4, 8, 8), (6, 4, 3, 3), [2, 6], [4], [8, 8]),
    "transposed": (
        lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=NHWC),
        (2, 4, 8, 4), (3, 3, 4, 6), [2, 6], [4], [4, 8],
    ),
    "transposed, no overlap": (
        lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=NHWC),
        (2, 4, 8, 4), (2, 2, 4, 6), [2, 4, 6, 8], [4], [],
    ),
    "groups": (conv(feature_group_count=2), (2, 8, 8, 8), (12, 4, 3, 3), [2, 2, 6], [4], [8, 8]),
    "depthwise": (conv(feature_group_count=8), (2, 8, 8, 8), (8, 1, 3, 3), [2, 8], [], [8, 8]),
    "depthwise, multiplied": (
        conv(feature_group_count=4), (2, 4, 8, 8), (12, 1, 3, 3), [2, 3, 4], [], [8, 8],
    ),
    "batch groups": (
        conv(batch_group_count=2), (6, 4, 8, 8), (10, 4, 3, 3), [2, 3, 5], [4], [8, 8],
    ),
    "causal": (
        lambda x, w: lax.conv_general_dilated(x, w, (1,), [(2, 0)]),
        (2, 4, 8), (6, 4, 3), [2, 6], [4], [8],
    ),
    "no space": (
        lambda x, w: lax.conv_general_dilated(x, w, (), ()), (4, 6), (8, 6), [4, 8], [6], [],
    ),
    "3d": (
        lambda x, w: lax.conv_general_dilated(x, w, (1, 2, 1), "SAME"),
        (2, 2, 4, 4, 4), (2, 2, 3, 3, 1), [2, 2, 4], [2], [2, 4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVS)
def test_convolution(case: str) -> None:
    fn, left, right, parallel, reduced, halos = CONVS[case]
    rule = check("conv_general_dilated", fn, real(*left), real(*right))
    assert split_sizes(rule, "parallel") == parallel
    assert split_sizes(rule, "reduction") == reduced
    assert split_sizes(rule, "halo") == halos


@pytest.mark.parametrize(
    ("case", "reduced", "halo"),
    [
        ("plain", [2, 8, 8], 2),  # the batch and both spatial dims
        ("stride 2", [2, 4, 8], 1),
        ("patches", [2, 2, 4], 0),
        ("depthwise", [2, 8, 8], 2),
        ("groups", [2, 8, 8], 2),
        ("batch groups", [3, 8, 8], 2),
    ],
)
def test_gradient_of_the_weights(case: str, reduced: list[int], halo: int) -> None:
    fn, left, right, *_ = CONVS[case]

    def loss(w: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(fn(x, w)))

    x, w = real(*left), real(*right)
    eqn, ins, rule = find("conv_general_dilated", jax.grad(loss), w, x)
    assert not faults(eqn, ins, rule)
    assert split_sizes(rule, "reduction") == reduced
    assert max(f.halo for f in rule.factors if f.kind == "reduction") == halo


@pytest.mark.parametrize("case", ["plain", "stride 2", "patches", "dilated window", "groups"])
def test_gradient_of_the_picture(case: str) -> None:
    fn, left, right, *_ = CONVS[case]
    x, w = real(*left), real(*right)
    out = jax.eval_shape(fn, x, w)

    def pull(g: Any, w: Any) -> Any:
        return jax.linear_transpose(lambda x: fn(x, w), x)(g)[0]

    rule = check("conv_general_dilated", pull, real(*out.shape), w)
    assert left[0] in split_sizes(rule, "parallel")


def test_flops_of_a_convolution() -> None:
    rule = find("conv_general_dilated", conv(), real(2, 4, 8, 8), real(6, 4, 3, 3))[2]
    assert rule.flops == 2 * (2 * 6 * 8 * 8) * (4 * 3 * 3)
    grouped = conv(feature_group_count=2)
    rule = find("conv_general_dilated", grouped, real(2, 8, 8, 8), real(12, 4, 3, 3))[2]
    assert rule.flops == 2 * (2 * 12 * 8 * 8) * (4 * 3 * 3)


POOLS = {
    "apart": ((1, 2, 2), (1, 2, 2), "VALID", [2, 4, 4], []),
    "overlapping": ((1, 3, 3), (1, 2, 2), "SAME", [2], [4, 4]),
    "stride 1": ((1, 3, 3), (1, 1, 1), "SAME", [2], [8, 8]),
    "valid": ((1, 3, 1), (1, 1, 1), "VALID", [2, 8], []),
    "everything": ((1, 8, 8), (1, 1, 1), "VALID", [2], []),
}


@pytest.mark.parametrize("case", POOLS)
@pytest.mark.parametrize("kind", ["max", "min", "sum", ""])
def test_pooling(case: str, kind: str) -> None:
    window, strides, padding, parallel, halos = POOLS[case]
    combine, start = {
        "max": (lax.max, -jnp.inf),
        "min": (lax.min, jnp.inf),
        "sum": (lax.add, 0.0),
        "": (lambda a, b: jnp.maximum(a, jnp.abs(b)), 0.0),
    }[kind]
    name = f"reduce_window_{kind}" if kind else "reduce_window"
    rule = check(
        name,
        lambda x: lax.reduce_window(x, start, combine, window, strides, padding),
        real(2, 8, 8),
    )
    assert split_sizes(rule, "parallel") == parallel
    assert split_sizes(rule, "halo") == halos
    assert rule.linear == (((0,),) if kind == "sum" else ())


def test_dilated_pooling() -> None:
    rule = check(
        "reduce_window_sum",
        lambda x: lax.reduce_window(x, 0.0, lax.add, (3,), (1,), [(2, 2)], window_dilation=(2,)),
        real(8),
    )
    assert split_sizes(rule, "halo") == [8]
    assert rule.factors[0].halo == 4


@pytest.mark.parametrize("case", ["apart", "overlapping", "stride 1"])
def test_gradient_and_tangent_of_max_pooling(case: str) -> None:
    window, strides, padding, parallel, _ = POOLS[case]

    def pool(x: Any) -> Any:
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)

    def loss(x: Any) -> Any:
        return jnp.sum(jnp.sin(pool(x)))

    x = real(2, 16, 16)
    assert 2 in split_sizes(check("select_and_scatter_add", jax.grad(loss), x), "parallel")
    tangent = check(
        "select_and_gather_add", lambda x, t: jax.jvp(pool, (x,), (t,)), x, real(*x.shape)
    )
    assert len(split_sizes(tangent, "parallel")) == len(parallel)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"])
def test_cumulative(name: str, reverse: bool) -> None:
    fn = getattr(lax, name)
    rule = check(name, lambda x: fn(x, axis=1, reverse=reverse), real(4, 6, 8))
    assert split_sizes(rule, "parallel") == [4, 8]
    assert split_sizes(rule, "whole") == [6]


# What must fail.


@pytest.mark.parametrize("case", ["plain", "transposed", "dilated window"])
def test_a_halo_that_is_too_small_is_caught(case: str) -> None:
    fn, left, right, *_ = CONVS[case]
    eqn, ins, rule = find("conv_general_dilated", fn, real(*left), real(*right))
    factors = tuple(replace(f, halo=0) for f in rule.factors)
    assert faults(eqn, ins, replace(rule, factors=factors))
