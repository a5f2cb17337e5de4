"""What tasks hand on: everybody gets it once; memory is taken over where nobody else sees it."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from autoshard.between_tasks import HandedOn, Shelf, donated, handed_on
from autoshard.in_stages import in_stages
from autoshard.stage_programs import StagePrograms, stage_programs
from autoshard.time_loop import Program

STAGES = 4


@cache
def made(skip: bool) -> tuple[StagePrograms, HandedOn]:
    """Dense layers; with a skip, from the first stage to the last."""

    def step(weights: list[Any], x: Any) -> Any:
        def loss(weights: list[Any]) -> Any:
            y = first = jnp.tanh(x @ weights[0])
            for w in weights[1:-1]:
                y = jnp.tanh(y @ w)
            return jnp.mean(((y + first if skip else y) @ weights[-1]) ** 2)

        return jax.value_and_grad(loss)(weights)

    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    staged = in_stages(step, ([shape] * 8, shape), {}, {}, microbatches=4, count=STAGES)
    programs = stage_programs(Program(staged.traced, staged.loop), staged.stages)
    return programs, handed_on(programs)


@pytest.mark.parametrize("skip", [False, True])
def test_every_value_is_there_when_needed_and_gone_afterwards(skip: bool) -> None:
    """In the order of a microbatch: forward down the stages, backward up; each is sent once."""
    programs, between = made(skip)
    sent: list[tuple[Any, int]] = []

    def send(place: int, x: Any, microbatch: int, stage: int) -> Any:
        sent.append((x, stage))
        return x

    shelf = Shelf(between, programs.after, send)
    forward = [(s, "F") for s in range(STAGES)]
    backward = [(s, kind) for s in reversed(range(STAGES)) for kind in "BW"]
    for key in [*forward, *backward]:
        task = programs.tasks.get(key)
        if task is not None:
            assert shelf.take(task, 0) == {p: p for p in task.ins}
            for p in task.outs:
                shelf.put(p, 0, task.stage, p)
    assert {p for p, _, _ in shelf.values} <= set(programs.after)
    assert len(sent) == len(set(sent))
    over = {
        p for p, stages in between.users.items() if between.homes[p] == (0, "F") and 3 in stages
    }
    assert bool(over) == skip


def test_nothing_is_taken_over_that_others_may_see() -> None:
    programs, between = made(skip=False)
    tasks = programs.tasks.values()
    alone = {(t.stage, t.kind): donated(programs, t, between, lambda a, b: False) for t in tasks}
    assert any(alone.values())
    for (stage, kind), given in alone.items():
        assert set(given) <= set(between.last[stage, kind])
        assert len(given) <= len(programs.tasks[stage, kind].outs)
    for t in tasks:  # as when all stages lie on the same devices
        crossing = [p for p in alone[t.stage, t.kind] if {between.homes[p][0], *between.users[p]}
                    != {t.stage}]  # fmt: skip
        together = donated(programs, t, between, lambda a, b: True)
        assert not set(crossing) & set(together)


def test_nothing_is_taken_over_by_what_lies_otherwise() -> None:
    programs, between = made(skip=False)
    for t in programs.tasks.values():
        given = donated(programs, t, between, lambda a, b: False, split=lambda p: p)
        assert given == ()
