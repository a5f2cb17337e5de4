"""Does it work on an equinox model?  A small vision transformer reads handwritten digits.

    python examples/03_equinox_vision_transformer.py
    autoshard plan examples/03_equinox_vision_transformer.py:job --cluster cpu:8

`eqx.partition` parts the model into arrays and the rest, as every equinox program does; the train
step is a function of the arrays. Of sharding the model knows nothing: the one wish, that the batch
be split, is handed over beside it as a hint.
"""

from __future__ import annotations

import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import autoshard

QUICK = os.environ.get("AUTOSHARD_EXAMPLE_QUICK") == "1"
WIDTH, BLOCKS, HEADS = (32, 1, 2) if QUICK else (96, 3, 4)
BATCH, STEPS = (64, 8) if QUICK else (256, 60)
PATCHES, PIXELS = 16, 4  # an 8 x 8 image as 4 x 4 patches of 2 x 2 pixels


class Block(eqx.Module):
    """Attention over the patches, then a feed-forward layer, on one image's residual stream."""

    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm

    def __init__(self, key: jax.Array) -> None:
        key1, key2 = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=key1)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, key=key2)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class VisionTransformer(eqx.Module):
    """One image [patches, pixels] in, ten scores out."""

    patch: eqx.nn.Linear
    position: jax.Array
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, BLOCKS + 3)
        self.patch = eqx.nn.Linear(PIXELS, WIDTH, key=keys[0])
        self.position = 0.1 * jax.random.normal(keys[1], (PATCHES, WIDTH))
        self.head = eqx.nn.Linear(WIDTH, 10, key=keys[2])
        self.blocks = [Block(k) for k in keys[3:]]

    def __call__(self, image: jax.Array) -> jax.Array:
        x = jax.vmap(self.patch)(image) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=0))


def batches(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random digits of the 1797 that ship with scikit-learn, cut into patches, with labels."""
    digits = load_digits()
    images = digits.images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4)
    images = (images / 16).reshape(-1, PATCHES, PIXELS).astype(np.float32)
    picks = np.random.default_rng(0).integers(len(images), size=(count, BATCH))
    return [(images[p], digits.target[p].astype(np.int32)) for p in picks]


def job() -> tuple[Any, tuple[Any, ...]]:
    """The train step, (state, batch) -> (state, loss), and its arguments."""
    params, static = eqx.partition(VisionTransformer(jax.random.key(0)), eqx.is_array)
    optimizer = optax.adam(2e-3, eps=1e-6)

    def train_step(state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], jax.Array]:
        def loss_of(params: Any) -> jax.Array:
            images, labels = batch
            scores = jax.vmap(eqx.combine(params, static))(images)
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

        loss, grads = jax.value_and_grad(loss_of)(state["params"])
        updates, opt = optimizer.update(grads, state["opt"])
        return {"params": eqx.apply_updates(state["params"], updates), "opt": opt}, loss

    return train_step, ({"params": params, "opt": optimizer.init(params)}, batches(1)[0])


def main() -> None:
    """Plan with one hint, print the plan and a reason, train sharded and unsharded."""
    from side_by_side import eight_devices, train

    eight_devices()
    step, (state, batch) = job()
    hints = {"batch/*": P("data")}
    plan = autoshard.plan(step, state, batch, cluster="cpu:8", hints=hints, donate_argnums=(0,))
    print(plan)
    print(plan.explain("state/params/**/attention/query_proj/weight"))
    train(step, plan.compile(), state, batches(STEPS), tolerance=1e-3)


if __name__ == "__main__":
    main()
