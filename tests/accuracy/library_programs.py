"""Programs as people write them with flax, haiku and equinox; no constant was fitted to them.

`PROGRAMS[name]()` gives `(fn, args)`, as in accuracy_programs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from zoo import Job, shape

BF16 = jnp.bfloat16


def tokens(batch: int, length: int) -> jax.ShapeDtypeStruct:
    return shape(batch, length, dtype=jnp.int32)


def cross_entropy(scores: jax.Array, labels: jax.Array) -> jax.Array:
    each = optax.softmax_cross_entropy_with_integer_labels(scores.astype(jnp.float32), labels)
    return each.mean()


def next_token(scores: jax.Array, text: jax.Array) -> jax.Array:
    return cross_entropy(scores[:, :-1], text[:, 1:])


def train(loss: Callable[[Any, Any], jax.Array], optimizer: Any, params: Any, batch: Any) -> Job:
    """A step of optax on `(params, state of the optimizer)`."""
    opt = jax.eval_shape(optimizer.init, params)

    def train_step(state: Any, batch: Any) -> Any:
        params, opt = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt = optimizer.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    return train_step, ((params, opt), batch)


def initial(model: nn.Module, *example: Any) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), *example)


# Flax


class Block(nn.Module):
    """Attention and a feed-forward, each after a layer norm."""

    heads: int
    width: int
    causal: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2])) if self.causal else None
        h = nn.LayerNorm(dtype=BF16)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=BF16)(h, h, mask=mask)
        h = nn.LayerNorm(dtype=BF16)(x)
        h = nn.Dense(4 * self.width, dtype=BF16)(h)
        return x + nn.Dense(self.width, dtype=BF16)(nn.gelu(h))


class GPT(nn.Module):
    """A decoder whose output layer is its embedding."""

    layers: int = 6
    width: int = 1024
    heads: int = 16
    vocabulary: int = 32000
    length: int = 1024

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        embedding = nn.Embed(self.vocabulary, self.width, dtype=BF16)
        x = embedding(text)
        x = x + nn.Embed(self.length, self.width, dtype=BF16)(jnp.arange(text.shape[1]))
        for _ in range(self.layers):
            x = Block(self.heads, self.width)(x)
        return embedding.attend(nn.LayerNorm(dtype=BF16)(x))


def flax_gpt(batch: int = 32) -> Job:
    """Clipped adamw with a schedule."""
    model, text = GPT(), tokens(batch, 1024)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 1000)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    return train(
        lambda p, t: next_token(model.apply(p, t), t), optimizer, initial(model, text), text
    )


def flax_gpt_forward(batch: int = 32) -> Job:
    """Scores for every token."""
    model, text = GPT(), tokens(batch, 1024)
    return (lambda p, t: model.apply(p, t)), (initial(model, text), text)


class Bottleneck(nn.Module):
    """Three convolutions with batch norm, and a way around them."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=BF16)
        norm = partial(nn.BatchNorm, use_running_average=False, momentum=0.9, dtype=BF16)
        y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.features, (3, 3), (self.stride, self.stride))(y)))
        y = norm()(conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.features, (1, 1), (self.stride, self.stride))(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Of bottlenecks (arXiv 1512.03385); sizes: blocks of each stage."""

    sizes: tuple[int, ...] = (2, 2, 2, 2)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(64, (7, 7), (2, 2), use_bias=False, dtype=BF16)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=BF16)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for i, blocks in enumerate(self.sizes):
            for j in range(blocks):
                x = Bottleneck(64 * 2**i, 2 if i and not j else 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


def flax_resnet(batch: int = 256) -> Job:
    """SGD with Nesterov's momentum; batch statistics are part of the state."""
    model, optimizer = ResNet(), optax.sgd(0.1, momentum=0.9, nesterov=True)
    images, labels = shape(batch, 224, 224, 3), shape(batch, dtype=jnp.int32)
    given = initial(model, images)
    opt = jax.eval_shape(optimizer.init, given["params"])

    def train_step(state: Any, batch: Any) -> Any:
        params, statistics, opt = state

        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": statistics}
            out, new = model.apply(variables, batch[0], mutable=["batch_stats"])
            return cross_entropy(out, batch[1]), new["batch_stats"]

        (value, moved), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = optimizer.update(grads, opt, params)
        return (optax.apply_updates(params, updates), moved, opt), value

    return train_step, ((given["params"], given["batch_stats"], opt), (images, labels))


class ViT(nn.Module):
    """ViT-B/16's layers with a class token (arXiv 2010.11929): 197 places."""

    layers: int = 6
    width: int = 768

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (16, 16), (16, 16), dtype=BF16)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        first = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(first.astype(x.dtype), (x.shape[0], 1, 1)), x], 1)
        place = self.param("pos", nn.initializers.normal(), (1, x.shape[1], self.width))
        x = x + place.astype(x.dtype)
        for _ in range(self.layers):
            x = Block(12, self.width, causal=False)(x)
        return nn.Dense(1000)(nn.LayerNorm()(x[:, 0]))


def flax_vit(batch: int = 256) -> Job:
    """Adamw."""
    model, images = ViT(), shape(batch, 224, 224, 3)
    data = images, shape(batch, dtype=jnp.int32)

    def loss(params: Any, data: Any) -> jax.Array:
        return cross_entropy(model.apply(params, data[0]), data[1])

    return train(loss, optax.adamw(1e-3), initial(model, images), data)


class EncoderDecoder(nn.Module):
    """Two stacks that share their embedding, as T5's (arXiv 1910.10683)."""

    layers: int = 3
    width: int = 768
    heads: int = 12
    vocabulary: int = 32128

    @nn.compact
    def __call__(self, given: jax.Array, text: jax.Array) -> jax.Array:
        embedding = nn.Embed(self.vocabulary, self.width, dtype=BF16)
        norm = partial(nn.RMSNorm, dtype=BF16)
        dense = partial(nn.Dense, use_bias=False, dtype=BF16)
        attend = partial(nn.MultiHeadDotProductAttention, self.heads, dtype=BF16, use_bias=False)

        def feed_forward(x: jax.Array) -> jax.Array:
            out = dense(self.width)
            return out(nn.gelu(dense(4 * self.width)(x)))

        x, y = embedding(given), embedding(text)
        for _ in range(self.layers):
            z = norm()(x)
            x = x + attend()(z, z)
            x = x + feed_forward(norm()(x))
        x, mask = norm()(x), nn.make_causal_mask(text)
        for _ in range(self.layers):
            z = norm()(y)
            y = y + attend()(z, z, mask=mask)
            y = y + attend()(norm()(y), x)
            y = y + feed_forward(norm()(y))
        return embedding.attend(norm()(y))


def t5(batch: int = 64, length: int = 512) -> Job:
    """Adafactor."""
    model, text = EncoderDecoder(), tokens(batch, length)

    def loss(params: Any, batch: Any) -> jax.Array:
        return next_token(model.apply(params, batch["a"], batch["t"]), batch["t"])

    return train(loss, optax.adafactor(1e-3), initial(model, text, text), {"a": text, "t": text})


# Haiku


def haiku_bert(layers: int = 4, width: int = 768, batch: int = 64, length: int = 512) -> Job:
    """Masked language model with dropout, float32, LAMB."""
    vocabulary, heads = 30522, 12

    def network(text: jax.Array) -> jax.Array:
        norm = partial(hk.LayerNorm, -1, True, True)
        normal = hk.initializers.RandomNormal()
        x = hk.Embed(vocabulary, width)(text)
        x = x + hk.get_parameter("pos", (length, width), init=normal)
        for _ in range(layers):
            h = norm()(x)
            scaled = hk.initializers.VarianceScaling()
            h = hk.MultiHeadAttention(heads, width // heads, w_init=scaled)(h, h, h)
            x = x + hk.dropout(hk.next_rng_key(), 0.1, h)
            h = norm()(x)
            out = hk.Linear(width)
            h = out(jax.nn.gelu(hk.Linear(4 * width)(h)))
            x = x + hk.dropout(hk.next_rng_key(), 0.1, h)
        out = hk.Linear(vocabulary)
        return out(norm()(x))

    model, text, optimizer = hk.transform(network), tokens(batch, length), optax.lamb(1e-3)
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    params = jax.eval_shape(model.init, jax.random.PRNGKey(0), text)
    opt = jax.eval_shape(optimizer.init, params)

    def train_step(state: Any, key: jax.Array, batch: Any) -> Any:
        params, opt = state

        def loss(params: Any) -> jax.Array:
            scores = model.apply(params, key, batch["x"])
            each = optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])
            return (each * batch["mask"]).sum() / batch["mask"].sum()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = optimizer.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    return train_step, ((params, opt), key, {"x": text, "y": text, "mask": shape(batch, length)})


# Equinox


class Linear(eqx.Module):
    """A matrix, cast to what it meets."""

    w: jax.Array

    def __init__(self, given: int, made: int, key: jax.Array) -> None:
        self.w = jax.random.normal(key, (given, made)) * given**-0.5

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w.astype(x.dtype)


class RMS(eqx.Module):
    """Root mean square norm, in float32."""

    g: jax.Array

    def __init__(self, width: int) -> None:
        self.g = jnp.ones(width)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        scale = jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)
        return (y * scale * self.g).astype(x.dtype)


def rotary(x: jax.Array) -> jax.Array:
    """Rotated places (arXiv 2104.09864); x: [batch, place, head, feature]."""
    frequency = 1e4 ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    angle = jnp.arange(x.shape[1])[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class LlamaLayer(eqx.Module):
    """Grouped attention (arXiv 2305.13245) and SwiGLU (arXiv 2002.05202)."""

    n1: RMS
    n2: RMS
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear

    def __init__(self, width: int, heads: int, groups: int, key: jax.Array) -> None:
        keys = jax.random.split(key, 7)
        narrow, hidden = groups * width // heads, int(8 * width / 3) // 256 * 256
        self.n1, self.n2 = RMS(width), RMS(width)
        self.q, self.k = Linear(width, width, keys[0]), Linear(width, narrow, keys[1])
        self.v, self.o = Linear(width, narrow, keys[2]), Linear(width, width, keys[3])
        self.gate, self.up = Linear(width, hidden, keys[4]), Linear(width, hidden, keys[5])
        self.down = Linear(hidden, width, keys[6])

    def __call__(self, x: jax.Array, heads: int, groups: int) -> jax.Array:
        batch, length, width = x.shape
        y = self.n1(x)
        q = rotary(self.q(y).reshape(batch, length, heads, width // heads))
        k = rotary(self.k(y).reshape(batch, length, groups, width // heads))
        v = self.v(y).reshape(batch, length, groups, width // heads)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.reshape(batch, length, width))
        y = self.n2(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


def eqx_llama(layers: int = 8, width: int = 2048, batch: int = 16, length: int = 2048) -> Job:
    """Layers are scanned and computed again for the gradient."""
    heads, groups, vocabulary = 16, 4, 32000

    def make(key: jax.Array) -> Any:
        k1, k2, k3 = jax.random.split(key, 3)
        blocks = eqx.filter_vmap(lambda k: LlamaLayer(width, heads, groups, k))(
            jax.random.split(k1, layers)
        )
        embedding = jax.random.normal(k2, (vocabulary, width))
        out = Linear(width, vocabulary, k3)
        return {"emb": embedding, "blocks": blocks, "norm": RMS(width), "out": out}

    def loss(p: Any, text: jax.Array) -> jax.Array:
        x = p["emb"][text].astype(BF16)

        @jax.checkpoint
        def layer(x: jax.Array, block: LlamaLayer) -> tuple[jax.Array, None]:
            return block(x, heads, groups), None

        x, _ = jax.lax.scan(layer, x, p["blocks"])
        return next_token(p["out"](p["norm"](x)), text)

    params = jax.eval_shape(make, jax.random.key(0))
    return train(loss, optax.adamw(3e-4, b2=0.95), params, tokens(batch, length))


PROGRAMS: dict[str, Callable[[], Job]] = {
    "flax_gpt": flax_gpt,
    "flax_gpt_forward": flax_gpt_forward,
    "flax_resnet": flax_resnet,
    "flax_vit": flax_vit,
    "t5": t5,
    "haiku_bert": haiku_bert,
    "eqx_llama": eqx_llama,
}
