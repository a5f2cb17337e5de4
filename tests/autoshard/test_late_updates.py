"""Gradients of weights outside loops wait for their update until the backward pass is over."""

from __future__ import annotations

from typing import Any

import pytest
import zoo

import autoshard
from autoshard.bound_plan import Plan
from autoshard.trace import trace
from passes.answer import read_back
from passes.held import Held, held
from passes.late_updates import updated_last

WIDTH, LAYERS = 4096, 6


def planned(cluster: str, devices: int, solver: str = "fsdp", **options: Any) -> Plan:
    step, args = zoo.mlp(width=WIDTH, layers=LAYERS, batch=2048 * devices)
    mesh = {"data": devices}
    return autoshard.plan(
        step, *args, cluster=cluster, mesh=mesh, solver=solver, donate_argnums=(0,), **options
    )


def gradients(plan: Plan) -> list[Held]:
    """Whole gradients of weights, as each device makes them, but for that of the first layer."""
    assert plan._found is not None
    found = plan._found
    graph, live = found.priced.graph, found.priced.live
    late = updated_last(graph)
    answer = read_back(found.priced, found.solution.choice)
    makers = graph.producers()
    lying = held(found.priced, answer.values, answer.changes)
    whole = [h for h in lying if h.nbytes == WIDTH * WIDTH * 4 and makers[h.value] in late]
    return sorted((h for h in whole if h.begin == live.when[makers[h.value]]), key=lambda h: h.end)


def test_products_that_no_other_waits_for_are_used_behind_the_last_that_one_does() -> None:
    step, args = zoo.mlp(width=WIDTH, layers=3, batch=512)
    graph = trace(step, *args).graph
    products = [op.id for op in graph.ops if op.name == "dot_general"]
    third, _, second, last, _ = products[3:]
    assert updated_last(graph) == {third: last, second: last}


@pytest.mark.parametrize("cluster", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "h100:8"])
def test_whole_gradients_wait_on_a_tpu_that_gathers_inside_kernels(cluster: str) -> None:
    ends = [h.end for h in gradients(planned(cluster, 8))]
    assert len(ends) >= LAYERS - 2
    together = len(ends) - len(set(ends)) >= LAYERS - 3
    assert together is not cluster.startswith("h100")


def test_whole_gradients_do_not_wait_where_all_weights_lie_whole() -> None:
    whole = {"batch/*": ("data", None), "state/*/*/w": (None, None)}
    ends = [h.end for h in gradients(planned("v5p:2x2x2", 8, solver="ilp", hints=whole))]
    assert len(set(ends)) == len(ends) == LAYERS - 1


@pytest.mark.libtpu
@pytest.mark.parametrize("cluster", ["v5p:2x2x2"])
def test_the_tpu_compiler_makes_new_state_last(cluster: str) -> None:
    plan = planned(cluster, 8)
    compiled = plan.verify().compiled
    assert compiled is not None
    assert compiled.memory is not None
    beside = compiled.memory.arguments + (LAYERS - 2) * WIDTH * WIDTH * 4
    assert compiled.memory.peak > beside
    assert plan.cost.peak_memory == pytest.approx(compiled.memory.peak, rel=0.15)
