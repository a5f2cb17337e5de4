"""Programs on which predictions are held against compilers: train steps and forward passes.

Sized so that a compiler takes a minute at most; the shapes of a device's share are those of real
runs. `PROGRAMS[name]()` gives `(fn, args)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import zoo
from zoo import Job, Tree, Use, as_it_is, heads_of, layer_norm, rms_norm, shape, shapes, stacked

BF16 = jnp.bfloat16


def forward_only(job: Job) -> Job:
    """The loss of a train job, without its gradient: what evaluation runs."""
    step, (state, batch) = job

    def loss(params: Any, batch: Any) -> jax.Array:
        _, value = step({"params": params, "opt": zeros(state["opt"])}, batch)
        assert isinstance(value, jax.Array)
        return value

    return loss, (state["params"], batch)


def zeros(tree: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)


def vit(
    width: int = 1024,
    layers: int = 6,
    heads: int = 16,
    side: int = 224,
    batch: int = 256,
    use: Use = as_it_is,
) -> Job:
    """ViT-L's layers (arXiv 2010.11929) on patches of 14 x 14, mean-pooled; bf16 over f32."""
    patch, count = 14, (side // 14) ** 2
    one = zoo.gpt_layer_params(width, 4 * width)
    params: Tree = shapes(patch=(patch * patch * 3, width), position=(count, width))
    params |= {"layers": stacked(one, layers), "head": shape(width, 1000)}
    params |= shapes(scale=(width,), bias=(width,))

    def layer(x: jax.Array, p: Tree) -> tuple[jax.Array, None]:
        return zoo.gpt_layer(p, x, heads, causal=False, use=use), None

    def loss_of(params: Tree, batch: Tree) -> jax.Array:
        image = batch["image"]
        rows = image.reshape(image.shape[0], side // patch, patch, side // patch, patch, 3)
        x = rows.swapaxes(2, 3).reshape(image.shape[0], count, -1).astype(BF16)
        x = x @ use(params["patch"].astype(BF16), "patch") + params["position"].astype(BF16)
        x, _ = jax.lax.scan(layer, use(x, "stream"), params["layers"])
        x = layer_norm(x, params["scale"], params["bias"]).mean(axis=1)
        return zoo.next_token_loss(x @ use(params["head"], "head"), batch["label"])

    data = {"image": shape(batch, side, side, 3), "label": shape(batch, dtype=jnp.int32)}
    return zoo.train_job(loss_of, params, data)


def retnet(
    width: int = 2048, layers: int = 4, heads: int = 8, sequence: int = 2048, batch: int = 16
) -> Job:
    """Retention in its parallel form (arXiv 2307.08621, eq. 5): decay instead of softmax."""
    square, hidden = (width, width), 2 * width
    one = shapes(wq=square, wk=square, wv=(width, hidden), wg=(width, hidden), wo=(hidden, width))
    one |= shapes(w1=(width, hidden), w2=(hidden, width), scale1=(width,), scale2=(width,))
    params: Tree = shapes(embed=(32000, width), scale=(width,))
    params["layers"] = stacked(one, layers)

    def layer(x: jax.Array, p: Tree) -> tuple[jax.Array, None]:
        p = jax.tree.map(lambda w: w.astype(x.dtype), p)
        y = rms_norm(x, p["scale1"])
        q, k, v = (heads_of(y @ p[f"w{n}"], heads) for n in "qkv")
        gamma = 1 - 2.0 ** (-5 - jnp.arange(heads))
        apart = jnp.arange(sequence)[:, None] - jnp.arange(sequence)[None, :]
        decay = jnp.where(apart >= 0, gamma[:, None, None] ** jnp.maximum(apart, 0), 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * decay.astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
        mixed = rms_norm(mixed, jnp.ones(mixed.shape[-1], x.dtype))
        gate = jax.nn.silu(y @ p["wg"])
        x = x + (gate * mixed.reshape(gate.shape)) @ p["wo"]
        y = rms_norm(x, p["scale2"])
        return x + jax.nn.gelu(y @ p["w1"]) @ p["w2"], None

    def loss_of(params: Tree, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens[:, :-1]].astype(BF16)
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
        x = rms_norm(x, params["scale"].astype(x.dtype))
        return zoo.next_token_loss(x @ params["embed"].T.astype(BF16), tokens[:, 1:])

    return zoo.train_job(loss_of, params, shape(batch, sequence + 1, dtype=jnp.int32))


def moe(
    layers: int = 2,
    experts: int = 16,
    groups: int = 16,
    tokens: int = 1024,
    width: int = 1024,
    use: Use = as_it_is,
) -> Job:
    """Experts that each take their best tokens (arXiv 2202.09368), between dense layers; f32."""
    square, hidden, room = (width, width), 4 * width, 2 * tokens // experts
    one = shapes(dense1=square, dense2=square, router=(width, experts))
    one |= shapes(w1=(experts, width, hidden), w2=(experts, hidden, width))
    params: Tree = {"layers": [one] * layers}

    def layer(p: Tree, x: jax.Array) -> jax.Array:
        p = {name: use(w, name) for name, w in p.items()}
        hidden = use(jax.nn.gelu(use(x, "normed") @ p["dense1"]), "hidden")
        x = use(x + hidden @ p["dense2"], "stream")
        gates = use(jax.nn.softmax(x @ p["router"]), "gates")
        values, chosen = jax.lax.top_k(gates.swapaxes(1, 2), room)  # group, expert, place
        onto = jax.nn.one_hot(chosen, tokens)
        inside = use(use(jnp.einsum("gect,gtm->egcm", onto, x), "of_groups"), "of_experts")
        wide = use(jax.nn.gelu(jnp.einsum("egcm,emh->egch", inside, p["w1"])), "wide")
        inside = use(use(jnp.einsum("egch,ehm->egcm", wide, p["w2"]), "of_experts"), "of_groups")
        return use(x + jnp.einsum("egcm,gect->gtm", inside, onto * values[..., None]), "stream")

    def loss_of(params: Tree, batch: Tree) -> jax.Array:
        x = batch["x"]
        for p in params["layers"]:
            x = layer(p, x)
        return jnp.mean(jnp.square(x - batch["y"]))

    data = shapes(x=(groups, tokens, width), y=(groups, tokens, width))
    return zoo.train_job(loss_of, params, data, optax.sgd(0.1, momentum=0.9))


PROGRAMS: dict[str, Callable[[], Job]] = {
    "gpt2_small": partial(zoo.gpt2_small_scan, layers=12, batch=64),
    "gpt2_small_unrolled": partial(zoo.gpt2_small_unrolled, layers=4, batch=64),
    "gpt_1p3b": partial(zoo.gpt_1p3b, layers=24, batch=32),
    "gpt_forward": lambda: forward_only(zoo.gpt_1p3b(layers=8, batch=32)),
    "llama": partial(zoo.llama_unrolled, layers=3, batch=32),
    "llama_forward": lambda: forward_only(zoo.llama_unrolled(layers=3, batch=32)),
    "decode": partial(zoo.gpt_decode, layers=8),
    "vit": vit,
    "retnet": retnet,
    "moe": moe,
    "conv_net": partial(zoo.conv_net, blocks=4),
    "dlrm": zoo.dlrm,
    "long_attention": partial(zoo.long_attention, sequence=16384),
    "long_blockwise": partial(zoo.long_attention_blockwise, sequence=32768),
    "video": zoo.video_transformer,
    "mlp": partial(zoo.mlp, width=4096, layers=6, batch=16384),
}
