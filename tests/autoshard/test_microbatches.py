"""A batch in microbatches: the same numbers, less memory, and what can not be cut is said.

The oracle is the function as it is, run by jax; the examples of this repository and small models of
the libraries that people use are cut without a change to their code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from same_results import EXAMPLES, example, worst

import autoshard
from autoshard.time_axes import begun, in_steps_of
from autoshard.trace import trace
from passes.ir.plan import TimeAxis
from passes.microbatch_loop import NoTimeLoop

pytestmark = pytest.mark.usefixtures("in_a_hurry")

NUMBERED = sorted(f.name for f in EXAMPLES.glob("[0-9][0-9]_*.py"))


def cut(fn: Callable[..., Any], args: Any, count: int) -> tuple[Callable[..., Any], str]:
    """The function in microbatches, and its notes as one text."""
    traced = trace(fn, *args)
    made, notes = in_steps_of(fn, traced, begun(traced, TimeAxis("micro", count)), {})
    return made, "\n".join(notes)


def random(args: Any, seed: int = 0) -> Any:
    """Numbers for shapes; small integers."""
    rng = np.random.default_rng(seed)

    def one(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 7, x.shape), x.dtype)
        return jnp.asarray(rng.standard_normal(x.shape) * 0.3, x.dtype)

    return jax.tree.map(one, args)


@pytest.mark.parametrize("name", NUMBERED)
def test_examples_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, args = example(name, monkeypatch)
    args = args if all(isinstance(x, jax.Array) for x in jax.tree.leaves(args)) else random(args)
    made, notes = cut(fn, args, 2)
    assert worst(jax.jit(made)(*args), jax.jit(fn)(*args)) < 2e-4
    coupled = "batchnorm" in name
    assert ("waits for all of them" in notes) == coupled
    if coupled:
        assert f"{name}:" in notes  # the line of the batch norm


# Libraries


def step_of(loss: Callable[[Any, Any], Any], tx: Any) -> Callable[[Any, Any], Any]:
    def train_step(state: Any, batch: Any) -> Any:
        params, opt = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    return train_step


CLIPPED = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, eps=1e-3))


def agree(loss: Callable[[Any, Any], Any], params: Any, batch: Any, near: float = 2e-4) -> str:
    """Two, four and eight microbatches give what none do; the notes of two."""
    fn, args = step_of(loss, CLIPPED), ((params, CLIPPED.init(params)), batch)
    want = jax.jit(fn)(*args)
    said = []
    for count in (2, 4, 8):
        made, notes = cut(fn, args, count)
        said.append(notes)
        assert worst(jax.jit(made)(*args), want) < near
    return said[0]


def test_flax_with_dropout_and_a_scan_of_layers() -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            y = nn.MultiHeadDotProductAttention(2, dropout_rate=0.2, deterministic=False)(x)
            return nn.LayerNorm()(x + nn.Dropout(0.3, deterministic=False)(y)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            embed = nn.Embed(11, 8)
            layers = nn.scan(
                Layer, {"params": 0}, split_rngs={"params": True, "dropout": True}, length=3
            )
            x, _ = layers()(embed(tokens), None)
            return embed.attend(x)

    tokens = random(jax.ShapeDtypeStruct((8, 6), jnp.int32))
    key = jax.random.key(0)
    params = Model().init({"params": key, "dropout": key}, tokens)

    def loss(params: Any, tokens: Any) -> Any:
        scores = Model().apply(params, tokens[:, :-1], rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:]).mean()

    assert re.search("(9.|100)% of the FLOPs run in steps", agree(loss, params, tokens))


def test_haiku_with_a_mask_over_the_whole_batch() -> None:
    """The loss is over the labels that count, of all microbatches: their number comes first."""

    def forward(x: Any) -> Any:
        return hk.nets.MLP([16, 16, 3])(hk.LayerNorm(-1, True, True)(x))

    model = hk.without_apply_rng(hk.transform(forward))
    batch = random({"x": jax.ShapeDtypeStruct((16, 5), jnp.float32)})
    batch["y"] = jnp.arange(16) % 3
    batch["mask"] = (jnp.arange(16) % 5 > 0).astype(jnp.float32)
    params = model.init(jax.random.key(0), batch["x"])

    def loss(params: Any, batch: Any) -> Any:
        scores = model.apply(params, batch["x"])
        each = optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])
        return (each * batch["mask"]).sum() / batch["mask"].sum()

    assert "computed ahead, of the whole batch" in agree(loss, params, batch)


def test_equinox_vmapped_convolution() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(16, 3, key=keys[1]),
        ]
    )
    params, static = eqx.partition(model, eqx.is_array)
    images = random(jax.ShapeDtypeStruct((8, 2, 4, 4), jnp.float32))

    def loss(params: Any, images: Any) -> Any:
        return (jax.vmap(eqx.combine(params, static))(images) ** 2).mean()

    agree(loss, params, images)


def test_scan_of_scans_with_remat_in_bfloat16() -> None:
    params = random({"w": jax.ShapeDtypeStruct((2, 3, 8, 8), jnp.float32)})
    x = random(jax.ShapeDtypeStruct((8, 4, 8), jnp.float32))

    def loss(params: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return jnp.tanh(x @ w.astype(jnp.bfloat16)), None

        def group(x: Any, ws: Any) -> Any:
            return lax.scan(jax.checkpoint(layer), x, ws)[0], None

        x, _ = lax.scan(group, x.astype(jnp.bfloat16), params["w"])
        return jnp.mean(x.astype(jnp.float32) ** 2)

    agree(loss, params, x, near=2e-2)


def test_a_scan_that_makes_something_of_the_weights_alone() -> None:
    """It is there after the loop, not before it; its gradient is added to the sums once."""
    ws = random(jax.ShapeDtypeStruct((3, 6, 6), jnp.float32))
    x = random(jax.ShapeDtypeStruct((8, 6), jnp.float32))

    def loss(ws: Any, x: Any) -> Any:
        y, norms = lax.scan(lambda x, w: (jnp.tanh(x @ w), jnp.sum(w**2)), x, ws)
        return jnp.mean(y**2) + 0.1 * norms.sum()

    assert "waits for all of them" not in agree(loss, ws, x)


@pytest.mark.parametrize(
    ("dtype", "weights", "added"), [("float32", 1, 0), ("float32", 2, 2), ("bfloat16", 1, 1)]
)
def test_gradients_of_rows_are_added_where_their_sum_lies(
    dtype: str, weights: int, added: int
) -> None:
    """Not of a table that is read twice, nor one that is added up in a longer float."""
    rows, labels = np.arange(16) % 7, np.ones((16, 4), "f4")

    def step(table: Any, w: Any, rows: Any, labels: Any) -> Any:
        def loss(table: Any, w: Any) -> Any:
            found = table[rows] if weights == 1 else table[rows] * table[rows // 2]
            return jnp.mean((jnp.tanh(found @ w) - labels) ** 2)

        return jax.value_and_grad(loss, (0, 1))(table, w)

    args = (*random((jnp.zeros((32, 6), dtype), jnp.zeros((6, 4), dtype))), rows, labels)
    made, _ = cut(step, args, 4)
    assert worst(jax.jit(made)(*args), jax.jit(step)(*args)) < (
        1e-6 if dtype == "float32" else 0.02
    )
    (loop,) = (e for e in jax.make_jaxpr(made)(*args).eqns if e.primitive.name == "scan")
    adds = [e for e in loop.params["jaxpr"].eqns if e.primitive.name.startswith("add")]
    assert sum(e.outvars[0].aval.shape == (32, 6) for e in adds) == added


def test_recurrent_over_time_first_arrays() -> None:
    """The batch is the second dim of what the scan steps through."""
    params = random({"u": jax.ShapeDtypeStruct((4, 8), jnp.float32)})
    params["w"] = random(jax.ShapeDtypeStruct((8, 8), jnp.float32), 1)
    x = random(jax.ShapeDtypeStruct((8, 5, 4), jnp.float32))

    def loss(params: Any, x: Any) -> Any:
        def cell(h: Any, x: Any) -> Any:
            h = jnp.tanh(h @ params["w"] + x @ params["u"])
            return h, h.sum()

        h, ys = lax.scan(cell, jnp.zeros((x.shape[0], 8)), jnp.swapaxes(x, 0, 1))
        return h.mean() + 0.1 * ys.mean()

    agree(loss, params, x)


# Plans


def mlp(batch: int = 64) -> tuple[Callable[..., Any], Any]:
    params = {"a": jax.ShapeDtypeStruct((64, 512), jnp.float32)}
    params["b"] = jax.ShapeDtypeStruct((512, 64), jnp.float32)

    def train_step(params: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.mean((jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) - x) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    return train_step, (params, jax.ShapeDtypeStruct((batch, 64), jnp.float32))


def test_a_plan_in_microbatches_runs_and_says_so() -> None:
    fn, args = mlp()
    plan = autoshard.plan(fn, *args, cluster="cpu:8", microbatches=4)
    numbers = random(args)
    assert worst(plan.compile()(*numbers), jax.jit(fn)(*numbers)) < 1e-5
    assert "time      micro=4 over the batch" in str(plan)
    again = autoshard.Plan.from_json(plan.to_json(), fn, *args)
    assert worst(again.compile()(*numbers), jax.jit(fn)(*numbers)) < 1e-5
    assert again.to_json() == plan.to_json()


def test_the_decorator_takes_microbatches() -> None:
    fn, args = mlp()
    numbers = random(args)
    step = autoshard.parallelize(fn, cluster="cpu:8", microbatches=2)
    assert worst(step(*numbers), jax.jit(fn)(*numbers)) < 1e-5


def test_memory_falls_and_auto_takes_what_fits() -> None:
    fn, args = mlp(1 << 15)
    peaks = [
        autoshard.plan(fn, *args, cluster="h100:1", microbatches=m).cost.peak_memory
        for m in (1, 4, 16)
    ]
    assert peaks[0] > 2 * peaks[1] > 2 * peaks[2]
    limit = (peaks[0] + peaks[1]) / 2
    plan = autoshard.plan(fn, *args, cluster="h100:1", microbatches="auto", memory_limit=limit)
    assert plan.data.microbatches in (2, 4)
    assert plan.cost.peak_memory <= limit
    roomy = autoshard.plan(fn, *args, cluster="h100:1", microbatches="auto")
    assert roomy.data.microbatches == 1


def test_static_arguments_and_names() -> None:
    def fn(scale: int, x: Any, *, y: Any, mode: str) -> Any:
        return (x * y * scale).sum() if mode == "sum" else x

    x = jnp.arange(8.0)
    options = {"static_argnums": 0, "static_argnames": "mode"}
    traced = trace(fn, 3, x, y=x, mode="sum", **options)
    made, _ = in_steps_of(fn, traced, begun(traced, TimeAxis("micro", 4)), options)
    assert float(made(3, x, y=x, mode="sum")) == float((x * x * 3).sum())


# What can not be


@pytest.mark.parametrize("count", [0, -1, 2.0, "two", True])
def test_no_number_of_microbatches(count: Any) -> None:
    fn, args = mlp()
    with pytest.raises(ValueError, match="microbatches is a whole number from 1 on, or 'auto'"):
        autoshard.plan(fn, *args, cluster="cpu:8", microbatches=count)


def test_a_number_that_does_not_divide_names_the_nearest() -> None:
    fn, args = mlp(24)
    with pytest.raises(NoTimeLoop, match=r"24 .* cut into 7 .* nearest .* is 8|is 6"):
        autoshard.plan(fn, *args, cluster="cpu:8", microbatches=7)


def test_no_batch() -> None:
    def fn(x: Any) -> Any:
        return jnp.sort(x)

    with pytest.raises(NoTimeLoop, match="fn has no batch dimension"):
        autoshard.plan(fn, jnp.arange(8.0), cluster="cpu:8", microbatches=2)


def test_nothing_runs_in_steps() -> None:
    """A softmax over the batch couples everything."""

    def fn(x: Any, w: Any) -> Any:
        return jax.nn.softmax(x, axis=0) @ w

    with pytest.raises(NoTimeLoop, match=r"nothing of fn .* test_microbatches.py"):
        autoshard.plan(fn, jnp.ones((8, 4)), jnp.ones((4, 4)), cluster="cpu:8", microbatches=2)


def test_lines_stay_the_users() -> None:
    """Also of what jax traces once for all callers (a variance), and of the loop itself."""

    def fn(w: Any, x: Any) -> Any:
        return jnp.var(x @ w, axis=-1).mean()

    args = jnp.ones((4, 4)), jnp.ones((8, 4))
    made, _ = cut(fn, args, 2)
    graph = trace(made, *args).graph
    assert {op.source.split(":")[0] for op in graph.ops} == {"test_microbatches.py"}


def dropped_layers(ws: Any, x: jax.Array, kept: bool) -> jax.Array:
    """Layers under a scan, each with a mask that a kernel writes beside its result."""

    @jax.custom_vjp
    def together(y: jax.Array, mask: jax.Array) -> jax.Array:
        return lax.optimization_barrier((y, mask))[0]

    together.defvjp(
        lambda y, mask: (together(y, mask), None),
        lambda _, dy: (lax.optimization_barrier(dy), None),
    )

    def layer(x: jax.Array, given: Any) -> Any:
        w, seed = given
        place = lax.broadcasted_iota(jnp.uint32, x.shape, 0) * jnp.uint32(77) + seed
        place = (place ^ lax.broadcasted_iota(jnp.uint32, x.shape, 1)) * jnp.uint32(0x9E3779B1)
        mask = place > jnp.uint32(2**31)
        return together(jnp.where(mask, jnp.tanh(x @ w), 0.0), mask), None

    body = layer if kept else jax.checkpoint(layer)
    return jnp.mean(lax.scan(body, x, (ws, jnp.arange(len(ws), dtype=jnp.uint32)))[0] ** 2)


@pytest.mark.parametrize("kept", [False, True])
def test_masks_of_a_kernel_are_made_part_by_part(kept: bool) -> None:
    """Also where a barrier has them that nobody reads, and where the backward scan does."""
    ws, x = jnp.ones((3, 6, 6)) / 7, jnp.arange(48.0).reshape(8, 6) / 48

    def step(ws: jax.Array, x: jax.Array) -> Any:
        return jax.value_and_grad(lambda w: dropped_layers(w, x, kept))(ws)

    run, _ = cut(step, (ws, x), 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), run(ws, x), step(ws, x))
    masks = [v for v in trace(run, ws, x).graph.values if v.type.dtype == "bool" and v.shape]
    assert {v.shape for v in masks} <= {(2, 6), (3, 2, 6)}
