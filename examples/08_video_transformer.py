"""Can the split dimension change on the way?  A video transformer looks along space, then time.

    python examples/08_video_transformer.py
    autoshard plan examples/08_video_transformer.py:job --cluster cpu:8 --mesh model=8

Spatial attention mixes the patches of one frame, temporal attention the frames of one patch. So a
long video can be split over frames in the one kind of block and over patches in the other, with an
all-to-all between them and nothing else to communicate: dynamic sequence parallelism (DSP, arXiv
2403.10266). The clips are drawn here: bright spots that move; the model draws the next frame.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autoshard

QUICK = os.environ.get("AUTOSHARD_EXAMPLE_QUICK") == "1"
WIDTH, PAIRS, HEADS = (32, 1, 4) if QUICK else (64, 2, 4)
BATCH, FRAMES, STEPS = (2, 8, 8) if QUICK else (4, 16, 40)
GRID, PATCH = 4, 4  # a frame is 4 x 4 patches of 4 x 4 pixels
OPTIMIZER = optax.adam(3e-3, eps=1e-6)
Params = dict[str, Any]


def normalise(x: jax.Array) -> jax.Array:
    """Mean 0 and deviation 1 along the last dim."""
    return jax.nn.standardize(x, epsilon=1e-5)


def block(params: Params, x: jax.Array) -> jax.Array:
    """Attention along the sequence of x [..., sequence, width], then a feed-forward layer."""
    q, k, v = jnp.einsum("...sm,mthd->t...shd", normalise(x), params["qkv"])
    weights = jax.nn.softmax(jnp.einsum("...qhd,...khd->...hqk", q, k) * q.shape[-1] ** -0.5)
    x = x + jnp.einsum("...hqk,...khd,hdm->...qm", weights, v, params["out"])
    return x + jax.nn.gelu(normalise(x) @ params["w1"]) @ params["w2"]


def predict(params: Params, clip: jax.Array) -> jax.Array:
    """Frames [batch, time, patch, pixel] in, each one's successor out."""
    x = clip @ params["embed"] + params["where"] + params["when"][:, None]
    for pair in params["pairs"]:
        x = block(pair["space"], x)
        x = block(pair["time"], x.swapaxes(1, 2)).swapaxes(1, 2)
    return normalise(x) @ params["draw"]


def train_step(state: dict[str, Any], clip: Any) -> tuple[dict[str, Any], jax.Array]:
    """One step of Adam: (state, clip) -> (state, loss)."""

    def loss_of(params: Params) -> jax.Array:
        return jnp.mean((predict(params, clip[:, :-1]) - clip[:, 1:]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state["params"])
    updates, opt = OPTIMIZER.update(grads, state["opt"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss


def batches(count: int) -> list[np.ndarray]:
    """Clips [batch, time, patch, pixel] of one spot each, that moves on and wraps round."""
    rng, side = np.random.default_rng(0), GRID * PATCH
    start = rng.uniform(0, side, (2, count, BATCH, 1))
    angle = rng.uniform(0, 2 * np.pi, (count, BATCH, 1))
    y, x = start + 1.5 * np.stack([np.sin(angle), np.cos(angle)]) * np.arange(FRAMES + 1)
    pixel = np.arange(side)

    def away(position: np.ndarray) -> np.ndarray:
        return (pixel - position[..., None] + side / 2) % side - side / 2

    spot = np.exp(-(away(y)[..., :, None] ** 2 + away(x)[..., None, :] ** 2) / 4)
    patches = spot.reshape(count, BATCH, FRAMES + 1, GRID, PATCH, GRID, PATCH).swapaxes(4, 5)
    return list(patches.reshape(count, BATCH, FRAMES + 1, GRID**2, PATCH**2).astype(np.float32))


def job() -> tuple[Any, tuple[Any, ...]]:
    """The train step and its arguments."""
    keys = iter(jax.random.split(jax.random.key(0), 4 + 8 * PAIRS))

    def weight(*shape: int, fan_in: int = WIDTH) -> jax.Array:
        return jax.random.normal(next(keys), shape) / fan_in**0.5

    def block_params() -> Params:
        return {
            "qkv": weight(WIDTH, 3, HEADS, WIDTH // HEADS),
            "out": weight(HEADS, WIDTH // HEADS, WIDTH),
            "w1": weight(WIDTH, 4 * WIDTH),
            "w2": weight(4 * WIDTH, WIDTH, fan_in=4 * WIDTH),
        }

    params = {
        "embed": weight(PATCH**2, WIDTH, fan_in=PATCH**2),
        "where": weight(GRID**2, WIDTH),
        "when": weight(FRAMES, WIDTH),
        "pairs": [{"space": block_params(), "time": block_params()} for _ in range(PAIRS)],
        "draw": jnp.zeros((WIDTH, PATCH**2)),
    }
    return train_step, ({"params": params, "opt": OPTIMIZER.init(params)}, batches(1)[0])


def main() -> None:
    """Plan on one mesh axis that only the video can fill, train sharded and unsharded."""
    from side_by_side import eight_devices, train

    eight_devices()
    step, (state, clip) = job()
    plan = autoshard.plan(
        step, state, clip, cluster="cpu:8", mesh={"model": 8}, donate_argnums=(0,)
    )
    print(plan)
    train(step, plan.compile(), state, batches(STEPS), tolerance=1e-3)


if __name__ == "__main__":
    main()
