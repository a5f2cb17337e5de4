"""Which stacks XLA:GPU lays anew for the loops that slice them, and what their copies take."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard
from autoshard import targets

LAYERS, BATCH, LONG, HEADS, FEATURES = 4, 64, 1024, 16, 128
DEVICES = 8
CLUSTER = f"h100:{DEVICES}"


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.bfloat16)


def decode(order: str, tokens: int, split: str, given_back: bool) -> Any:
    """A plan for some more tokens, from caches that lie in an order of b k h d.

    split: the dim of the caches that the devices share, and the heads, which they gather after the
    attention; with k, they share the heads of new tokens along b.
    """
    width, along = HEADS * FEATURES, order.index("k")
    length = {"b": BATCH, "k": LONG, "h": HEADS, "d": FEATURES}

    def on(x: Any, dims: str) -> Any:
        inside = "b" if split == "k" else split  # heads of one token have no k to be split
        return autoshard.annotate(x, *("x" if d == inside else None for d in dims))

    def fn(weights: Any, caches: Any, x: Any, at: Any) -> Any:
        def layer(x: Any, given: Any) -> Any:
            weights, caches = given
            heads = *x.shape[:2], HEADS, FEATURES
            q, k, v = (on((x @ weights[n]).reshape(heads), "bqhd") for n in "qkv")
            new = (jnp.einsum(f"bkhd->{order}", c[:, :1]) for c in (k, v))
            update = jax.lax.dynamic_update_slice_in_dim
            keys, values = (update(*c, at, axis=along) for c in zip(caches, new, strict=True))
            scores = jnp.einsum(f"bqhd,{order}->bhqk", q, keys).astype(jnp.float32)
            shares = jax.nn.softmax(on(scores, "bhqk")).astype(x.dtype)
            mixed = on(jnp.einsum(f"bhqk,{order}->bqhd", shares, values), "bqhd")
            mixed = autoshard.annotate(jnp.tanh(mixed), None, None, None, None)
            x = autoshard.annotate(x + mixed.reshape(x.shape) @ weights["o"], None, None, None)
            return x, (keys, values) if given_back else None

        return jax.lax.scan(layer, x, (weights, caches))

    cache = shape(LAYERS, *(length[d] for d in order))
    weights = {n: shape(LAYERS, width, width) for n in "qkvo"}
    args = weights, (cache, cache), shape(BATCH, tokens, width)
    at = jax.ShapeDtypeStruct((), jnp.int32)
    caches = jax.P(None, *("x" if d == split else None for d in order))
    return autoshard.plan(
        fn, *args, at, cluster=CLUSTER, mesh={"x": DEVICES}, hints={"caches/*": caches}
    )


# The caches' order, how many tokens, the dim that is split and gathered, how many are laid anew
CACHES = [
    ("bkhd", 1, "b", 2),
    ("bhkd", 1, "b", 1),  # but for the values, whose k is summed
    ("bhdk", 1, "b", 1),  # but for the keys, whose d is summed
    ("bhkd", 1, "h", 2),
    ("bkhd", 2, "b", 2),  # as products want them
    ("bhkd", 2, "h", 0),
    ("kbhd", 2, "h", 0),
    ("bkhd", 1, "k", 0),  # as what is written to them lies, gathered along b
]


@pytest.mark.parametrize("given_back", [False, True])
@pytest.mark.parametrize(("order", "tokens", "split", "anew"), CACHES)
def test_caches_are_laid_anew_as_products_and_gathers_want_them(
    order: str, tokens: int, split: str, anew: int, given_back: bool
) -> None:
    plan = decode(order, tokens, split, given_back)
    cache = 2 * LAYERS * BATCH * LONG * HEADS * FEATURES / DEVICES
    weights = 4 * 2 * LAYERS * (HEADS * FEATURES) ** 2
    whole = (4 if given_back else 2) * cache + weights
    assert round((plan.cost.peak_memory - whole) / cache - 0.2) == anew
    as_compiled(plan, 0.1)


def gathered(shape_of_weight: tuple[int, ...], split: int) -> Any:
    """A plan for layers whose weights are gathered before each is used."""

    def fn(weights: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            w = autoshard.annotate(w.astype(jnp.bfloat16) * 2, *(None,) * w.ndim)
            y = jax.nn.relu(jnp.tensordot(x, w, (1, w.ndim - 2)))
            return x + y.reshape(*x.shape[:1], -1)[:, : x.shape[1]], None

        return jax.lax.scan(layer, x, weights)[0]

    stack = jax.ShapeDtypeStruct((8, *shape_of_weight), jnp.float32)
    dims = ["x" if d == split else None for d in range(stack.ndim)]
    return autoshard.plan(
        fn,
        stack,
        shape(512, shape_of_weight[-2]),
        cluster=CLUSTER,
        mesh={"x": DEVICES},
        hints={"weights": jax.P(*dims), "x": jax.P("x")},
    )


WEIGHTS = [
    ((2048, 4096), 1, False),
    ((2048, 4096), 2, True),
    ((8, 2048, 1024), 1, False),
    ((8, 2048, 1024), 2, True),
    ((1, 2048, 8192), 2, False),  # dims of length 1 do not count
]


@pytest.mark.parametrize(("weight", "split", "anew"), WEIGHTS)
def test_weights_are_laid_anew_whose_inner_dims_are_gathered(
    weight: tuple[int, ...], split: int, anew: bool
) -> None:
    plan = gathered(weight, split)
    bare = next(v for v in plan.data.arguments if v.name == "weights").nbytes / DEVICES
    before = gathered(weight, 1) if anew else plan
    more = plan.cost.peak_memory - before.cost.peak_memory
    assert more == pytest.approx(bare if anew else 0, rel=0.2)
    as_compiled(plan, 0.25)


def as_compiled(plan: Any, tolerance: float) -> None:
    """Check a plan's memory where the GPU's compiler is installed."""
    try:
        targets.target_devices(autoshard.cluster(CLUSTER))
    except targets.NoCompiler:
        return
    compiled = plan.verify().compiled
    assert compiled is not None
    assert compiled.memory is not None
    assert plan.cost.peak_memory == pytest.approx(compiled.memory.peak, rel=tolerance)
