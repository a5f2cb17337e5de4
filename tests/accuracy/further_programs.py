"""More programs in plain JAX, of families that others write otherwise.

No constant was fitted to them. `PROGRAMS[name]()` gives `(fn, args)`, as in accuracy_programs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import optax
from library_programs import next_token, tokens, train
from zoo import Job, Tree, shape, shapes, stacked

BF16 = jnp.bfloat16


def gshard_moe(layers: int = 4, batch: int = 32, length: int = 512) -> Job:
    """Tokens that each take their best two experts, as in GShard (arXiv 2006.16668)."""
    width, experts, hidden, heads, vocabulary = 1024, 8, 4096, 16, 16000
    room = 2 * length // experts * 2
    one = shapes(ln1=(width,), ln2=(width,), qkv=(width, 3 * width), o=(width, width))
    one |= shapes(router=(width, experts), w1=(experts, width, hidden))
    one |= shapes(w2=(experts, hidden, width))
    params: Tree = {"emb": shape(vocabulary, width), "layers": [one] * layers}
    params |= shapes(out=(width, vocabulary))

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        return (y * jax.lax.rsqrt((y.var(-1, keepdims=True)) + 1e-5) * scale).astype(BF16)

    def placed(taken: jax.Array, place: jax.Array) -> jax.Array:
        inside = (taken * (place < room))[..., None]
        return inside * jax.nn.one_hot(place.astype(jnp.int32), room)

    def routed(gates: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights [batch, token, expert, place], and the loss that balances the experts."""
        first = jax.nn.one_hot(jnp.argmax(gates, -1), experts)
        second = jax.nn.one_hot(jnp.argmax(gates * (1 - first), -1), experts)
        balance = (gates.mean(1) * first.mean(1)).sum(-1).mean() * experts
        place1 = (jnp.cumsum(first, 1) - first) * first
        place2 = ((jnp.cumsum(second, 1) - second) + first.sum(1, keepdims=True)) * second
        weight1, weight2 = (gates * first).sum(-1), (gates * second).sum(-1)
        out = weight1[..., None, None] * placed(first, place1)
        return out + weight2[..., None, None] * placed(second, place2), balance

    def layer(p: Tree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = norm(x, p["ln1"])
        q, k, v = (
            t.reshape(*t.shape[:2], heads, -1) for t in jnp.split(y @ p["qkv"].astype(BF16), 3, -1)
        )
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.reshape(x.shape) @ p["o"].astype(BF16)
        y = norm(x, p["ln2"])
        weights, balance = routed(jax.nn.softmax(y.astype(jnp.float32) @ p["router"]))
        weights = weights.astype(BF16)
        z = jnp.einsum("bsec,bsm->ebcm", (weights > 0).astype(BF16), y)
        z = jax.nn.relu(jnp.einsum("ebcm,emf->ebcf", z, p["w1"].astype(BF16)))
        z = jnp.einsum("ebcf,efm->ebcm", z, p["w2"].astype(BF16))
        return x + jnp.einsum("ebcm,bsec->bsm", z, weights), balance

    def loss(params: Tree, text: jax.Array) -> jax.Array:
        x, total = params["emb"][text].astype(BF16), jnp.zeros(())
        for p in params["layers"]:
            x, balance = layer(p, x)
            total = total + balance
        return next_token(x @ params["out"].astype(BF16), text) + 0.01 * total

    return train(loss, optax.adam(1e-3), params, tokens(batch, length))


def dlrm_alike(rows: int = 200_000, tables: int = 8, batch: int = 16384) -> Job:
    """DLRM (arXiv 1906.00091) of tables of one size, with adagrad."""
    width = 64
    pairs = tables * (tables + 1) // 2
    bottom, top = (13, 512, 256, width), (width + pairs, 1024, 512, 1)
    params: Tree = {"tables": [shape(rows, width)] * tables}
    params["bottom"] = [shape(a, b) for a, b in pairwise(bottom)]
    params["top"] = [shape(a, b) for a, b in pairwise(top)]

    def network(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        for w in weights[:-1]:
            x = jax.nn.relu(x @ w)
        return x @ weights[-1]

    def loss(params: Tree, batch: Tree) -> jax.Array:
        x = jax.nn.relu(network(params["bottom"], batch["dense"]))
        picked = [jnp.take(t, batch["ids"][:, i], axis=0) for i, t in enumerate(params["tables"])]
        every = jnp.stack([x, *picked], 1)
        i, j = jnp.triu_indices(tables + 1, 1)
        crossed = jnp.einsum("bid,bjd->bij", every, every)[:, i, j]
        score = network(params["top"], jnp.concatenate([x, crossed], -1))[:, 0]
        return optax.sigmoid_binary_cross_entropy(score, batch["label"]).mean()

    data = {"dense": shape(batch, 13), "label": shape(batch)}
    data["ids"] = shape(batch, tables, dtype=jnp.int32)
    return train(loss, optax.adagrad(0.01), params, data)


def chunk_retnet(layers: int = 4, batch: int = 16, length: int = 4096, chunk: int = 256) -> Job:
    """Retention by chunks that hand on a state (arXiv 2307.08621, section 2.3): a scan of scans."""
    width, heads, vocabulary = 1024, 8, 8192
    one = shapes(qkv=(width, 3, width), g=(width, width), o=(width, width))
    one |= shapes(n1=(width,), n2=(width,), up=(width, 2 * width), down=(2 * width, width))
    params: Tree = {"emb": shape(vocabulary, width), "layers": stacked(one, layers)}
    decay = 1 - 2.0 ** (-5 - jnp.arange(heads))

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        square = (x.astype(jnp.float32) ** 2).mean(-1, keepdims=True)
        return (x * jax.lax.rsqrt(square + 1e-6) * scale).astype(BF16)

    def retention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q, k, v: [batch, chunk, place, head, feature]."""
        i = jnp.arange(chunk)
        powers = decay[:, None, None] ** (i[:, None] - i)
        mask = jnp.where(i[:, None] >= i, powers, 0.0).astype(BF16)
        given = (decay ** (i[:, None] + 1))[None, :, :, None].astype(BF16)
        left = (decay ** (chunk - 1 - i[:, None]))[None, :, :, None].astype(BF16)

        def step(state: jax.Array, qkv: Any) -> tuple[jax.Array, jax.Array]:
            q, k, v = qkv
            inner = jnp.einsum("bqhd,bkhd->bhqk", q, k) * mask
            out = jnp.einsum("bhqk,bkhd->bqhd", inner, v)
            out = out + jnp.einsum("bqhd,bhde->bqhe", q, state.astype(BF16)) * given
            added = jnp.einsum("bkhd,bkhe->bhde", k * left, v).astype(jnp.float32)
            return state * (decay**chunk)[None, :, None, None] + added, out

        first = jnp.zeros((batch, heads, width // heads, width // heads), jnp.float32)
        _, out = jax.lax.scan(step, first, tuple(jnp.moveaxis(t, 1, 0) for t in (q, k, v)))
        return jnp.moveaxis(out, 0, 1).reshape(batch, length, width)

    def layer(x: jax.Array, p: Tree) -> tuple[jax.Array, None]:
        y = norm(x, p["n1"])
        qkv = jnp.einsum("bsw,wcv->cbsv", y, p["qkv"].astype(BF16))
        out = retention(*qkv.reshape(3, batch, length // chunk, chunk, heads, -1))
        x = x + (out * jax.nn.silu(y @ p["g"].astype(BF16))) @ p["o"].astype(BF16)
        y = norm(x, p["n2"])
        return x + jax.nn.gelu(y @ p["up"].astype(BF16)) @ p["down"].astype(BF16), None

    def loss(params: Tree, text: jax.Array) -> jax.Array:
        x = params["emb"][text].astype(BF16)
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
        return next_token(x @ params["emb"].T.astype(BF16), text)

    return train(loss, optax.adamw(1e-3), params, tokens(batch, length))


def long_queries(layers: int = 2, length: int = 32768, block: int = 1024) -> Job:
    """Gradients through attention that maps over blocks of queries, each computed again."""
    width, heads = 1024, 8
    one = shapes(qkv=(width, 3 * width), o=(width, width), up=(width, 4 * width))
    one |= shapes(down=(4 * width, width))
    params = [{name: shape(*w.shape, dtype=BF16) for name, w in one.items()}] * layers

    def layer(p: Tree, x: jax.Array) -> jax.Array:
        q, k, v = (
            t.reshape(1, length, heads, width // heads) for t in jnp.split(x @ p["qkv"], 3, -1)
        )

        @jax.checkpoint
        def rows(q: jax.Array) -> jax.Array:
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32)
            weights = jax.nn.softmax(scores * (width // heads) ** -0.5).astype(BF16)
            return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

        blocks = q.reshape(1, length // block, block, heads, width // heads).swapaxes(0, 1)
        mixed = jax.lax.map(rows, blocks).swapaxes(0, 1).reshape(1, length, width)
        x = x + mixed @ p["o"]
        return x + jax.nn.gelu(x @ p["up"]) @ p["down"]

    def loss(params: list[Tree], x: jax.Array) -> jax.Array:
        for p in params:
            x = layer(p, x)
        return (x.astype(jnp.float32) ** 2).mean()

    return jax.value_and_grad(loss), (params, shape(1, length, width, dtype=BF16))


PROGRAMS: dict[str, Callable[[], Job]] = {
    "gshard_moe": gshard_moe,
    "dlrm_alike": dlrm_alike,
    "chunk_retnet": chunk_retnet,
    "long_queries": long_queries,
}
