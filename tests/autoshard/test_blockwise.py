"""Huge values in blocks: the same numbers, whatever makes them.

The oracle is the function as it is, run by jax. That less is in memory, and plans, are for
test_blockwise_plans.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from jax import lax
from same_results import worst

from autoshard.blockwise import in_blocks
from autoshard.trace import trace
from passes.block_counts import Blocks, NoBlocks

pytestmark = pytest.mark.usefixtures("in_a_hurry")

SIZE = 64  # of a sequence


def cut(fn: Callable[..., Any], args: Any, count: int = 4) -> tuple[Callable[..., Any], str]:
    """The function in blocks, and its notes as one text."""
    made, notes = in_blocks(fn, trace(fn, *args), Blocks(count=count), {})
    return made, "\n".join(notes)


def agree(fn: Callable[..., Any], args: Any, count: int = 4, near: float = 1e-5) -> str:
    """In blocks it gives the same, and makes nothing large; the notes."""
    made, notes = cut(fn, args, count)
    assert 2 * largest(made, args) <= largest(fn, args)
    assert worst(jax.jit(made)(*args), jax.jit(fn)(*args)) < near
    return notes


def largest(fn: Callable[..., Any], args: Any) -> int:
    """Elements of the largest value that XLA has to store: what it can not fuse, or loops take."""
    graph = trace(fn, *args).graph
    stored = (op for op in graph.ops if not op.rule.fuses or op.is_link)
    values = (v for op in stored for v in (*op.outputs, *(op.inputs if op.is_link else ())))
    return max(graph.values[v].type.size for v in values)


def numbers(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 0.3, dtype)


def causal(scores: Any) -> Any:
    at = jnp.arange(scores.shape[-1])
    return jnp.where(at[:, None] >= at[None, :], scores, -jnp.inf)


def softmax_by_hand(scores: Any) -> Any:
    e = jnp.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# Attention: queries, keys and values of shape [batch, sequence, heads, features]


def plain(q: Any, k: Any, v: Any) -> Any:
    weights = softmax_by_hand(causal(jnp.einsum("bqhd,bkhd->bhqk", q, k)))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def tril(q: Any, k: Any, v: Any) -> Any:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def by_jax(q: Any, k: Any, v: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def grouped(q: Any, k: Any, v: Any) -> Any:
    b, s, h, d = q.shape
    q = q.reshape(b, s, h // 2, 2, d)
    weights = jax.nn.softmax(causal(jnp.einsum("bqgrd,bkgd->bgrqk", q, k[:, :, : h // 2])))
    return jnp.einsum("bgrqk,bkgd->bqgrd", weights, v[:, :, : h // 2]).reshape(b, s, h, d)


def additive(q: Any, k: Any, v: Any) -> Any:
    """Scores that no product makes."""
    scores = (jnp.tanh(q[:, :, None] + k[:, None]) * numbers(q.shape[-1], seed=6)).sum(-1)
    return jnp.einsum("bqkh,bkhd->bqhd", jax.nn.softmax(scores, axis=2), v)


def divided_late(q: Any, k: Any, v: Any) -> Any:
    """With positions that fade, and the division after the values."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    at = jnp.arange(scores.shape[-1])
    scores = causal(scores - 0.1 * (at[:, None] - at[None, :]))
    top = lax.stop_gradient(scores.max(-1))
    e = jnp.exp(scores - top[..., None])
    return jnp.einsum("bhqk,bkhd->bqhd", e, v) / e.sum(-1).transpose(0, 2, 1)[..., None]


def saved_by_policy(q: Any, k: Any, v: Any) -> Any:
    return jax.checkpoint(plain, policy=jax.checkpoint_policies.dots_saveable)(q, k, v)


def repeated(q: Any, k: Any, v: Any) -> Any:
    return lax.fori_loop(0, 3, lambda _, x: jnp.tanh(plain(x, k, v)), q)


ATTENTIONS = [by_jax, grouped, additive, divided_late, saved_by_policy, repeated]


def loss_of(attention: Callable[..., Any]) -> Callable[..., Any]:
    """A loss behind a product, so that there is a way round, and its gradients."""

    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.mean(jnp.tanh(attention(q, k, v) @ numbers(q.shape[-1], 4, seed=9)) ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


@pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda f: f.__name__)
def test_attention_and_its_gradients(attention: Callable[..., Any]) -> None:
    args = [numbers(2, SIZE, 2, 8, seed=k) for k in range(3)]
    notes = agree(loss_of(attention), args)
    assert "in 4 blocks along its dim" in notes
    assert "test_blockwise.py" in notes


def test_attention_in_bfloat16() -> None:
    args = [numbers(2, SIZE, 2, 8, seed=k, dtype=jnp.bfloat16) for k in range(3)]
    agree(loss_of(plain), args, near=2e-2)


def test_a_mask_and_segments_that_are_given() -> None:
    def loss(q: Any, k: Any, v: Any, mask: Any, ids: Any) -> Any:
        same = ids[:, :, None] == ids[:, None, :]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        weights = jax.nn.softmax(jnp.where((mask & same)[:, None], scores, -1e9))
        return jnp.mean(jnp.tanh(jnp.einsum("bhqk,bkhd->bqhd", weights, v) @ numbers(8, 4)))

    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.random((SIZE, SIZE)) < 0.5)
    ids = jnp.asarray(rng.integers(0, 3, (2, SIZE)))
    args = [*(numbers(2, SIZE, 2, 8, seed=k) for k in range(3)), mask, ids]
    agree(jax.value_and_grad(loss, argnums=(0, 1, 2)), args)


def test_without_a_way_round_there_is_one_loop() -> None:
    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.mean(plain(q, k, v) ** 2)

    args = [numbers(2, SIZE, 2, 8, seed=k) for k in range(3)]
    notes = agree(jax.value_and_grad(loss, argnums=(0, 1, 2)), args)
    assert "1 loop" in notes
    assert "computed again" not in notes
    assert "2 loops" in cut(loss_of(plain), args)[1]


def test_in_a_branch_and_in_a_while_loop() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        x = lax.cond(q.sum() > 0, plain, lambda q, k, v: q + v, q, k, v)
        return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, plain(c[1], k, v)), (0, x))

    args = [numbers(2, SIZE, 2, 8, seed=k) for k in range(3)]
    assert "2 loops" in agree(fn, args)


@settings(deadline=None, max_examples=4)
@drawn(
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from([(30, 5), (30, 6), (35, 7), (32, 32), (48, 2)]),
    st.integers(1, 4),
    st.sampled_from([plain, tril, grouped]),
)
def test_any_shape(
    batch: int,
    heads: int,
    blocks: tuple[int, int],
    features: int,
    attention: Callable[..., Any],
) -> None:
    args = [numbers(batch, blocks[0], 2 * heads, features, seed=k) for k in range(3)]
    agree(loss_of(attention), args, blocks[1])


# Cross entropies over a vocabulary


def taken(logits: Any, labels: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()


def one_hot(logits: Any, labels: Any) -> Any:
    return -(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, logits.shape[-1])).sum(-1).mean()


def by_number(logits: Any, labels: Any) -> Any:
    flat = jax.nn.log_softmax(logits.reshape(-1, logits.shape[-1]))
    return -flat[jnp.arange(flat.shape[0]), labels.reshape(-1)].mean()


def by_two_numbers(logits: Any, labels: Any) -> Any:
    rows, columns = (jnp.arange(n) for n in labels.shape)
    return -jax.nn.log_softmax(logits)[rows[:, None], columns, labels].mean()


def masked(logits: Any, labels: Any) -> Any:
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    counts = labels > 20
    return (each * counts).sum() / counts.sum() + 1e-3 * jax.nn.logsumexp(logits, -1).mean() ** 2


def last_cut_off(logits: Any, labels: Any) -> Any:
    """Each token's label is the next token; cut off the huge value, which divides, as it is."""
    return taken(logits.astype(jnp.float32)[:, :-1, :250], labels[:, 1:] % 250)


@pytest.mark.parametrize(
    "entropy", [last_cut_off, one_hot, by_number, by_two_numbers, masked], ids=lambda f: f.__name__
)
def test_cross_entropy(entropy: Callable[..., Any]) -> None:
    def loss(x: Any, w: Any, labels: Any) -> Any:
        return entropy(x @ w, labels)

    size = SIZE + (entropy is last_cut_off)
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, size)))
    args = (numbers(2, size, 16), numbers(16, 256, seed=1), labels)
    assert "1 loop" in agree(jax.value_and_grad(loss, argnums=(0, 1)), args) or entropy is masked


def test_feed_forward() -> None:
    def loss(x: Any, a: Any, b: Any, c: Any) -> Any:
        y = (jax.nn.silu(x @ a) * (x @ b)) @ c
        return jnp.mean(jnp.tanh(jax.nn.gelu(y @ a) @ c @ numbers(16, 16)) ** 2)

    args = (numbers(2, 128, 16), *(numbers(16, 64, seed=k) for k in (1, 2)), numbers(64, 16))
    notes = agree(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), args)
    assert "computed again, block by block" in notes


# Whole models


def gpt(params: Any, tokens: Any, scanned: bool, remat: bool, mask: Any = None) -> Any:
    """Its logits. params: layers stacked up."""

    def norm(x: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def layer(x: Any, p: Any) -> Any:
        b, s, d = x.shape
        q, k, v = jnp.split((norm(x) @ p["qkv"]).reshape(b, s, 2, -1), 3, -1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        seen = jnp.tril(jnp.ones((s, s), bool)) if mask is None else mask
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
        x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, s, d) @ p["o"]
        return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"], None

    if remat:
        layer = jax.checkpoint(layer)
    x = params["embed"][tokens]
    if scanned:
        x, _ = lax.scan(layer, x, params["layers"])
    else:
        for k in range(2):
            x, _ = layer(x, jax.tree.map(lambda w, k=k: w[k], params["layers"]))
    return norm(x) @ params["embed"].T


def gpt_params() -> Any:
    shapes = {"qkv": (16, 48), "o": (16, 16), "up": (16, 64), "down": (64, 16)}
    layers = {n: numbers(2, *shape, seed=k) for k, (n, shape) in enumerate(shapes.items())}
    return {"embed": numbers(256, 16, seed=7), "layers": layers}


def gpt_step(scanned: bool, remat: bool) -> Callable[..., Any]:
    def step(params: Any, tokens: Any, mask: Any = None) -> Any:
        def loss(params: Any) -> Any:
            logits = gpt(params, tokens[:, :-1], scanned, remat, mask)
            return taken(logits.astype(jnp.float32), tokens[:, 1:])

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g.astype(p.dtype), params, grads), value

    return step


def some_tokens(size: int = 2 * SIZE) -> Any:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, size + 1)))


def test_blocks_that_do_not_divide() -> None:
    """A sequence of prime length, in blocks of which the last rows are past its end."""
    size = 67
    fn, args = gpt_step(scanned=True, remat=True), (gpt_params(), some_tokens(size))
    made, notes = in_blocks(fn, trace(fn, *args), Blocks(nbytes=2 * size**2 * 4 // 7), {})
    assert any(f"f32[1,2,{size},{size}]" in n and "in 8 blocks along its dim 2" in n for n in notes)
    assert worst(jax.jit(made)(*args), jax.jit(fn)(*args)) < 1e-5


@pytest.mark.parametrize(
    ("scanned", "remat", "given"),
    [(False, True, False), (True, False, True)],
    ids=["unrolled, remat", "scanned, mask given"],
)
def test_gpt(scanned: bool, remat: bool, given: bool) -> None:
    mask = jnp.asarray(np.random.default_rng(1).random((2 * SIZE, 2 * SIZE)) < 0.5)
    args = (gpt_params(), some_tokens(), *([mask] * given))
    notes = agree(gpt_step(scanned, remat), args)
    for huge in ("f32[1,2,128,128]", "f32[1,128,256]", "f32[1,128,64]"):
        assert f"{huge} of dot_general" in notes


def test_flax_with_dropout() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            embed = nn.Embed(256, 16)
            x, mask = embed(tokens), nn.make_causal_mask(tokens)
            attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.2, deterministic=False)
            x = x + attention(nn.LayerNorm()(x), mask=mask)
            return embed.attend(x + nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))))

    tokens, key = some_tokens()[:, :-1], jax.random.key(0)
    shapes = jax.eval_shape(Model().init, {"params": key, "dropout": key}, tokens)
    params = jax.tree.map(lambda p: numbers(*p.shape), shapes)

    def loss(params: Any, tokens: Any, key: Any) -> Any:
        return taken(Model().apply(params, tokens, rngs={"dropout": key}), tokens)

    agree(jax.value_and_grad(loss), (params, tokens, key), near=1e-4)


# What can not be


def refusal(fn: Callable[..., Any], args: Sequence[Any], count: int) -> str:
    with pytest.raises(NoBlocks) as error:
        cut(fn, args, count)
    return str(error.value)


def test_a_count_that_does_not_divide_names_the_nearest() -> None:
    args = [numbers(1, 30, 2, 2, seed=k) for k in range(3)]
    assert "into 7 blocks along its dim 2 of 30; the nearest number that divides is 6" in refusal(
        loss_of(plain), args, 7
    )


def test_nothing_is_huge() -> None:
    assert "nothing in <lambda> is much larger" in refusal(lambda x: jnp.sin(x), [numbers(8)], 2)


def test_what_needs_all_of_it_is_named() -> None:
    def fn(x: Any) -> Any:
        return jnp.sort((x @ x.T).reshape(-1)).reshape(64, 64) @ x

    assert "sort at test_blockwise.py" in refusal(fn, [numbers(64, 4)], 2)


def test_what_prints_goes_on_printing(capsys: pytest.CaptureFixture[str]) -> None:
    def fn(x: Any) -> Any:
        y = jnp.tanh(x @ x.T) @ x
        jax.debug.print("sum {}", y.sum())
        return y

    agree(fn, [numbers(64, 4)])
    jax.effects_barrier()
    assert capsys.readouterr().out.count("sum") == 2


def test_what_hands_out_huge_values_gains_nothing() -> None:
    def fn(x: Any) -> Any:
        return jnp.exp(x @ x.T)

    assert "there are no blocks" in refusal(fn, [numbers(64, 4)], 2)
