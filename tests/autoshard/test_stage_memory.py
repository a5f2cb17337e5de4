"""What lies on the devices of a pipeline while it runs: never more than the plan foresees."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipeline_models import filled, worst
from zoo import gpt

import autoshard
from autoshard.controller import Controller
from autoshard.stacked_array import StackedArray

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def on_devices() -> Counter[int]:
    """Bytes of all arrays that there are, by device."""
    buffers = {
        (s.device.id, s.data.unsafe_buffer_pointer()): s.data.nbytes
        for x in jax.live_arrays()
        if not x.is_deleted()
        for s in x.addressable_shards
    }
    out: Counter[int] = Counter()
    for (device, _), nbytes in buffers.items():
        out[device] += nbytes
    return out


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The most bytes on a device after any thing that a controller does, since last asked."""
    before = on_devices()
    most: Counter[int] = Counter()

    def watching(name: str) -> Callable[..., Any]:
        own = getattr(Controller, name)

        def run(self: Controller, *args: Any) -> Any:
            out = own(self, *args)
            for device, nbytes in on_devices().items():
                most[device] = max(most[device], nbytes - before[device])
            return out

        return run

    for name in ("_placed", "_prepared", "_start", "_after"):
        monkeypatch.setattr(Controller, name, watching(name))

    def asked() -> int:
        found = max(most.values())
        most.clear()
        return found

    return asked


@pytest.mark.parametrize(
    ("schedule", "mesh"),
    [
        ("1F1B", {"stage": 4, "data": 1, "model": 2}),
        pytest.param(
            "interleaved 1F1B", {"stage": 2, "data": 2, "model": 2}, marks=pytest.mark.slow
        ),
        pytest.param("ZB-V", {"stage": 2, "data": 4, "model": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_step_holds_no_more_than_is_planned(
    schedule: str, mesh: dict[str, int], watched: Callable[[], int]
) -> None:
    fn, shapes = gpt(width=128, layers=8, heads=2, sequence=16, batch=16, vocab=64, scan=True)
    args = filled(shapes)
    plan = autoshard.plan(
        fn,
        *args,
        cluster="cpu:8",
        stages=mesh["stage"],
        mesh=mesh,
        schedule=schedule,
        microbatches=4,
        donate_argnums=0,
    )
    want = [np.array(x) for x in jax.tree.leaves(jax.jit(fn)(*args))]
    state, *batch = jax.tree.map(np.array, args)
    del args
    step = plan.compile()
    out = step(state, *batch)
    assert worst(jax.tree.leaves(out), want) < 1e-4
    pieces = any(isinstance(x, StackedArray) for x in jax.tree.leaves(out))
    assert not pieces or "StackedArray" in str(plan)
    watched()
    old = out[0]
    out = step(old, *batch)
    # Arrays of tasks are all there is to see here: what a task needs inside comes on top.
    assert 0.5 * plan.cost.peak_memory < watched() <= plan.cost.peak_memory
    assert all(x.is_deleted() for x in jax.tree.leaves(old) if x.nbytes > 4096)


def test_without_donation_the_old_state_stays() -> None:
    fn, shapes = gpt(width=32, layers=4, heads=2, sequence=8, batch=8, vocab=32, scan=True)
    args = filled(shapes)
    plan = autoshard.plan(fn, *args, cluster="cpu:4", stages=4, microbatches=4)
    step = plan.compile()
    first = step(*args)
    again = step(*args)
    assert worst(jax.tree.leaves(again), jax.tree.leaves(first)) == 0
    before = [np.array(x) for x in jax.tree.leaves(first)]
    step(first[0], *args[1:])
    after = [np.array(x) for x in jax.tree.leaves(first)]
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))


def test_stacked_arrays_are_read_as_arrays() -> None:
    devices = jax.devices()[:3]
    parts = np.split(np.arange(20.0, dtype=np.float32).reshape(10, 2), [3, 4])
    x = StackedArray(tuple(map(jax.device_put, parts, devices)))
    whole = np.concatenate(parts)
    assert (x.shape, x.dtype, x.ndim, x.size, x.nbytes) == ((10, 2), np.float32, 2, 20, 80)
    assert len(x) == 10
    assert np.array_equal(np.asarray(x), whole)
    assert np.array_equal(np.asarray(x, np.float64), whole)
    assert np.array_equal(jnp.asarray(x), whole)
    assert np.array_equal(jax.device_get({"a": x})["a"], whole)
    for k in range(-10, 10):
        assert np.array_equal(x[k], whole[k])
    assert x[9].devices() == {devices[2]}
    assert np.array_equal(x[2:5, 1], whole[2:5, 1])
    assert x.part(3, 4) is x.pieces[1]
    assert np.array_equal(x.part(2, 5), whole[2:5])
    assert jax.block_until_ready(x) is x
    assert not x.is_deleted()
    assert repr(x) == "StackedArray(float32[10,2] of 3, 1, 6 layers)"
    with pytest.raises(IndexError, match="layer 10 of an array of 10"):
        x[10]
    with pytest.raises(ValueError, match="copied"):
        np.asarray(x, copy=False)
    x.pieces[1].delete()
    assert x.is_deleted()
