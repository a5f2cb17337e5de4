"""What of batch norm, which looks at the whole batch?  A convolutional net on handwritten digits.

    python examples/05_digits_conv_batchnorm.py
    autoshard compare examples/05_digits_conv_batchnorm.py:job --cluster cpu:8

Means and variances are taken over all images, wherever they lie; a sharded step must not quietly
turn them into means over one device's share. Here the step is planned by a decorator, on its first
call, as `jax.jit` would compile it.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import autoshard

QUICK = os.environ.get("AUTOSHARD_EXAMPLE_QUICK") == "1"
CHANNELS = (8, 16) if QUICK else (32, 64, 64)
BATCH, STEPS = (64, 8) if QUICK else (256, 40)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


class ConvNet(nn.Module):
    """Convolution, batch norm, gelu, a few times over; then ten scores."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, channels in enumerate(CHANNELS):
            x = nn.Conv(channels, (3, 3), use_bias=False)(x)
            x = nn.gelu(nn.BatchNorm(use_running_average=False, momentum=0.9)(x))
            if i % 2 == 1:
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def train_step(state: dict[str, Any], batch: tuple[Any, Any]) -> tuple[dict[str, Any], jax.Array]:
    """One step of momentum SGD: (state, (images, labels)) -> (state, loss)."""
    images, labels = batch

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state["batch_stats"]}
        scores, updated = ConvNet().apply(variables, images, mutable=["batch_stats"])
        wrong = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        return wrong.mean(), updated["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
    updates, opt = OPTIMIZER.update(grads, state["opt"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "batch_stats": stats, "opt": opt}, loss


def batches(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random images [height, width, 1] of the 1797 that ship with scikit-learn, with labels."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    picks = np.random.default_rng(0).integers(len(images), size=(count, BATCH))
    return [(images[p], digits.target[p].astype(np.int32)) for p in picks]


def job() -> tuple[Any, tuple[Any, ...]]:
    """The train step and its arguments."""
    batch = batches(1)[0]
    variables = ConvNet().init(jax.random.key(0), batch[0])
    return train_step, ({**variables, "opt": OPTIMIZER.init(variables["params"])}, batch)


def main() -> None:
    """Let the decorator plan, print its plan, train sharded and unsharded."""
    from side_by_side import eight_devices, train

    eight_devices()
    _, (state, batch) = job()
    step = autoshard.parallelize(train_step, cluster="cpu:8", donate_argnums=(0,))
    print(step.plan(state, batch))
    train(train_step, step, state, batches(STEPS), tolerance=1e-3)


if __name__ == "__main__":
    main()
