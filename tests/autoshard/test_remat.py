"""Layers that are computed again: the same numbers, and as little kept as by jax.checkpoint.

The oracles are the function as it is, run by jax, and the same function with its layers in
jax.checkpoint. Plans are for test_remat_plans.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from jax import lax
from same_results import EXAMPLES
from same_results import worst as farthest

from autoshard.flat import flat
from autoshard.remat import Rematable, rematable
from autoshard.trace import trace
from passes.remat_layers import runs

pytestmark = pytest.mark.usefixtures("in_a_hurry")

worst = partial(farthest, floor=1e-6)


def found(fn: Callable[..., Any], args: Any) -> Rematable:
    return rematable(fn, args, {}, {})


def again(fn: Callable[..., Any], args: Any) -> Callable[..., Any]:
    """The function with all of it computed again that can be."""
    here = found(fn, args)
    assert here.regions
    return here.with_again(range(len(here.regions)))


def agree(fn: Callable[..., Any], args: Any, near: float = 1e-6) -> None:
    want = jax.jit(fn)(*args)
    assert worst(jax.jit(again(fn, args))(*args), want) < near


def kept(fn: Callable[..., Any], args: Any) -> int:
    """Bytes that the forward half makes and hands to the backward half."""
    traced = trace(fn, *args)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in traced.in_avals]
    traced = trace(flat(traced, kept=True), *shapes)
    graph = traced.graph
    back = {op.id for op in graph.ops if op.path[:1] in traced.backward}
    made = {v for op in graph.ops if op.id not in back for v in op.outputs}
    return sum(
        graph.values[v].type.nbytes for v in {v for o in back for v in graph.ops[o].inputs} & made
    )


def names(fn: Callable[..., Any], args: Any) -> Counter[str]:
    """How often each operation stands in a function, in loops once."""
    return Counter(op.name for op in trace(fn, *args).graph.ops)


def numbers(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 0.3, jnp.float32)


Layer = Callable[[Any, Any], Any]


def step_of(layer: Layer, scanned: bool, count: int = 4, width: int = 8) -> tuple[Any, Any]:
    """Loss and gradients of layers, each with a matrix [2, width, width]."""

    def loss(params: Any, x: Any) -> Any:
        if scanned:
            x, _ = lax.scan(lambda x, p: (layer(p, x), None), x, params)
        else:
            for k in range(count):
                x = layer(params[k], x)
        return jnp.mean(x**2)

    return jax.value_and_grad(loss), (numbers(count, 2, width, width), numbers(16, width, seed=1))


def mlp(p: Any, x: Any) -> Any:
    return x + jax.nn.gelu(jnp.sin(x) @ p[0]) @ p[1]


# Whole models


@pytest.mark.parametrize("scanned", [True, False])
def test_gpt_keeps_what_jax_checkpoint_keeps(scanned: bool, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import zoo

    size = {"width": 16, "layers": 3, "heads": 2, "sequence": 32, "batch": 2, "vocab": 32}
    fn, shapes = zoo.gpt(**size, scan=scanned)
    by_hand, _ = zoo.gpt(**size, scan=scanned, remat=True)
    if scanned:
        agree(fn, zoo.filled(shapes))
    least = kept(by_hand, shapes)
    masks = 4 * 2 * 2 * 32**2 * 2 if scanned else 0  # which jax makes ahead of a scan
    assert kept(again(fn, shapes), shapes) <= least + masks < 0.8 * kept(fn, shapes)
    assert not found(by_hand, shapes).regions  # nothing is left to compute again


@pytest.mark.parametrize("scanned", [True, False])
def test_flax_with_dropout(scanned: bool) -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            y = nn.Dense(32)(nn.LayerNorm()(x))
            y = nn.Dropout(0.3, deterministic=False)(nn.gelu(y))
            return x + nn.Dense(x.shape[-1])(y), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            if scanned:
                layers = nn.scan(
                    Layer,
                    variable_axes={"params": 0},
                    split_rngs={"params": True, "dropout": True},
                    length=3,
                )
                return layers()(x, None)[0]
            for _ in range(3):
                x, _ = Layer()(x, None)
            return x

    model, x = Model(), numbers(8, 16)
    params = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

    def train_step(params: Any, x: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.mean(model.apply(params, x, rngs={"dropout": key}) ** 2)

        return jax.value_and_grad(loss)(params)

    args = params, x, jax.random.key(3)
    assert len(found(train_step, args).regions) == (1 if scanned else 3)
    agree(train_step, args)


# What the user's own jax.checkpoint does


@pytest.mark.parametrize("scanned", [True, False])
def test_what_jax_checkpoint_computes_again_is_not_done_a_third_time(scanned: bool) -> None:
    def layer(p: Any, x: Any) -> Any:
        h = jnp.sin(x @ p[0])
        return x + jax.checkpoint(lambda h: jnp.tanh(h @ p[1]) * h)(h)

    fn, args = step_of(layer, scanned)
    agree(fn, args)
    new, old = names(again(fn, args), args), names(fn, args)
    assert new["cos"] == old["cos"] + (1 if scanned else 4)
    assert new["tanh"] == old["tanh"]
    assert new["sin"] == old["sin"]  # jax.checkpoint keeps it


@pytest.mark.parametrize("scanned", [True, False])
def test_a_policy_keeps_what_it_saves(scanned: bool) -> None:
    saved = jax.checkpoint(mlp, policy=jax.checkpoint_policies.dots_saveable)
    fn, args = step_of(saved, scanned)
    here = found(fn, args)
    new = here.with_again(range(len(here.regions)))
    assert worst(jax.jit(new)(*args), jax.jit(fn)(*args)) < 1e-6
    assert names(new, args)["dot_general"] == names(fn, args)["dot_general"]


# Programs of other forms


def test_accumulated_gradients_with_their_loop_written_by_hand() -> None:
    fn, (params, x) = step_of(mlp, scanned=False)
    both, _ = step_of(mlp, scanned=True)

    def accumulated(params: Any, xs: Any) -> Any:
        def one(sums: Any, x: Any) -> Any:
            value, grads = fn(params, x)
            more, others = both(params, x)
            return (sums[0] + value + more, sums[1] + grads + others), None

        zero = jnp.zeros(()), jnp.zeros_like(params)
        return lax.scan(one, zero, xs.reshape(4, -1, xs.shape[-1]))[0]

    here = found(accumulated, (params, x))
    assert len(here.regions) == 5  # one scan, and four layers beside it
    agree(accumulated, (params, x))


def test_two_gradients_one_after_the_other() -> None:
    fn, args = step_of(mlp, scanned=False, count=3)

    def both(params: Any, x: Any) -> Any:
        value, grads = fn(params, x)
        return fn(params - 0.1 * grads, x), fn(2 * params, x + value), fn(params, 2 * x)

    here = found(both, args)
    assert len(here.regions) >= 6
    new = here.with_again(range(len(here.regions)))
    assert worst(jax.jit(new)(*args), jax.jit(both)(*args)) < 1e-6


def with_branch(p: Any, x: Any) -> Any:
    y = lax.cond(x.sum() > 0, lambda x: jnp.sin(x @ p[0]), lambda x: jnp.cos(x), x)
    return x + jnp.tanh(y @ p[1])


def with_inner_scan(p: Any, x: Any) -> Any:
    y, ys = lax.scan(lambda c, w: (jnp.tanh(c * w + x), jnp.sin(c)), x, p[0])
    return x + (y + ys.sum(0)) @ p[1]


def with_while_loop(p: Any, x: Any) -> Any:
    start = lax.stop_gradient(x)
    y = lax.while_loop(lambda c: jnp.abs(c).sum() > 1, lambda c: c * 0.5, start)
    return x + jnp.tanh(x @ p[0] + y) @ p[1]


def with_a_function_of_its_own_gradient(p: Any, x: Any) -> Any:
    @jax.custom_vjp
    def f(x: Any) -> Any:
        return jnp.sin(x)

    f.defvjp(lambda x: (jnp.sin(x), jnp.exp(x)), lambda r, g: (2 * r * g,))
    return x + jnp.tanh(f(x @ p[0])) @ p[1]


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize(
    "layer",
    [with_branch, with_inner_scan, with_while_loop, with_a_function_of_its_own_gradient],
)
def test_layers_with_parts_of_their_own(layer: Layer, scanned: bool) -> None:
    fn, args = step_of(layer, scanned)
    assert len(found(fn, args).regions) == (1 if scanned else 4)
    agree(fn, args)


def test_results_of_layers_are_still_handed_out() -> None:
    def loss(params: Any, x: Any) -> Any:
        def layer(x: Any, p: Any) -> Any:
            h = jnp.tanh(jnp.sin(x) @ p[0])
            return x + jnp.exp(h) @ p[1], h

        x, hidden = lax.scan(layer, x, params, reverse=True)
        return jnp.mean(x**2) + jnp.mean(hidden**4), hidden

    _, args = step_of(mlp, scanned=True)
    agree(jax.value_and_grad(loss, has_aux=True), args)


def test_what_an_encoder_hands_to_a_decoder_is_no_residual() -> None:
    """Two scans of one length, one reads the other's results, and neither is a gradient."""

    def loss(params: Any, x: Any) -> Any:
        x, memory = lax.scan(lambda x, p: (mlp(p, x), jnp.sin(x)), x, params)
        x, _ = lax.scan(lambda x, m: (jnp.tanh(x + m), None), x, memory)
        return jnp.mean(x**2)

    _, args = step_of(mlp, scanned=True)
    assert not found(loss, args).regions
    agree(jax.value_and_grad(loss), args)


def test_what_prints_prints_once(capfd: pytest.CaptureFixture[str]) -> None:
    def layer(p: Any, x: Any) -> Any:
        y = jnp.sin(x @ p[0])
        jax.debug.print("layer {}", y.sum())
        return x + jnp.tanh(y) @ p[1]

    for scanned in (True, False):
        fn, args = step_of(layer, scanned)
        jax.block_until_ready(jax.jit(again(fn, args))(*args))
        jax.effects_barrier()
        assert capfd.readouterr().out.count("layer") == 4


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: x @ p[0, 0],
        lambda p, x: lax.scan(lambda x, p: (mlp(p, x), None), x, p)[0],
        lambda p, x: jax.grad(lambda x: (x @ p[0, 0]).sum())(x),
    ],
)
def test_nothing_to_compute_again(fn: Callable[..., Any]) -> None:
    assert not found(fn, step_of(mlp, scanned=True)[1]).regions


def test_layers_of_several_shapes_are_cut_in_pieces() -> None:
    params = [numbers(a, b) for a, b in ((8, 64), (64, 32), (32, 96), (96, 16), (16, 48), (48, 8))]

    def loss(params: Any, x: Any) -> Any:
        for p in params:
            x = jnp.sin(jnp.exp(jnp.sin(x @ p)))
        return jnp.mean(x**2)

    fn, args = jax.value_and_grad(loss), (params, numbers(128, 8, seed=1))
    agree(fn, args)
    assert kept(again(fn, args), args) < 0.6 * kept(fn, args)


# Anything


OPS: dict[str, Layer] = {
    "sin": lambda p, x: jnp.sin(x),
    "gelu": lambda p, x: jax.nn.gelu(x),
    "norm": lambda p, x: jax.nn.standardize(x),
    "first": lambda p, x: x @ p[0],
    "second": lambda p, x: jnp.tanh(x @ p[1]),
    "relu": lambda p, x: jnp.where(x > 0, x, 0.1 * x),
    "soft": lambda p, x: jax.nn.softmax(x) * x,
    "beside": lambda p, x: x + jnp.exp(-(x**2)),
    "bf16": lambda p, x: (x.astype(jnp.bfloat16) ** 2).astype(x.dtype),
}


def layer_of(ops: Sequence[str], checked: tuple[int, int], through: bool) -> Layer:
    """A layer of these, some of them in jax.checkpoint."""

    def chain(names: Sequence[str]) -> Layer:
        def run(p: Any, x: Any) -> Any:
            for name in names:
                x = OPS[name](p, x)
            return x

        return run

    a, b = checked
    parts = [chain(ops[:a]), jax.checkpoint(chain(ops[a:b])), chain(ops[b:])]

    def layer(p: Any, x: Any) -> Any:
        y = x
        for part in parts:
            y = part(p, y)
        return x + y if through else y

    return layer


@settings(max_examples=8, deadline=None)
@drawn(
    st.lists(st.sampled_from(sorted(OPS)), min_size=2, max_size=7),
    st.tuples(st.integers(0, 7), st.integers(0, 3)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**4 - 1),
)
def test_any_layers_and_any_of_them_again(
    ops: list[str], part: tuple[int, int], through: bool, scanned: bool, chosen: int
) -> None:
    begin = min(part[0], len(ops))
    layer = layer_of(ops, (begin, begin + part[1]), through)
    fn, args = step_of(layer, scanned, width=4)
    here = found(fn, args)
    some = [k for k in range(len(here.regions)) if chosen >> k & 1]
    new = here.with_again(some)
    assert worst(jax.jit(new)(*args), jax.jit(fn)(*args)) < 2e-6
    if some:
        assert kept(new, args) < kept(fn, args)


@drawn(
    st.lists(st.integers(0, 3), max_size=4),
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
    st.integers(2, 5),
    st.lists(st.integers(4, 9), max_size=4),
)
def test_a_sequence_that_repeats_is_found(
    before: list[int], layer: list[int], count: int, after: list[int]
) -> None:
    """Its repeats lie in those found, where they are most of the program."""
    kinds = [10 + k for k in before] + layer * count + [20 + k for k in after]
    weights = [1e-3] * len(before) + [1.0] * len(layer) * count + [1e-3] * len(after)
    covered = set[int]()
    for start, period, end in runs(kinds, weights):
        assert kinds[start : end - period] == kinds[start + period : end]
        assert end - start >= 2 * period
        covered.update(range(start, end))
    assert covered.issuperset(range(len(before), len(before) + len(layer) * count))
