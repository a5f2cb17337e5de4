"""Pieces that are priced once for all are those whose operations have the same rules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import autoshard
from autoshard.alike_pieces import form_of
from autoshard.cut_program import cut_program

Tree = Any


def step(weights: list[jax.Array], x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Four layers of the same types; two add up along one dim, two along another."""

    def loss(weights: list[jax.Array]) -> jax.Array:
        h = x
        for k, w in enumerate(weights):
            h = jnp.cumsum(jnp.tanh(h * w), axis=1 + k // 2)
        return (h**2).mean()

    value, grads = jax.value_and_grad(loss)(weights)
    return [w - 0.1 * g for w, g in zip(weights, grads, strict=True)], value


def arguments() -> tuple[list[jax.Array], jax.Array]:
    keys = jax.random.split(jax.random.key(0), 5)
    weights = [jax.random.normal(k, (8, 8)) / 8 for k in keys[:4]]
    return weights, jax.random.normal(keys[4], (32, 8, 8))


def test_what_only_a_rule_tells_makes_pieces_differ() -> None:
    cut = cut_program(step, arguments(), {}, {}, steps=4, pieces=4, apart=True)
    forms = [form_of(cut, k, False) for k in range(4)]
    assert forms[1] != forms[2]


def test_pieces_that_differ_in_a_rule_run_as_planned() -> None:
    args = arguments()
    mesh = {"stage": 4, "model": 2}
    asked = {"mesh": mesh, "stages": 4, "microbatches": 4, "schedule": "1F1B"}
    found = autoshard.plan(step, *args, cluster="cpu:8", **asked)
    want, got = jax.jit(step)(*args), found.compile()(*args)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-7)


def test_equal_layers_are_alike() -> None:
    def even(weights: list[jax.Array], x: jax.Array) -> Tree:
        def loss(weights: list[jax.Array]) -> jax.Array:
            h = x
            for w in weights:
                h = jnp.tanh(jnp.cumsum(h * w, axis=1))
            return (h**2).mean()

        return jax.grad(loss)(weights)

    cut = cut_program(even, arguments(), {}, {}, steps=4, pieces=4, apart=True)
    assert form_of(cut, 1, False) == form_of(cut, 2, False) != form_of(cut, 0, False)
