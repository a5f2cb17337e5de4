"""Who works when?  A train step in four stages, run by one controller, and measured.

    python examples/09_pipeline_stages.py
    python examples/09_pipeline_stages.py trace.json      # for ui.perfetto.dev

Dense layers in sixteen microbatches. The step is cut into stages as it is: nothing in the model
says where. Each schedule is a table of tasks; the controller starts them along it, on four virtual
devices of this machine, and jax's profiler says when each really ran. Four devices share its cores,
so do not look for speed here: look at who works beside whom, and who waits. The results are those
of the step as it is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoshard.controller import Controller
from autoshard.in_stages import in_stages
from autoshard.measured_timeline import busy_together, measured
from autoshard.timeline_text import lines
from autoshard.timeline_trace import as_trace
from passes.pipeline.generators import gpipe, one_f_one_b, zb_h1

QUICK = os.environ.get("AUTOSHARD_EXAMPLE_QUICK") == "1"
STAGES, MICROBATCHES, LAYERS = 4, 16, 8
WIDTH, ROWS = (64, 16) if QUICK else (1024, 128)


def job() -> tuple[Any, tuple[Any, ...]]:
    """The train step, (weights, batch) -> (weights, loss), and its arguments."""

    def train_step(weights: list[jax.Array], batch: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        def loss_of(weights: list[jax.Array]) -> jax.Array:
            x = batch
            for w in weights:
                x = x + jnp.tanh(x @ w)
            return jnp.mean(jnp.square(x - 1))

        loss, grads = jax.value_and_grad(loss_of)(weights)
        return [w - 0.1 * g for w, g in zip(weights, grads, strict=True)], loss

    key, *keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    weights = [jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH for k in keys]
    return train_step, (weights, jax.random.normal(key, (MICROBATCHES * ROWS, WIDTH)))


def main() -> None:
    """Run the step along three tables; print what the table foresees, and what was."""
    from side_by_side import eight_devices

    eight_devices()
    step, args = job()
    staged = in_stages(step, args, {}, {}, microbatches=MICROBATCHES, count=STAGES)
    flat, want, shown = jax.tree.leaves(args), jax.tree.leaves(jax.jit(step)(*args)), []
    devices = [[device] for device in jax.devices()[:STAGES]]
    for schedule in (gpipe, one_f_one_b, zb_h1):
        table = schedule(STAGES, MICROBATCHES)
        run = Controller(staged.traced, staged.loop, staged.stages, table, devices)
        for x, y in zip(run(*flat), want, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
        found = measured(run, flat)
        timeline, shared = found.timeline, busy_together(found.timeline)
        print(f"{timeline.schedule.name}, in milliseconds", *lines(timeline, 100), sep="\n")
        print(
            f"two stages or more at work for {shared / timeline.latency:.0%} of the step; the call "
            f"was back after {found.returned_after:.0%} of it; at most {max(found.highest)} "
            f"microbatches in memory on a device, {max(run.limits):g} by the table\n"
        )
        shown += [found.predicted, timeline]
    for file in sys.argv[1:]:
        Path(file).write_text(as_trace(shown))


if __name__ == "__main__":
    main()
