"""Does the whole way work on a real model?  A byte-level GPT learns Python from Python's sources.

    python examples/02_byte_gpt.py
    autoshard plan examples/02_byte_gpt.py:job --cluster tpu-v5e:4x4

Written as one writes it today: flax nnx modules, optax adamw, one `nnx.scan` over stacked layers,
rematerialised. Nothing in it knows of sharding. The text is the standard library, which lies on
every machine that runs this.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import autoshard

QUICK = os.environ.get("AUTOSHARD_EXAMPLE_QUICK") == "1"
WIDTH, LAYERS, HEADS = (64, 2, 4) if QUICK else (128, 4, 4)
BATCH, LENGTH, STEPS = (16, 64, 6) if QUICK else (16, 128, 120)
INIT = nnx.initializers.normal(0.05)


class Block(nnx.Module):
    """Causal attention, then a feed-forward layer, each on a normalised residual stream."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def dense(n: int, m: int) -> nnx.Linear:
            return nnx.Linear(n, m, use_bias=False, kernel_init=INIT, rngs=rngs)

        self.norm1, self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.wq, self.wk, self.wv = dense(WIDTH, WIDTH), dense(WIDTH, WIDTH), dense(WIDTH, WIDTH)
        self.wo, self.w1, self.w2 = (
            dense(WIDTH, WIDTH),
            dense(WIDTH, 4 * WIDTH),
            dense(4 * WIDTH, WIDTH),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = (*x.shape[:-1], HEADS, WIDTH // HEADS)
        y = self.norm1(x)
        q, k, v = (w(y).reshape(heads) for w in (self.wq, self.wk, self.wv))
        x = x + self.wo(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.w2(jax.nn.gelu(self.w1(self.norm2(x))))


class Gpt(nnx.Module):
    """Bytes and positions in, a score for each next byte out."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.byte = nnx.Embed(256, WIDTH, embedding_init=INIT, rngs=rngs)
        self.position = nnx.Embed(LENGTH, WIDTH, embedding_init=INIT, rngs=rngs)
        self.blocks = nnx.vmap(Block, axis_size=LAYERS)(rngs.split(LAYERS))
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def through(x: jax.Array, block: Block) -> jax.Array:
            return block(x)

        x = self.byte(text) + self.position(jnp.arange(LENGTH))
        return self.byte.attend(self.norm(through(x, self.blocks)))


def batches(count: int) -> list[np.ndarray]:
    """Random windows, one byte longer than the model's, of the standard library's sources."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - LENGTH, size=(count, BATCH, 1))
    return list(text[starts + np.arange(LENGTH + 1)].astype(np.int32))


def job() -> tuple[Any, tuple[Any, ...]]:
    """The train step, (state, text) -> (state, loss), and its arguments."""
    graphdef, params = nnx.split(Gpt(nnx.Rngs(0)))
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 8, 2 * STEPS))

    def train_step(state: dict[str, Any], text: Any) -> tuple[dict[str, Any], jax.Array]:
        def loss_of(params: Any) -> jax.Array:
            scores = nnx.merge(graphdef, params)(text[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(scores, text[:, 1:]).mean()

        loss, grads = jax.value_and_grad(loss_of)(state["params"])
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss

    return train_step, ({"params": params, "opt": optimizer.init(params)}, batches(1)[0])


def main() -> None:
    """Plan with no hint at all, print the plan, train sharded and unsharded."""
    from side_by_side import eight_devices, train

    eight_devices()
    step, (state, text) = job()
    print(f"{sum(p.size for p in jax.tree.leaves(state['params'])):,} parameters")
    plan = autoshard.plan(step, state, text, cluster="cpu:8", donate_argnums=(0,))
    print(plan)
    train(step, plan.compile(), state, batches(STEPS), tolerance=1e-3)


if __name__ == "__main__":
    main()
