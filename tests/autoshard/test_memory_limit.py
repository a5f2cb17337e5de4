"""Plans near their memory limit fit by the exact count, cost little more, and say what binds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard
from passes.fitting import copies, with_copies
from passes.plan_cost import cost_of
from passes.solve.ilp import solve

MIB = 2**20


def step(weights: list[jax.Array], x: jax.Array) -> Any:
    def loss(weights: list[jax.Array]) -> jax.Array:
        y = x
        for w in weights:
            y = jnp.tanh(y @ w)
        return jnp.mean(y**2)

    return [w - 0.1 * g for w, g in zip(weights, jax.grad(loss)(weights), strict=True)]


def planned(limit_mib: int | None) -> autoshard.Plan:
    weight, x = (jax.ShapeDtypeStruct((n, 4096), jnp.float32) for n in (4096, 2048))
    return autoshard.plan(
        step,
        [weight] * 8,
        x,
        cluster="h100:8",
        mesh={"data": 8},
        memory_limit=None if limit_mib is None else limit_mib * MIB,
        donate_argnums=0,
    )


def fsdp(plan: autoshard.Plan) -> float:
    return min(a.cost.step_time for a in plan.alternatives if a.solver == "fsdp" and a.cost)


def test_a_limit_that_only_copies_break_costs_little() -> None:
    free, tight = planned(None), planned(250)
    assert free.cost.peak_memory > 250 * MIB >= tight.cost.peak_memory
    assert free.cost.step_time < tight.cost.step_time < 1.02 * free.cost.step_time
    assert tight.cost.step_time < 0.8 * fsdp(tight), "a baseline would have fitted, too"


def test_a_tight_limit_is_kept_and_no_baseline_is_faster() -> None:
    tight = planned(180)
    assert tight.cost.peak_memory <= 180 * MIB
    assert tight.cost.step_time <= fsdp(tight)


def test_copies_that_did_not_fit_are_told_to_the_problem() -> None:
    plan = planned(250)
    found = plan._search()
    assert found is not None
    priced, limit = found.priced, 250.0 * MIB
    choice = solve(priced.problem).choice
    exact = cost_of(priced, choice).peak_memory
    assert priced.problem.memory(choice).max() <= limit < exact
    told = with_copies(priced.problem, copies(priced, choice, limit))
    assert told.memory(choice).max() == pytest.approx(exact)
    assert told.cost(choice) == priced.problem.cost(choice)


def test_a_plan_says_what_more_memory_would_save() -> None:
    assert not any("memory binds" in note for note in planned(None).data.notes)
    tight = planned(200)
    (said,) = (note for note in tight.data.notes if note.startswith("memory binds at "))
    assert "16 MiB more would save about" in said
    assert "test_memory_limit.py" in said
    assert said in " ".join(str(tight).split())
