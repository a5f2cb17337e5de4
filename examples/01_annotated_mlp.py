"""How do I split a network with two annotations?  Name a mesh axis for the batch, one for a layer.

    python examples/01_annotated_mlp.py
    autoshard plan examples/01_annotated_mlp.py:job --cluster cpu:8 --mesh data=4,model=2

A classifier of the Wisconsin breast cancer data that ships with scikit-learn (569 cases of 30
measurements). `annotate` says what must be split; all other arrays follow from it. Under plain
`jax.jit` an annotation does nothing.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_breast_cancer

import autoshard

QUICK = os.environ.get("AUTOSHARD_EXAMPLE_QUICK") == "1"
HIDDEN = 256 if QUICK else 2048
STEPS = 8 if QUICK else 40
Params = dict[str, Any]


def forward(params: Params, x: jax.Array) -> jax.Array:
    """Two layers; the batch is split over `data`, the hidden units over `model`."""
    x = autoshard.annotate(x, "data", None)
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    hidden = autoshard.annotate(hidden, "data", "model")
    return hidden @ params["w2"] + params["b2"]


def train_step(params: Params, batch: tuple[Any, Any]) -> tuple[Params, jax.Array]:
    """One step of gradient descent: (params, (x, label)) -> (params, loss)."""

    def loss_of(params: Params) -> jax.Array:
        x, label = batch
        log_p = jax.nn.log_softmax(forward(params, x))
        return -jnp.mean(jnp.take_along_axis(log_p, label[:, None], axis=1))

    loss, grads = jax.value_and_grad(loss_of)(params)
    return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), loss


def data() -> tuple[np.ndarray, np.ndarray]:
    """512 cases, each measurement scaled to mean 0 and deviation 1; the label is 0 or 1."""
    x, label = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    return x[:512].astype(np.float32), label[:512].astype(np.int32)


def job() -> tuple[Any, tuple[Any, ...]]:
    """The train step and its arguments."""
    key1, key2 = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(key1, (30, HIDDEN)) / 30**0.5,
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(key2, (HIDDEN, 2)) / HIDDEN**0.5,
        "b2": jnp.zeros(2),
    }
    return train_step, (params, data())


def main() -> None:
    """Plan on a 4 x 2 mesh, print the plan, train sharded and unsharded."""
    from side_by_side import eight_devices, train

    eight_devices()
    step, (params, batch) = job()
    plan = autoshard.plan(step, params, batch, cluster="cpu:8", mesh={"data": 4, "model": 2})
    print(plan)
    print("\nw1 is split as", plan.in_shardings[0]["w1"], "and x as", plan.in_shardings[1][0])
    train(step, plan.compile(), params, [batch] * STEPS, tolerance=1e-4)


if __name__ == "__main__":
    main()
