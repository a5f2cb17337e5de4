"""Do the models of examples/zoo.py trace without memory, and compute what they say?"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params


def load(name: str) -> Any:
    path = Path(__file__).parents[1] / "examples" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = load("zoo.py")

# The same models, small enough to run here.
SMALL: dict[str, Callable[[], Any]] = {
    "mlp": lambda: zoo.mlp(width=16, layers=2, batch=8),
    "gpt_block": lambda: zoo.gpt_block(width=16, heads=2, sequence=8, batch=2),
    "gpt_unrolled": lambda: gpt(scan=False),
    "gpt_scan_remat_bf16": lambda: gpt(scan=True, remat=True, dtype=jnp.bfloat16),
    "gpt_decode": lambda: zoo.gpt_decode(width=16, layers=2, heads=2, context=8, batch=2),
    "llama_unrolled": lambda: zoo.llama_unrolled(2, 16, 4, 2, 32, 8, 2, 64),
    "long_attention": lambda: zoo.long_attention(sequence=16, width=16, heads=2, block=4),
    "video_transformer": lambda: zoo.video_transformer(1, 4, 4, 16, 2),
    "moe_layer": lambda: zoo.moe_layer(experts=4, groups=2, tokens=8, width=16, hidden=32),
    "dlrm": lambda: zoo.dlrm(batch=8, width=4, rows=(10, 300)),
    "conv_net": lambda: zoo.conv_net(blocks=2, channels=4, side=6, batch=4),
}


def gpt(**options: Any) -> Any:
    return zoo.gpt(width=16, layers=2, heads=2, sequence=8, batch=2, vocab=64, **options)


def run(fn: Callable[..., Any], *args: Any) -> Any:
    """Compiled in a hurry: these programs run once."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(fn, compiler_options=options)(*args)


def equations(jaxpr: Any) -> int:
    """How many operations, loop bodies counted once, calls of sub-programs looked into."""
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inner = list(jaxprs_in_params(eqn.params))
        total += sum(map(equations, inner)) if inner else 1
    return total


@pytest.mark.parametrize("name", sorted(zoo.JOBS))
def test_every_job_traces_and_holds_no_array(name: str) -> None:
    fn, args = zoo.JOBS[name]()
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(args))
    out = jax.eval_shape(fn, *args)
    if isinstance(args[0], dict) and set(args[0]) == {"params", "opt"}:
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), args[0], out[0])
        assert jax.tree.all(same), "a train step's new state must look like the old one"
        assert out[1].shape == ()


@pytest.mark.parametrize("name", sorted(SMALL))
def test_small_sizes_run_and_stay_finite(name: str) -> None:
    fn, args = SMALL[name]()
    out = run(fn, *zoo.filled(args))
    for leaf in jax.tree.leaves(out):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))


@pytest.mark.parametrize(
    ("job", "least", "most"),
    [("gpt2_small_unrolled", 5000, 7000), ("gpt2_small_scan", 400, 1000), ("gpt_1p3b", 400, 1200)],
)
def test_equation_counts_are_what_the_benchmarks_rely_on(job: str, least: int, most: int) -> None:
    fn, args = zoo.JOBS[job]()
    assert least < equations(jax.jit(fn).trace(*args).jaxpr) < most


def test_gpt_1p3b_has_its_parameters() -> None:
    _, (state, _) = zoo.gpt_1p3b()
    count = sum(p.size for p in jax.tree.leaves(state["params"]))
    assert 1.30e9 < count < 1.33e9  # 24 (12 d^2) + 50304 d + 2048 d, d = 2048


def test_scan_and_loop_are_the_same_model() -> None:
    looped, (state, tokens) = gpt()
    scanned, _ = gpt(scan=True)
    state = zoo.filled(state)

    def stack(tree: Any) -> Any:
        if isinstance(tree, dict) and "layers" in tree:
            return {**tree, "layers": jax.tree.map(lambda *x: jnp.stack(x), *tree["layers"])}
        return tree

    opt = jax.tree.map(stack, state["opt"], is_leaf=lambda t: isinstance(t, dict))
    tokens = zoo.filled(tokens)
    one, loop_loss = run(looped, state, tokens)
    two, scan_loss = run(scanned, {"params": stack(state["params"]), "opt": opt}, tokens)
    np.testing.assert_allclose(loop_loss, scan_loss, rtol=1e-6)
    np.testing.assert_allclose(
        stack(one["params"])["layers"]["wq"], two["params"]["layers"]["wq"], rtol=1e-4, atol=1e-6
    )


def test_blockwise_attention_equals_plain_attention() -> None:
    whole, args = zoo.long_attention(sequence=16, width=16, heads=2)
    blocks, _ = zoo.long_attention(sequence=16, width=16, heads=2, block=4)
    params, x = zoo.filled(args)
    x = x.astype(jnp.float32)
    for a, b in zip(
        jax.tree.leaves(run(whole, params, x)), jax.tree.leaves(run(blocks, params, x)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_experts_with_room_for_all_equal_a_dense_sum() -> None:
    experts, width = 4, 8
    fn, args = zoo.moe_layer(experts, 2, 6, width, 16, picks=experts)
    params, x = zoo.filled(args)
    gates = jax.nn.softmax(x @ params["router"])
    hidden = jax.nn.gelu(jnp.einsum("gtm,emh->gteh", x, params["w1"]))
    expected = x + jnp.einsum("gte,gteh,ehm->gtm", gates, hidden, params["w2"])
    loss, _ = run(fn, params, x)
    np.testing.assert_allclose(loss, jnp.mean(jnp.square(expected)), rtol=1e-5)


def test_a_decoded_token_writes_only_its_place_in_the_cache() -> None:
    fn, args = SMALL["gpt_decode"]()
    params, cache, token, _ = zoo.filled(args)
    _, after = run(fn, params, cache, token, jnp.int32(3))
    changed = np.any(np.asarray(after["k"] != cache["k"]), axis=(0, 1, 3, 4))
    assert changed.tolist() == [False, False, False, True, False, False, False, False]
