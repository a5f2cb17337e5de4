"""How do the planners compare on a recurrent net?  A haiku LSTM learns Python, byte after byte.

    python examples/07_haiku_lstm.py
    autoshard compare examples/07_haiku_lstm.py:job --cluster cpu:8

The recurrence is one `lax.scan` over time: its carry has the same sharding in every step, and what
its body communicates is paid for once per step. `solver=` asks for the search, for mere propagation
(what GSPMD does), or for a plan an expert would write; all are priced by the same model.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import autoshard

QUICK = os.environ.get("AUTOSHARD_EXAMPLE_QUICK") == "1"
HIDDEN = 64 if QUICK else 256
BATCH, LENGTH, STEPS = (16, 24, 8) if QUICK else (64, 64, 60)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(4e-3, eps=1e-6))


def scores(text: jax.Array) -> jax.Array:
    """Bytes [batch, time] in, a score for each next byte out."""
    cell = hk.LSTM(HIDDEN)
    x, start = hk.Embed(256, HIDDEN)(text), cell.initial_state(len(text))
    x, _ = hk.dynamic_unroll(cell, x, start, time_major=False)
    return hk.Linear(256)(x)


MODEL = hk.without_apply_rng(hk.transform(scores))


def train_step(state: dict[str, Any], text: Any) -> tuple[dict[str, Any], jax.Array]:
    """One step of Adam: (state, text) -> (state, loss)."""

    def loss_of(params: Any) -> jax.Array:
        guess = MODEL.apply(params, text[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(guess, text[:, 1:]))

    loss, grads = jax.value_and_grad(loss_of)(state["params"])
    updates, opt = OPTIMIZER.update(grads, state["opt"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss


def batches(count: int) -> list[np.ndarray]:
    """Random windows [batch, time] of the standard library's sources."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - LENGTH, size=(count, BATCH, 1))
    return list(text[starts + np.arange(LENGTH + 1)].astype(np.int32))


def job() -> tuple[Any, tuple[Any, ...]]:
    """The train step and its arguments."""
    text = batches(1)[0]
    params = MODEL.init(jax.random.key(0), text[:, :-1])
    return train_step, ({"params": params, "opt": OPTIMIZER.init(params)}, text)


def main() -> None:
    """Price four plans, print the searched one, train with it sharded and unsharded."""
    from side_by_side import eight_devices, train

    eight_devices()
    step, args = job()
    # Propagation alone splits nothing unless it is told where to begin.
    options = {"mesh": {"data": 8}, "hints": {"text": P("data")}, "donate_argnums": (0,)}
    plans = {
        solver: autoshard.plan(step, *args, cluster="cpu:8", solver=solver, **options)
        for solver in ("propagate", "dp", "fsdp", "ilp")
    }
    print(plans["ilp"], "\n")
    for solver, plan in plans.items():
        step_ms, peak_mb = plan.cost.step_time * 1e3, plan.cost.peak_memory / 1e6
        print(f"{solver:>10}: {step_ms:8.2f} ms a step and {peak_mb:6.1f} MB per device, predicted")
    train(step, plans["ilp"].compile(), args[0], batches(STEPS), tolerance=1e-3)


if __name__ == "__main__":
    main()
