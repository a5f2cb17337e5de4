"""Products of arrays that were only flattened for them are planned as the arrays lie."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autoshard
from autoshard.raveled import as_they_are
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
    assert as_they_are(jaxpr) is jaxpr


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
    jaxpr = as_they_are(jax.make_jaxpr(fn)(a, b))
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
