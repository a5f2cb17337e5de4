"""Plans in blocks: less memory, what is asked for and said, and a sequence that fits nowhere whole.

That the numbers stay is for test_blockwise.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import autoshard
from autoshard import cli
from autoshard.blockwise import in_blocks
from autoshard.trace import trace
from passes.block_counts import Blocks

typer_testing = pytest.importorskip("typer.testing")


def attention(size: int = 512, batch: int = 1) -> tuple[Callable[..., Any], Any]:
    """A training step of one attention, whose scores are far larger than all else."""
    params = {"qkv": jax.ShapeDtypeStruct((16, 48), jnp.float32)}
    params["out"] = jax.ShapeDtypeStruct((16, 16), jnp.float32)

    def train_step(params: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            q, k, v = jnp.split((x @ params["qkv"]).reshape(*x.shape[:2], 2, 24), 3, -1)
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
            mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
            weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ params["out"]
            return jnp.mean((jnp.tanh(y) - x) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    return train_step, (params, jax.ShapeDtypeStruct((batch, size, 16), jnp.float32))


def filled(args: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), args)


def near(got: Any, want: Any) -> bool:
    same = jax.tree.map(lambda x, y: bool(jnp.allclose(x, y, 1e-4, 1e-6)), got, want)
    return all(jax.tree.leaves(same))


# Memory


def test_less_memory_in_more_blocks_as_compiled_and_as_predicted() -> None:
    fn, args = attention(1024)
    compiled = []
    for count in (1, 4, 16):
        made = in_blocks(fn, trace(fn, *args), Blocks(count=count), {})[0] if count > 1 else fn
        stats = jax.jit(made).lower(*args).compile().memory_analysis()
        compiled.append(stats.temp_size_in_bytes)
    predicted = [
        autoshard.plan(fn, *args, cluster="h100:1", blockwise=b).cost.peak_memory
        for b in (None, 4, 16)
    ]
    for peaks in (compiled, predicted):
        assert peaks[0] > 2 * peaks[1] > 4 * peaks[2]


# Plans


def test_a_plan_in_blocks_runs_says_so_and_is_read_back() -> None:
    fn, args = attention()
    plan = autoshard.plan(fn, *args, cluster="cpu:8", blockwise=4)
    assert re.search(r"f32\[1,2,512,512\] of\s+dot_general at test_blockwise_plans.py", str(plan))
    assert "in 4 blocks along its dim 2, 2 loops" in plan.data.notes[0]
    assert "computed again" in plan.data.notes[1]
    values = filled(args)
    want = jax.jit(fn)(*values)
    assert near(plan.compile()(*values), want)
    again = autoshard.Plan.from_json(plan.to_json(), fn, *args)
    assert again.to_json() == plan.to_json()
    assert json.loads(plan.to_json())["blocks"] == 4


def test_auto_takes_what_fits() -> None:
    fn, args = attention(2048)
    whole = autoshard.plan(fn, *args, cluster="h100:1", blockwise="auto")
    assert not whole.data.block_bytes
    limit = whole.cost.peak_memory / 8
    plan = autoshard.plan(fn, *args, cluster="h100:1", blockwise="auto", memory_limit=limit)
    assert plan.data.block_bytes
    assert plan.cost.peak_memory <= limit
    again = autoshard.Plan.from_json(plan.to_json(), fn, *args)
    assert again.to_json() == plan.to_json()
    with pytest.raises(autoshard.NoFeasiblePlan, match="blockwise='auto'"):
        autoshard.plan(fn, *args, cluster="h100:1", memory_limit=limit)


def test_no_word_on_blocks_where_nothing_is_huge() -> None:
    with pytest.raises(autoshard.NoFeasiblePlan) as error:
        autoshard.plan(lambda x: x + 1, jnp.ones(1 << 20), cluster="h100:1", memory_limit=1 << 20)
    assert "blockwise=" not in str(error.value)


def test_with_microbatches_and_the_decorator() -> None:
    fn, args = attention(64, 8)
    values = filled(args)
    step = autoshard.parallelize(fn, cluster="cpu:8", microbatches=2, blockwise=2)
    assert near(step(*values), jax.jit(fn)(*values))
    notes = "\n".join(step.plan(*values).data.notes)
    assert "micro=2 runs over the batch" in notes
    assert "in 2 blocks" in notes


@pytest.mark.parametrize("count", [0, -1, 2.0, "two", True])
def test_no_number_of_blocks(count: Any) -> None:
    fn, args = attention()
    with pytest.raises(ValueError, match="blockwise is a whole number from 1 on, or 'auto'"):
        autoshard.plan(fn, *args, cluster="cpu:8", blockwise=count)


def test_not_with_stages() -> None:
    fn, args = attention(64, 8)
    with pytest.raises(ValueError, match="blockwise does not go with stages"):
        autoshard.plan(fn, *args, cluster="cpu:8", blockwise=2, stages=2)


def test_the_command(tmp_path: Any) -> None:
    file = tmp_path / "train.py"
    file.write_text(
        "import jax.numpy as jnp\n"
        "def job():\n"
        "    return lambda x: jnp.tanh(x @ x.T) @ x, (jnp.ones((64, 4)),)\n"
    )
    run = typer_testing.CliRunner().invoke
    told = run(cli.app, ["plan", f"{file}:job", "--cluster", "cpu:8", "--blockwise", "4"])
    assert told.exit_code == 0
    assert "in 4 blocks" in told.output
    refused = run(cli.app, ["plan", f"{file}:job", "--cluster", "cpu:8", "--blockwise", "5"])
    assert refused.exit_code == 2


# A sequence of 131,072


def long_gpt(layers: int) -> tuple[Callable[..., Any], Any]:
    """A GPT of width 768 with layers one by one, written without a thought of its length."""
    size, width, heads, words = 131072, 768, 12, 50304

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    layer = {
        "qkv": array(width, 3 * width),
        "out": array(width, width),
        "up": array(width, 4 * width),
        "down": array(4 * width, width),
    }
    params = {"embed": array(words, width), "place": array(size, width), "layers": [layer] * layers}

    def norm(x: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def attend(x: Any, p: Any) -> Any:
        b, s, d = x.shape
        q, k, v = ((x @ w).reshape(b, s, heads, -1) for w in jnp.split(p["qkv"], 3, -1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8
        scores = jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, -1e9)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(b, s, d) @ p["out"]

    def train_step(params: Any, tokens: Any) -> Any:
        def loss(params: Any) -> Any:
            x = params["embed"][tokens[:, :-1]] + params["place"]
            for p in params["layers"]:
                x = x + attend(norm(x), p)
                x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
            logits = jax.nn.log_softmax(norm(x) @ params["embed"].T)
            return -jnp.take_along_axis(logits, tokens[:, 1:, None], -1).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    return train_step, (params, jax.ShapeDtypeStruct((1, size + 1), jnp.int32))


def test_a_sequence_that_fits_nowhere_whole_is_planned() -> None:
    fn, args = long_gpt(3)
    with pytest.raises(autoshard.NoFeasiblePlan, match="blockwise='auto'"):
        autoshard.plan(fn, *args, cluster="tpu-v5e:4x4", donate_argnums=0)
    for solver in ("ilp", "fsdp"):
        plan = autoshard.plan(
            fn, *args, cluster="tpu-v5e:4x4", donate_argnums=0, blockwise="auto", solver=solver
        )
        assert plan.cost.peak_memory < 8e9
        assert "f32[1,12,131072,131072]" in plan.data.notes[0]


@pytest.mark.slow
@pytest.mark.libtpu
def test_a_sequence_that_fits_nowhere_whole_is_compiled() -> None:
    fn, args = long_gpt(1)
    plan = autoshard.plan(fn, *args, cluster="tpu-v5e:4x4", donate_argnums=0, blockwise="auto")
    verified = plan.verify()
    assert verified.fits
    assert verified.compiled.memory.peak < 16e9
    assert 0.7 < plan.cost.peak_memory / verified.compiled.memory.peak < 1.4
