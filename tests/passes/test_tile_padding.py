"""An array in whole tiles is no smaller, and larger by no more than its best layout makes it."""

from __future__ import annotations

import math
from itertools import permutations

import jax
import jax.numpy as jnp
from hypothesis import given
from hypothesis import strategies as st

from autoshard.trace import trace
from passes.tile_padding import batch_dims, outer_dims, padded, wasteful

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

    shape = jax.ShapeDtypeStruct((2, 197, 16, 64), jnp.float32)
    graph = trace(scores, shape, shape).graph
    outer = outer_dims(graph)
    found = {op.name: outer[op.outputs[0]] for op in graph.ops}
    assert found["dot_general"] == found["exp"] == {0, 1}
    assert not found["reduce_sum"]
    assert padded((2, 16, 9, 9), outer[graph.ops[0].outputs[0]]) == 16 * 128 / 81


def test_a_convolution_has_features_and_batch_on_its_tiles() -> None:
    def net(x: jax.Array, w: jax.Array) -> jax.Array:
        x = x.astype(jnp.bfloat16)
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=numbers)
        y = jax.nn.relu(y)
        return jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")

    image = jax.ShapeDtypeStruct((16, 224, 224, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((7, 7, 3, 64), jnp.bfloat16)
    graph = trace(net, image, kernel).graph
    outer = outer_dims(graph)
    made = {op.name: op.outputs[0] for op in graph.ops}
    for name in ("convert_element_type", "conv_general_dilated", "max", "reduce_window_max"):
        assert outer[made[name]] == {1, 2}, name
    assert not outer[graph.inputs[0]]  # an argument lies as it was given
    assert padded((16, 224, 224, 3), {1, 2}) == 4 * 128 / (16 * 3)
    assert padded((16, 112, 112, 64), {1, 2}) == 2


def test_small_products_are_spread_while_they_run_and_no_longer() -> None:
    def crossed(x: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.exp(jnp.einsum("bij,bjd->bid", g, x))

    x, g = (jax.ShapeDtypeStruct((16384, 9, n), jnp.float32) for n in (64, 9))
    graph = trace(crossed, x, g).graph
    product, exp = graph.ops
    for v, dims in zip(product.inputs, product.rule.operands, strict=True):
        assert batch_dims(product.rule, dims) == {0}
        assert wasteful(graph.values[v].shape, {0})
    outer = outer_dims(graph)
    assert outer[product.outputs[0]] == {0}
    assert not outer[exp.outputs[0]]
