"""Where do tables go that are too big for one device?  A recommender, nearly all of it embeddings.

    python examples/06_dlrm_recommender.py
    autoshard plan examples/06_dlrm_recommender.py:job --cluster cpu:8 --specs

The network is DLRM (arXiv 1906.00091): dense features through a bottom MLP, ids through embedding
tables, the dot products of all pairs of these vectors through a top MLP. Two tables are long, six
short ones are stacked; rows, columns or whole tables can be split, and only a memory limit or the
price of communication says which. The clicks are invented: every id has a hidden taste.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autoshard

QUICK = os.environ.get("AUTOSHARD_EXAMPLE_QUICK") == "1"
ROWS, SMALL_ROWS, WIDTH = (4096, 128, 16) if QUICK else (65536, 1024, 32)
BATCH, STEPS = (256, 8) if QUICK else (2048, 40)
DENSE, SMALL = 13, 6
VECTORS = 1 + 2 + SMALL
PAIRS = np.triu_indices(VECTORS, k=1)
OPTIMIZER = optax.adagrad(0.05)
Params = dict[str, Any]


def mlp(layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Dense layers with a relu between them."""
    for i, layer in enumerate(layers):
        x = x @ layer["w"] + layer["b"]
        x = jax.nn.relu(x) if i + 1 < len(layers) else x
    return x


def score(params: Params, batch: dict[str, Any]) -> jax.Array:
    """The log odds of a click, for each case of the batch."""
    lookup = jax.vmap(lambda table, ids: table[ids], in_axes=(0, 1), out_axes=1)
    bottom = mlp(params["bottom"], batch["dense"])
    vectors = [bottom, params["user"][batch["user"]], params["item"][batch["item"]]]
    vectors = jnp.concatenate(
        [jnp.stack(vectors, axis=1), lookup(params["small"], batch["small"])], axis=1
    )
    dots = jnp.einsum("bid,bjd->bij", vectors, vectors)[:, *PAIRS]
    return mlp(params["top"], jnp.concatenate([bottom, dots], axis=1))[:, 0]


def train_step(state: dict[str, Any], batch: dict[str, Any]) -> tuple[dict[str, Any], jax.Array]:
    """One step of Adagrad: (state, batch) -> (state, loss)."""

    def loss_of(params: Params) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(score(params, batch), batch["click"]).mean()

    loss, grads = jax.value_and_grad(loss_of)(state["params"])
    updates, opt = OPTIMIZER.update(grads, state["opt"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss


def batches(count: int) -> list[dict[str, np.ndarray]]:
    """Cases whose ids are drawn as in life, few often and most seldom, and whose clicks follow."""
    rng = np.random.default_rng(0)
    user_taste, item_taste = rng.normal(size=(2, ROWS))
    small_taste, dense_taste = rng.normal(size=(SMALL, SMALL_ROWS)), rng.normal(size=DENSE)

    def ids(rows: int, *shape: int) -> np.ndarray:
        return (rng.zipf(1.3, size=shape) % rows).astype(np.int32)

    def batch() -> dict[str, np.ndarray]:
        dense = rng.normal(size=(BATCH, DENSE)).astype(np.float32)
        user, item, small = ids(ROWS, BATCH), ids(ROWS, BATCH), ids(SMALL_ROWS, BATCH, SMALL)
        odds = user_taste[user] + item_taste[item] + dense @ dense_taste / DENSE**0.5
        odds += small_taste[np.arange(SMALL), small].sum(axis=1) / SMALL**0.5
        click = (rng.random(BATCH) < 1 / (1 + np.exp(-2 * odds))).astype(np.float32)
        return {"dense": dense, "user": user, "item": item, "small": small, "click": click}

    return [batch() for _ in range(count)]


def job() -> tuple[Any, tuple[Any, ...]]:
    """The train step and its arguments."""
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def table(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) / WIDTH**0.5

    def layers(*sizes: int) -> list[dict[str, jax.Array]]:
        return [
            {"w": jax.random.normal(next(keys), (n, m)) * (2 / n) ** 0.5, "b": jnp.zeros(m)}
            for n, m in pairwise(sizes)
        ]

    params = {
        "user": table(ROWS, WIDTH),
        "item": table(ROWS, WIDTH),
        "small": table(SMALL, SMALL_ROWS, WIDTH),
        "bottom": layers(DENSE, 64, WIDTH),
        "top": layers(WIDTH + len(PAIRS[0]), 128, 64, 1),
    }
    return train_step, ({"params": params, "opt": OPTIMIZER.init(params)}, batches(1)[0])


def main() -> None:
    """Plan with no hint, say where the tables went, train sharded and unsharded."""
    from side_by_side import eight_devices, train

    eight_devices()
    step, (state, batch) = job()
    plan = autoshard.plan(step, state, batch, cluster="cpu:8", donate_argnums=(0,))
    print(plan)
    for name in ("user", "item", "small"):
        print(f"table {name:>6} is split as {plan.in_shardings[0]['params'][name]}")
    train(step, plan.compile(), state, batches(STEPS), tolerance=1e-3)


if __name__ == "__main__":
    main()
