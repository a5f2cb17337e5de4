"""An array in whole tiles is no smaller, and larger by no more than its best layout makes it."""

from __future__ import annotations

import math
from itertools import permutations

import jax
import jax.numpy as jnp
from hypothesis import given
from hypothesis import strategies as st

from autoshard.trace import trace
from passes.tile_padding import outer_dims, padded

DIMS = st.integers(2, 40) | st.sampled_from([64, 127, 128, 197, 200, 256, 1000])


def laid(shape: tuple[int, ...]) -> int:
    """Elements of an array laid with its last dim along the lanes and the one before in rows."""
    *outer, rows, lanes = shape
    whole = next(t for t in (1, 2, 4, 8) if rows <= t or t == 8)
    return math.prod(outer) * -(-rows // whole) * whole * -(-lanes // 128) * 128


@given(st.lists(DIMS, min_size=2, max_size=4))
def test_it_is_the_least_of_all_layouts(shape: list[int]) -> None:
    best = min(laid(order) for order in permutations(shape))
    assert math.isclose(padded(shape) * math.prod(shape), best)


@given(st.lists(DIMS, max_size=3), st.integers(0, 3))
def test_dims_of_one_do_not_matter(shape: list[int], at: int) -> None:
    assert padded([*shape[:at], 1, *shape[at:]]) == padded(shape)


def test_whole_tiles_waste_nothing() -> None:
    assert padded((8, 128)) == padded((1024, 3, 128, 16)) == padded((2, 1, 256)) == 1.0


def test_the_batch_of_a_product_stays_outside() -> None:
    def scores(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", q, k)).sum(axis=3)

    shape = jax.ShapeDtypeStruct((2, 9, 16, 64), jnp.float32)
    graph = trace(scores, shape, shape).graph
    outer = outer_dims(graph)
    found = {op.name: outer[op.outputs[0]] for op in graph.ops}
    assert found["dot_general"] == found["exp"] == {0, 1}
    assert not found["reduce_sum"]
    assert padded((2, 16, 9, 9), outer[graph.ops[0].outputs[0]]) == 16 * 128 / 81
