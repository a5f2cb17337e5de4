"""Meshes searched by one process or by two: the same plan, also where a process fails."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import zoo
from jax.sharding import PartitionSpec as P

import autoshard
from passes import hands
from passes.hints import HintError

f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[hands.Elsewhere]:
    """Every search has a process of its own for half of its meshes; those that were started."""
    out: list[hands.Elsewhere] = []

    class Noted(hands.Elsewhere):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            out.append(self)

    monkeypatch.setattr(hands, "_MANY", 0)
    monkeypatch.setattr(hands, "_cores", lambda: 2)
    monkeypatch.setattr(hands, "Elsewhere", Noted)
    return out


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "_cores", lambda: 1)


JOBS = {
    "gpt": (lambda: zoo.gpt2_small_unrolled(2, batch=8, sequence=128), "h100:8", {}),
    "scan": (lambda: zoo.gpt2_small_scan(2, batch=8, sequence=128), "v5e:4x4", {}),
    "dlrm": (zoo.dlrm, "v5e:2x4", {"hints": {"batch/*": P("data")}}),
    "tight": (lambda: zoo.mlp(512, 4, 1024), "h100:8", {"memory_limit": "24MiB"}),
}


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_find_what_one_finds(
    name: str, started: list[hands.Elsewhere], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, cluster, options = JOBS[name]
    fn, args = make()
    plan = partial(autoshard.plan, fn, *args, cluster=cluster, donate_argnums=0, **options)
    together = plan()
    assert len(started) == 1
    assert started[0].process.returncode is not None  # none is left behind
    alone(monkeypatch)
    assert plan().to_json() == together.to_json()
    assert len(started) == 1


@pytest.mark.parametrize("when", ["at once", "in the search"])
def test_a_process_that_dies_is_replaced(
    when: str, started: list[hands.Elsewhere], monkeypatch: pytest.MonkeyPatch
) -> None:
    fn, args = JOBS["gpt"][0]()
    plan = partial(autoshard.plan, fn, *args, cluster="h100:8", donate_argnums=0)

    def killed(message: str) -> None:
        if started and message.startswith("pricing" if when == "at once" else "mesh"):
            started[0].process.kill()

    broken = plan(progress=killed)
    assert started[0].instead is not None
    alone(monkeypatch)
    assert plan().to_json() == broken.to_json()


def test_what_can_not_be_sent_is_searched_here(
    started: list[hands.Elsewhere], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(what: object) -> bytes:
        raise TypeError("cannot pickle this")

    fn, args = JOBS["gpt"][0]()
    plan = partial(autoshard.plan, fn, *args, cluster="h100:8", donate_argnums=0)
    before = plan().to_json()
    assert len(started) == 1
    monkeypatch.setattr(hands, "_dumped", never)
    assert plan().to_json() == before
    assert len(started) == 1


def test_hints_that_fit_no_mesh_say_so_from_elsewhere(started: list[hands.Elsewhere]) -> None:
    def fn(x: Any) -> Any:
        return x * 2

    with pytest.raises(HintError, match="divide"):
        autoshard.plan(fn, f32((63, 64)), cluster="h100:8", hints={"x": P("data")})
    assert started


def test_an_interrupt_ends_both_with_what_they_have(started: list[hands.Elsewhere]) -> None:
    fn, args = JOBS["scan"][0]()

    def interrupt(message: str) -> None:
        if message.startswith("mesh"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        autoshard.plan(fn, *args, cluster="v5e:4x4", donate_argnums=0, progress=interrupt)
    assert started[0].process.returncode is not None
