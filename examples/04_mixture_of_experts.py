"""Who goes to which expert, and where does the expert live?  A mixture of experts, as in GShard.

    python examples/04_mixture_of_experts.py
    autoshard explain examples/04_mixture_of_experts.py:job "**/w1" --cluster cpu:8

Guesses the next byte of Python's own sources from the sixteen before it. A router sends each token
to its two best experts, as long as they have room; two einsums, dispatch and combine, carry the
tokens there and back (arXiv 2006.16668, section 3.2). When a plan splits tokens and experts over
one mesh axis, exactly these einsums become all-to-alls.
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

import autoshard

QUICK = os.environ.get("AUTOSHARD_EXAMPLE_QUICK") == "1"
EXPERTS, WIDTH, HIDDEN = (8, 32, 64) if QUICK else (8, 64, 256)
GROUPS, TOKENS, STEPS = (8, 32, 8) if QUICK else (8, 128, 80)
CAPACITY = 2 * TOKENS // EXPERTS  # tokens that one expert takes from one group
WINDOW = 16
Params = dict[str, Any]


def route(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Router scores [group, token, expert] -> combine weights [group, token, expert, slot], loss.

    The loss is least when the experts get equally many tokens (GShard, algorithm 1).
    """
    gates = jax.nn.softmax(scores)
    values, picks = jax.lax.top_k(gates, 2)
    chosen = jax.nn.one_hot(picks, EXPERTS)  # group, token, choice, expert
    first_come = chosen.transpose(0, 2, 1, 3).reshape(GROUPS, 2 * TOKENS, EXPERTS)
    slot = (jnp.cumsum(first_come, axis=1) - 1).reshape(GROUPS, 2, TOKENS, EXPERTS)
    slot = slot.transpose(0, 2, 1, 3).astype(jnp.int32)
    fits = chosen[..., None] * jax.nn.one_hot(slot, CAPACITY)  # a slot beyond capacity is all 0
    weights = values / values.sum(axis=-1, keepdims=True)
    share = chosen[:, :, 0].mean(axis=1) * gates.mean(axis=1)
    return jnp.einsum("gtk,gtkec->gtec", weights, fits), EXPERTS * share.sum(axis=-1).mean()


def mixture(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Feed each token [group, token, width] through its experts; returns the result and a loss."""
    combine, balance = route(jnp.einsum("gtm,me->gte", x, params["router"]))
    dispatch = (combine > 0).astype(x.dtype)
    inside = jnp.einsum("gtec,gtm->egcm", dispatch, x)
    inside = jax.nn.relu(jnp.einsum("egcm,emh->egch", inside, params["w1"]))
    inside = jnp.einsum("egch,ehm->egcm", inside, params["w2"])
    return jnp.einsum("gtec,egcm->gtm", combine, inside), balance


def loss_of(params: Params, text: jax.Array) -> jax.Array:
    """How badly the last byte of each window is guessed, plus a hundredth of the imbalance."""
    x = params["byte"][text[..., :-1]].reshape(GROUPS, TOKENS, -1) @ params["mix"]
    guess, balance = mixture(params, x)
    scores = (x + guess) @ params["out"]
    wrong = optax.softmax_cross_entropy_with_integer_labels(scores, text[..., -1])
    return wrong.mean() + 0.01 * balance


def batches(count: int) -> list[np.ndarray]:
    """Random windows [group, token, bytes] of the standard library's sources."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - WINDOW, size=(count, GROUPS, TOKENS, 1))
    return list(text[starts + np.arange(WINDOW + 1)].astype(np.int32))


def job() -> tuple[Any, tuple[Any, ...]]:
    """The train step, (state, text) -> (state, loss), and its arguments."""
    shapes = {
        "byte": (256, WIDTH // 4),
        "mix": (WINDOW * WIDTH // 4, WIDTH),
        "router": (WIDTH, EXPERTS),
        "w1": (EXPERTS, WIDTH, HIDDEN),
        "w2": (EXPERTS, HIDDEN, WIDTH),
        "out": (WIDTH, 256),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: jax.random.normal(key, shape) / shape[-2] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    optimizer = optax.adam(3e-3, eps=1e-6)

    def train_step(state: dict[str, Any], text: Any) -> tuple[dict[str, Any], jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(state["params"], text)
        updates, opt = optimizer.update(grads, state["opt"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss

    return train_step, ({"params": params, "opt": optimizer.init(params)}, batches(1)[0])


def main() -> None:
    """Plan with no hint, ask where the experts went, train sharded and unsharded."""
    from side_by_side import eight_devices, train

    eight_devices()
    step, (state, text) = job()
    plan = autoshard.plan(step, state, text, cluster="cpu:8", donate_argnums=(0,))
    print(plan)
    print(plan.explain("state/params/w1"))
    train(step, plan.compile(), state, batches(STEPS), tolerance=1e-3)


if __name__ == "__main__":
    main()
