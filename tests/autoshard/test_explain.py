"""Explanations, held against planning again with the other choice written as a hint."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard
from autoshard.api import Plan
from autoshard.explain import explain
from passes.hints import HintError
from passes.ir.sharding import Sharding
from passes.what_if import Other, what_if, without_limit

F32 = jnp.float32
MESH = {"data": 2, "model": 2}


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, F32)


def train_step(params: Any, x: Any) -> Any:
    def loss(params: Any) -> Any:
        h = x
        for p in params:
            h = h + jnp.tanh(h @ p["w1"]) @ p["w2"]
        return (h**2).mean()

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value


def arguments(layers: int = 1) -> tuple[Any, ...]:
    layer = {"w1": shape(512, 1024), "w2": shape(1024, 512)}
    return [layer] * layers, shape(256, 512)


def annotated(x: Any, w: Any) -> Any:
    y = autoshard.annotate(x @ w, "data", autoshard.OPEN)  # here
    return jnp.tanh(y).sum()


def made(**options: Any) -> Plan:
    options = {"cluster": "tpu-v5e:2x2", "mesh": MESH, "donate_argnums": (0,), **options}
    return autoshard.plan(train_step, *arguments(), **options)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return made()


def value_of(plan: Plan, name: str) -> int:
    assert plan._found is not None
    return next(v.id for v in plan._found.priced.graph.values if v.name == name)


def others(plan: Plan, name: str) -> tuple[Other, ...]:
    assert plan._found is not None
    return what_if(plan._found, value_of(plan, name)).others


def spec(plan: Plan, other: Other) -> tuple[tuple[str, ...], ...]:
    return Sharding(other.axes).spec(2, plan.data.mesh_axes)


@pytest.mark.parametrize("name", ["params[0]['w1']", "params[0]['w2']", "x"])
def test_prices_are_those_of_planning_with_the_choice_as_a_hint(plan: Plan, name: str) -> None:
    found = others(plan, name)
    assert len(found) >= 4
    for other in found:
        assert other.cost is not None
        again = made(hints={name: spec(plan, other)})
        assert again.data.status == "optimal"
        if name == "x":  # two operations read it: a hinted value is not gathered once for both
            assert other.cost.step_time <= again.cost.step_time
        else:
            assert other.cost.step_time == pytest.approx(again.cost.step_time, rel=1e-6)


def test_others_are_sorted_and_do_not_include_the_choice(plan: Plan) -> None:
    found = others(plan, "params[0]['w1']")
    times = [o.cost.step_time for o in found if o.cost]
    assert times == sorted(times)
    assert len({o.axes for o in found}) == len(found)
    spec_now = plan.data.arguments[0].spec
    assert spec_now not in [spec(plan, o) for o in found]
    if plan.data.status == "optimal":
        assert times[0] >= plan.cost.step_time * (1 - 1e-9)


def test_what_a_hint_costs_is_the_difference_to_the_plan_without_it(plan: Plan) -> None:
    bad = made(hints={"x": (None, "model")})
    free = others(bad, "x")
    best = min(o.cost.step_time for o in free if o.cost)
    assert best == pytest.approx(plan.cost.step_time, rel=1e-2)
    text = bad.explain("x")
    assert "why  fixed: hints['x']" in text
    assert "without the hint it could be" in text


def test_an_annotation_is_named_with_its_line() -> None:
    args = shape(256, 512), shape(512, 512)
    plan = autoshard.plan(annotated, *args, cluster="tpu-v5e:2x2", mesh=MESH)
    with open(__file__, encoding="utf-8") as file:
        line = next(n for n, text in enumerate(file, 1) if text.rstrip().endswith("# here"))
    text = plan.explain(f"test_explain.py:{line}")
    assert f"fixed: hint test_explain.py:{line}" in text


def test_a_limit_that_binds_is_said_with_what_it_costs(plan: Plan) -> None:
    tight = made(memory_limit=0.5 * plan.cost.peak_memory)
    assert tight._found is not None
    assert plan._found is not None
    free = without_limit(tight._found)
    assert without_limit(plan._found) is None
    assert "the limit does not bind" in plan.explain("x")
    assert free is not None
    assert free[0].step_time == pytest.approx(plan.cost.step_time, rel=1e-6)
    text = " ".join(tight.explain("x").split())
    assert re.search(r"the limit binds: with [\d.]+ MiB the step would take", text)


def test_what_would_not_fit_is_marked_and_comes_last(plan: Plan) -> None:
    tight = made(memory_limit=0.35 * plan.cost.peak_memory)
    found = [o for o in others(tight, "params[0]['w1']") if o.cost]
    assert [o.fits for o in found] == sorted((o.fits for o in found), reverse=True)
    assert all(o.fits == (o.cost.peak_memory <= tight.data.memory_limit) for o in found if o.cost)
    assert not found[-1].fits
    assert "does not fit" in tight.explain("params/0/w1")


def test_layers_that_are_alike_are_explained_once() -> None:
    hints = {"params/*/w1": (None, "model")}
    plan = autoshard.plan(train_step, *arguments(3), cluster="tpu-v5e:2x2", mesh=MESH, hints=hints)
    text = plan.explain("params/*/w1")
    assert text.count("without the hint it could be") == 1
    assert "x3, the first one explained" in text


def test_a_group_explains_all_in_it(plan: Plan) -> None:
    assert plan.explain("params") == plan.explain("params/**")


@pytest.mark.parametrize(
    ("glob", "said"),
    [
        ("params/0/w11", "the nearest are params/0/w1, params/0/w2, x"),
        ("nowhere.py:3", "lines of the program are test_explain.py:"),
    ],
)
def test_a_glob_that_names_nothing(plan: Plan, glob: str, said: str) -> None:
    with pytest.raises(HintError, match="names no argument") as error:
        plan.explain(glob)
    assert said in str(error.value)


def test_a_plan_that_was_read_back_says_what_it_knows(plan: Plan) -> None:
    read = Plan.from_json(plan.to_json())
    text = read.explain("**/w1")
    assert "params/0/w1" in text
    assert "plan.bind(fn, *args)" in text
    with pytest.raises(HintError, match="the nearest are params/0/w1"):
        read.explain("params/0/w11")


def test_a_plan_that_was_read_back_and_bound_explains_all(plan: Plan) -> None:
    made_here = made(donate_argnums=())
    bound = Plan.from_json(made_here.to_json()).bind(train_step, *arguments())
    assert bound.explain("**/w1") == made_here.explain("**/w1")


def test_propagation_shows_the_way_from_the_hint() -> None:
    plan = made(solver="propagate", hints={"x": ("data", None)})
    text = plan.explain("x")
    assert "x, f32[256,512]: data splits dim 0, hinted by hints['x'] as [data, .]" in text
    assert "nothing was searched" in plan.explain("params/0/w1")


def test_every_line_of_an_explanation_is_short(plan: Plan) -> None:
    for glob in ("**", "result/**", "test_explain.py:*"):
        lines = plan.explain(glob).splitlines()
        assert max(map(len, lines)) <= 100
        assert len(lines) <= 90


def test_explanation_does_not_change_from_call_to_call(plan: Plan) -> None:
    assert plan.explain("x") == made().explain("x")
    told: list[str] = []
    tell: Callable[[str], None] = told.append
    explain(plan.data, plan._found, "x", tell)
    assert told
