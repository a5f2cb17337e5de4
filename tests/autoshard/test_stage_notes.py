"""What a controller does otherwise than asked for, it says."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from autoshard.controller import Controller
from autoshard.in_stages import Staged, in_stages
from passes.pipeline import generators, offload
from passes.pipeline.schedule import Schedule


@cache
def staged(count: int, rows: int) -> tuple[Staged, list[Any], list[Any]]:
    """Dense layers, in four microbatches of so many rows."""

    def step(weights: list[Any], batch: dict[str, Any]) -> Any:
        def loss(weights: list[Any]) -> Any:
            y = batch["x"]
            for w in weights:
                y = jnp.tanh(y @ w)
            return jnp.mean(y**2)

        return jax.value_and_grad(loss)(weights)

    args = [jnp.eye(4)] * 4, {"x": jnp.arange(16.0 * rows).reshape(4 * rows, 4) / 100}
    made = in_stages(step, args, {}, {}, microbatches=4, count=count)
    return made, jax.tree.leaves(args), jax.tree.leaves(jax.jit(step)(*args))


def controller(schedule: Schedule, rows: int, each: int) -> Controller:
    made, _, _ = staged(schedule.pieces, rows)
    n = schedule.devices
    devices = [jax.devices()[d * each : (d + 1) * each] for d in range(n)]
    return Controller(made.traced, made.loop, made.stages, schedule, devices)


def agrees(run: Controller, rows: int) -> bool:
    _, flat, want = staged(run.schedule.pieces, rows)
    pairs = zip(jax.device_get(run(*flat)), jax.device_get(want), strict=True)
    return all(bool(jnp.allclose(x, y, atol=1e-6)) for x, y in pairs)


def test_there_is_nothing_to_say_of_what_is_done_as_asked() -> None:
    assert controller(generators.one_f_one_b(2, 4), rows=4, each=2).notes == ()
    assert controller(offload.pipe_offload(2, 4), rows=4, each=1).notes == ()


def test_activations_that_can_not_be_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on devices whose only memory is the host's."""
    monkeypatch.setattr("autoshard.controller._host_memory", lambda _: "")
    run = controller(offload.pipe_offload(2, 4), rows=1, each=1)
    assert agrees(run, rows=1)
    assert run.notes == (
        "PipeOffload offloads activations, but the devices reach no memory of a host besides their "
        "own: all stay there, and a device holds those of up to 4 microbatches of a piece instead "
        "of 3",
    )
