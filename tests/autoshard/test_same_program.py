"""Programs that differ in names and lines are the same; any other difference counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from autoshard.same_program import same_program

X = jax.ShapeDtypeStruct((4, 4), jnp.float32)


def layer(constant: Any = 2.0, table: Any = (1.0, 2.0, 3.0, 4.0)) -> Callable[..., Any]:
    """A fresh function each time: new variables, a loop and a branch in it."""

    def fn(x: Any, y: Any) -> Any:
        rows = jnp.asarray(np.array(table, np.float32))
        z, _ = lax.scan(lambda c, row: (jnp.tanh(c @ x) * row, c), y, rows)
        return lax.cond(z.sum() > 0, lambda: z * constant, lambda: z), x @ y

    return fn


def jaxpr(fn: Callable[..., Any], *args: Any) -> Any:
    return jax.make_jaxpr(fn)(*(args or (X, X)))


def test_the_same_function_traced_twice() -> None:
    assert same_program(jaxpr(layer()), jaxpr(layer()))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (layer(2.0), layer(3.0)),
        (layer(table=(1.0, 2.0, 3.0, 4.0)), layer(table=(1.0, 2.0, 3.0, 5.0))),
        (lambda x, y: x - y, lambda x, y: y - x),
        (lambda x, y: x - y, lambda x, y: x - x),
        (lambda x, y: x + y, lambda x, y: x - y),
        (lambda x, y: (x, y), lambda x, y: (y, x)),
        (lambda x, y: x * 0.0, lambda x, y: x * -0.0),
        (lambda x, y: x.sum(0), lambda x, y: x.sum(1)),
        (lambda x, y: x + y, lambda x, y: (x + y) + y),
        (lambda x, y: jnp.float32(1) * x, lambda x, y: x * y[0, 0]),
        (layer(), lambda x, y: (layer()(x, y)[1], x)),
    ],
)
def test_whatever_differs(a: Callable[..., Any], b: Callable[..., Any]) -> None:
    assert same_program(jaxpr(a), jaxpr(a))
    assert same_program(jaxpr(b), jaxpr(b))
    assert not same_program(jaxpr(a), jaxpr(b))
    assert not same_program(jaxpr(b), jaxpr(a))


def test_shapes_and_types_count() -> None:
    def fn(x: Any) -> Any:
        return x + x

    half = jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)
    flat = jax.ShapeDtypeStruct((16,), jnp.float32)
    assert same_program(jaxpr(fn, X), jaxpr(fn, X))
    assert not same_program(jaxpr(fn, X), jaxpr(fn, half))
    assert not same_program(jaxpr(fn, X), jaxpr(fn, flat))
