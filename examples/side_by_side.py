"""How do the examples show that nothing changed?  The sharded step beside the unsharded one.

Every example ends in the same three lines: eight virtual devices, a plan, and `train`, which runs
the planned step and, from the very same state, plain `jax.jit` on one device, and refuses numbers
that differ. (Two whole runs side by side would prove less: training is chaotic, so after a hundred
steps even a harmless change of rounding shows in the second digit of the loss.)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

Step = Callable[[Any, Any], tuple[Any, Any]]
ROWS = 12  # of the printed table


def eight_devices() -> None:
    """Make this machine's processor look like eight devices; call it before jax is first used."""
    jax.config.update("jax_platforms", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 8)
    found = len(jax.devices())
    if found < 8:
        raise RuntimeError(f"jax has {found} devices, the example wants 8; was jax used before?")


def train(step: Step, sharded: Step, state: Any, batches: Sequence[Any], tolerance: float) -> Any:
    """Train with `sharded`, check each step against `step`, print both; returns the last state.

    step: (state, batch) -> (state, loss), run by plain `jax.jit` on one device. sharded: the same
    step as planned; it keeps its own state from step to step. tolerance: the largest difference
    allowed between the two, of the loss and of every array of the new state, relative to that
    array's largest element. Raises AssertionError beyond it, and when the loss does not fall.
    """
    plain = jax.jit(step)
    losses, seconds, worst = [], [], 0.0
    state = on_host(state)
    print(f"\n{'step':>6} {'8 devices':>11} {'1 device':>11} {'difference':>12}")
    for i, batch in enumerate(batches):
        before = on_host(state)  # a copy: the sharded step may be given its state's memory
        (state, loss), ours_s = _timed(sharded, state, batch)
        (expected, expected_loss), plain_s = _timed(plain, before, batch)
        gap, where = difference((state, loss), (expected, expected_loss))
        losses.append(float(loss))
        seconds.append((ours_s, plain_s))
        worst = max(worst, gap)
        if i % max(1, len(batches) // ROWS) == 0 or i == len(batches) - 1:
            bar = "#" * round(32 * losses[-1] / max(losses))
            print(f"{i:>6} {losses[-1]:>11.6f} {float(expected_loss):>11.6f} {gap:>12.1e}  {bar}")
        assert gap <= tolerance, f"step {i}: {where} differs by {gap:.1e} (allowed {tolerance})"
    ours_ms, plain_ms = np.median(seconds[1:], axis=0) * 1e3
    first, last = losses[0], float(np.mean(losses[-3:]))
    print(f"\nloss          {first:.4f} -> {last:.4f} in {len(losses)} steps")
    print(f"same numbers  to {worst:.1e} in every array of every step (allowed {tolerance:.1e})")
    print(f"a step takes  {ours_ms:.1f} ms on 8 virtual devices, {plain_ms:.1f} ms on 1")
    assert last < first, f"the loss rose from {first:.4f} to {last:.4f}"
    return state


def difference(ours: Any, theirs: Any) -> tuple[float, str]:
    """The largest difference of two trees of arrays, relative to its array's largest element.

    Returned with the path of that array.
    """
    arrays, _ = jax.tree.flatten_with_path(on_host(ours))
    expected = jax.tree.leaves(on_host(theirs))
    return max(
        (_array_difference(x, y), jax.tree_util.keystr(path))
        for (path, x), y in zip(arrays, expected, strict=True)
    )


def on_host(tree: Any) -> Any:
    """A copy of every array, as numpy."""
    return jax.tree.map(np.array, tree)


def _array_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    gap = np.max(np.abs(ours - theirs), initial=0.0)
    return float(gap / max(np.max(np.abs(theirs), initial=0.0), 1e-12))


def _timed(step: Step, state: Any, batch: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    out = jax.block_until_ready(step(state, batch))
    return out, time.perf_counter() - start
