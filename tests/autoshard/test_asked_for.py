"""Where XLA is asked for a product's sharding, when only its transpose is read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autoshard
from autoshard.trace import trace
from passes.ir.graph import Op

ROWS, WIDTH, COLUMNS = 64, 32, 48
MESH = {"data": 4, "model": 2}


def turned(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product that is only read transposed, as the gradient of a weight is."""
    return jnp.tanh((x @ w).T) + 1


def turned_and_kept(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The product is a result too."""
    y = x @ w
    return jnp.tanh(y.T), y


def arguments() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(ROWS, WIDTH)), rng.normal(size=(WIDTH, COLUMNS))
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


def ops(fn: Any) -> dict[str, Op]:
    return {op.name: op for op in trace(fn, *arguments()).graph.ops}


def planned(fn: Any, hints: dict[str, Any]) -> autoshard.Plan:
    return autoshard.plan(
        fn, *arguments(), cluster="tpu-v5e:2x4", mesh=MESH, solver="propagate", hints=hints
    )


# What is split so that the product is made: as it is kept, as a partial sum, along both its dims.
HINTS = {
    "rows": {"x": ("data", None)},
    "sums": {"x": (None, "model"), "w": ("model", None)},
    "both": {"x": ("data", None), "w": (None, "model")},
}


@pytest.mark.parametrize("hints", HINTS.values(), ids=HINTS)
def test_it_is_asked_for_behind_the_transpose(hints: dict[str, Any]) -> None:
    plan, found = planned(turned, hints), ops(turned)
    product, transpose = found["dot_general"], found["transpose"]
    assert plan.data.values[product.outputs[0]] is None
    assert plan.data.values[transpose.outputs[0]] is not None
    assert all((r.op, r.operand) != (product.id, 2) for r in plan.data.reshards)


def test_a_product_that_is_kept_is_asked_for_itself() -> None:
    plan, found = planned(turned_and_kept, HINTS["both"]), ops(turned_and_kept)
    assert plan.data.values[found["dot_general"].outputs[0]] is not None


@pytest.mark.parametrize("hints", HINTS.values(), ids=HINTS)
def test_it_computes_the_same(hints: dict[str, Any]) -> None:
    plan, args = planned(turned, hints), arguments()
    got = plan.compile(jax.devices("cpu")[:8])(*args)
    np.testing.assert_allclose(got, turned(*args), rtol=1e-5, atol=1e-5)
    assert set(got.sharding.spec) - {None} <= set(MESH)
