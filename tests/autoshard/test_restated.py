"""What is said in a roundabout way is planned as if it were said plainly."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autoshard
from autoshard.restated import restated
from autoshard.targets import target_devices
from autoshard.trace import trace

A = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32)


def products(fn: Any, *args: Any) -> list[str]:
    """The rules of all products that a function's graph has."""
    ops = trace(fn, *args).graph.ops
    return [op.rule.notation() for op in ops if op.name == "dot_general"]


def test_a_flattened_array_is_read_as_it_was() -> None:
    assert products(lambda a: jnp.vdot(a, a), A) == ["k0 k1 k2, k0 k1 k2 -> []"]
    assert products(lambda a: a.ravel() @ (2 * a).ravel(), A) == ["k0 k1 k2, k0 k1 k2 -> []"]


def test_inside_loops_branches_and_calls_too() -> None:
    def norms(a: jax.Array) -> jax.Array:
        step = jax.jit(lambda x: jnp.vdot(x, x))
        total, _ = jax.lax.scan(lambda c, x: (c + step(x), None), 0.0, a)
        return jax.lax.cond(total > 1, lambda: step(a[0]), lambda: step(a[1]))

    assert products(norms, A) == ["k0 k1, k0 k1 -> []"] * 3


def test_what_is_not_only_flattened_stays_as_it_is() -> None:
    b = jax.ShapeDtypeStruct((64, 4, 64), jnp.float32)
    flat = ["k, k -> []"]
    assert products(lambda a, b: jnp.vdot(a, b), A, b) == flat  # other elements meet
    assert products(lambda a: jnp.vdot(a, jnp.ones(a.size)), A) == flat
    assert products(lambda a: jnp.vdot(a.T, a), A) == flat
    assert products(lambda a: a.reshape(1, -1) @ a.ravel(), A) == [". k, k -> ."]
    jaxpr = jax.make_jaxpr(lambda a: jnp.sin(a) @ a[0])(A)
    assert restated(jaxpr) is jaxpr


def rows(table: jax.Array, at: jax.Array) -> jax.Array:
    """Rows of a table, as they are picked by code that was written for one token."""
    return jax.vmap(jax.vmap(lambda i: table[i]))(at)


def gradient(table: jax.Array, at: jax.Array) -> jax.Array:
    return jax.grad(lambda t: (rows(t, at) ** 2).sum())(table)


def scatters(fn: Any, *args: Any) -> list[Any]:
    jaxpr = restated(jax.make_jaxpr(fn)(*args))
    return [e for e in jaxpr.jaxpr.eqns if e.primitive.name in ("gather", "scatter-add")]


def test_rows_are_picked_and_added_to_by_one_coordinate() -> None:
    table, at = jnp.ones((5, 4)), jnp.zeros((2, 3), int)
    gather, scatter = scatters(gradient, table, at)
    assert gather.params["dimension_numbers"].start_index_map == (0,)
    assert scatter.params["dimension_numbers"].scatter_dims_to_operand_dims == (0,)
    assert scatter.params["dimension_numbers"].inserted_window_dims == (0,)
    assert scatter.invars[2].aval.shape == (2, 3, 4)


def test_parts_of_rows_are_picked_by_both_coordinates() -> None:
    def part(table: jax.Array, at: jax.Array) -> jax.Array:
        one = functools.partial(jax.lax.dynamic_slice, slice_sizes=(1, 2))
        return jax.vmap(lambda i: one(table, (i, i)))(at)

    (gather,) = scatters(part, jnp.ones((5, 4)), jnp.zeros(3, int))
    assert gather.params["dimension_numbers"].start_index_map == (0, 1)


def test_coordinates_that_come_in_unequal_pieces_stay_together() -> None:
    def odd(table: jax.Array, at: jax.Array) -> jax.Array:
        pair = jnp.stack([at, at], 1)
        where = jax.lax.concatenate([pair[:, :0], pair], 1)  # two pieces for two coordinates
        numbers = jax.lax.GatherDimensionNumbers((1, 2), (), (0, 1))
        mode = jax.lax.GatherScatterMode.CLIP
        return jax.lax.gather(table, where, numbers, (1, 4), mode=mode)

    (gather,) = scatters(odd, jnp.ones((5, 4)), jnp.zeros(3, int))
    assert gather.params["dimension_numbers"].start_index_map == (0, 1)


@given(
    table=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    at=st.lists(st.integers(-9, 9), min_size=6, max_size=6),
)
@settings(max_examples=20, deadline=None)
def test_the_same_rows_and_gradients(table: tuple[int, int], at: list[int]) -> None:
    values = jnp.arange(float(math.prod(table))).reshape(table)
    where = jnp.array(at).reshape(2, 3)
    for fn in (rows, gradient):
        jaxpr = restated(jax.make_jaxpr(fn)(values, where))
        (got,) = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, values, where)
        np.testing.assert_array_equal(got, fn(values, where))


@pytest.mark.libtpu
def test_a_tpu_has_a_kernel_for_the_gradient() -> None:
    table = jax.ShapeDtypeStruct((4096, 512), jnp.float32)
    at = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    plan = autoshard.plan(gradient, table, at, cluster="tpu-v5e:2x2", mesh={"data": 4})
    compiled = plan.lower(target_devices(autoshard.cluster("tpu-v5e:2x2"))).compile()
    assert " while(" not in compiled.as_text()


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    dtype=st.sampled_from(["float32", "bfloat16", "int32"]),
)
@settings(max_examples=20, deadline=None)
def test_the_same_numbers(shape: list[int], dtype: str) -> None:
    def fn(a: jax.Array, b: jax.Array) -> Any:
        return jnp.vdot(a, b), jnp.vdot(a.T, a.T), a.ravel() @ b.ravel()

    a = jnp.asarray(np.random.default_rng(0).integers(-3, 3, shape), dtype)
    b = jnp.asarray(np.random.default_rng(1).integers(-3, 3, shape), dtype)
    jaxpr = restated(jax.make_jaxpr(fn)(a, b))
    found = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, a, b)
    for got, wanted in zip(found, fn(a, b), strict=True):
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("split", [0, 1, 2])
def test_the_norm_of_a_split_gradient_gathers_nothing(split: int) -> None:
    spec: list[str | None] = [None, None, None]
    spec[split] = "data"
    w = jnp.ones((8, 64, 64))

    def norm(w: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.vdot(w, w))

    plan = autoshard.plan(norm, w, cluster="cpu:8", mesh={"data": 8}, hints={"w": jax.P(*spec)})
    compiled = plan.lower().compile()
    assert "all-gather" not in compiled.as_text()
    assert float(plan.compile()(w)) == pytest.approx(float(norm(w)))
