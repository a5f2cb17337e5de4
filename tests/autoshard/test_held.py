"""What lies in memory beside the values: copies, and summands before they are summed."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard
from autoshard.state import state_pairs
from autoshard.trace import trace
from passes.answer import read_back
from passes.held import Held, held
from passes.search import Found, search


def step(ws: Any, x: Any, again: bool = False) -> Any:
    """again: computes its layers again in the backward pass."""

    def layer(c: Any, w: Any) -> Any:
        return jnp.tanh(c @ w), None

    if again:
        layer = jax.checkpoint(layer)

    def loss(ws: Any) -> Any:
        return jnp.square(jax.lax.scan(layer, x, ws)[0]).mean()

    return jax.tree.map(lambda w, g: w - 0.1 * g, ws, jax.grad(loss)(ws))


def planned(cluster: str, again: bool = False) -> Found:
    args = (
        jax.ShapeDtypeStruct((4, 512, 512), "float32"),
        jax.ShapeDtypeStruct((8192, 512), "float32"),
    )
    traced = trace(partial(step, again=again), *args)
    return search(traced.graph, autoshard.cluster(cluster), solver="fsdp")


def summands(found: Found) -> list[Held]:
    """Of the weights' gradients, products inside the backward loop."""
    graph = found.priced.graph
    answer = read_back(found.priced, found.solution.choice)
    makers = graph.producers()
    products = [
        h
        for h in held(found.priced, answer.values, answer.changes)
        if h.copy and graph.ops[makers[h.value]].name == "dot_general"
    ]
    return [h for h in products if graph.values[h.value].shape == (512, 512)]


@pytest.mark.parametrize("again", [False, True])
def test_a_tpu_keeps_summands_of_a_stacked_gradient_to_the_end_of_the_body(again: bool) -> None:
    found = planned("v5e:2x4", again)
    graph, live = found.priced.graph, found.priced.live
    ends = {live.when[r.end - 1] for r in graph.regions if r.kind == "scan"}
    (one,) = summands(found)
    assert one.end in ends
    assert one.end > one.begin + 1


def test_elsewhere_summands_lie_there_while_they_are_summed() -> None:
    found = summands(planned("h100:8"))
    assert found
    assert all(h.end == h.begin + 1 for h in found)


def head_step(state: Any, x: Any) -> Any:
    def loss(state: Any) -> Any:
        layers, head = state
        y = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, layers)[0]
        return jnp.square(y @ head).mean()

    return jax.tree.map(lambda w, g: w - 0.1 * g, state, jax.grad(loss)(state))


def copies_of(found: Found, shape: tuple[int, ...]) -> list[Held]:
    graph = found.priced.graph
    answer = read_back(found.priced, found.solution.choice)
    every = held(found.priced, answer.values, answer.changes)
    return [h for h in every if h.copy and graph.values[h.value].shape == shape]


@pytest.mark.parametrize("cluster", ["v5e:2x4", "h100:8"])
def test_a_tpu_gathers_beside_what_runs_before(cluster: str) -> None:
    def run(x: Any, w: Any, late: Any) -> Any:
        for _ in range(8):
            x = jnp.cumsum(x @ w, 1)
        return x @ late

    x, w = (jax.ShapeDtypeStruct((n, 4096), "bfloat16") for n in (8192, 4096))
    late = jax.ShapeDtypeStruct((4096, 2048), "bfloat16")
    hints = {"x": ("data", None), "w": (None, None), "late": ("data", None)}
    plan = autoshard.plan(run, x, w, late, cluster=cluster, mesh={"data": 8}, hints=hints)
    assert plan._found is not None
    live = plan._found.priced.live
    (copy,) = copies_of(plan._found, (4096, 2048))
    last = max(o.id for o in plan._found.priced.graph.ops if o.name == "dot_general")
    assert copy.end == live.when[last] + 1
    if cluster == "h100:8":
        assert copy.begin == live.when[last]
    else:  # not all the way: its gather takes a part of the time
        assert 0 < copy.begin < live.when[last]


@pytest.mark.parametrize(("size", "together"), [(1024, True), (2048, False)])
def test_a_gpu_gathers_together_what_is_there_and_small(size: int, together: bool) -> None:
    def run(x: Any, weights: Any) -> Any:
        for w in weights:
            x = jnp.cumsum(x @ w, 1)
        return x

    x, w = (jax.ShapeDtypeStruct((n, size), "float32") for n in (8192, size))
    hints = {"x": ("data", None), "weights/*": ("data", None)}
    plan = autoshard.plan(run, x, [w] * 3, cluster="h100:8", mesh={"data": 8}, hints=hints)
    assert plan._found is not None
    begins = sorted(c.begin for c in copies_of(plan._found, (size, size)))
    assert len(begins) == 3
    assert (begins[0] == begins[1] == begins[2]) is together  # 4 MiB each, or 16


def test_gathers_of_little_hold_up_no_gather_of_a_weight() -> None:
    def run(x: Any, w: Any, few: Any, late: Any) -> Any:
        for _ in range(8):
            x = jnp.cumsum(x @ w, 1)
        x = x + jnp.sum(x @ few, axis=1, keepdims=True)
        return jnp.cumsum(x, 1) @ late

    x, w = (jax.ShapeDtypeStruct((n, 4096), "bfloat16") for n in (8192, 4096))
    few, late = (jax.ShapeDtypeStruct((4096, n), "bfloat16") for n in (16, 8192))
    hints = {"x": ("data", None), "w": (None, None)} | dict.fromkeys(
        ("few", "late"), ("data", None)
    )
    given, mesh = (x, w, few, late), {"data": 8}
    plan = autoshard.plan(run, *given, cluster="v5e:2x4", mesh=mesh, hints=hints)
    assert plan._found is not None
    (copy,) = copies_of(plan._found, (4096, 8192))
    (small,) = copies_of(plan._found, (4096, 16))
    assert copy.begin < small.begin - 1  # not only as that is read


def test_a_tpu_lays_operands_of_small_products_anew() -> None:
    def crossed(x: Any, g: Any) -> Any:
        return jnp.einsum("bij,bjd->bid", g, x)

    args = (jax.ShapeDtypeStruct((1 << 14, 9, n), "float32") for n in (64, 9))
    found = search(trace(crossed, *args).graph, autoshard.cluster("v5p:1x1x1"))
    assert [h.nbytes for h in copies_of(found, (1 << 14, 9, 64))] == [(1 << 14) * 16 * 128 * 2]
    assert [h.nbytes for h in copies_of(found, (1 << 14, 9, 9))] == [(1 << 14) * 16 * 128 * 2]


@pytest.mark.parametrize("cluster", ["v5e:2x4", "h100:8"])
def test_a_tpu_keeps_a_whole_sum_while_a_loop_runs_before_its_update(cluster: str) -> None:
    layers = jax.ShapeDtypeStruct((4, 512, 512), "float32")
    head = jax.ShapeDtypeStruct((512, 32768), "float32")  # far beyond what VMEM would hold
    args = (layers, head), jax.ShapeDtypeStruct((8192, 512), "float32")
    traced = trace(head_step, *args, donate_argnums=(0,))
    on, state = autoshard.cluster(cluster), state_pairs(traced)
    found = search(traced.graph, on, solver="fsdp", state=state)
    graph, live = found.priced.graph, found.priced.live
    answer = read_back(found.priced, found.solution.choice)
    whole = [h for h in held(found.priced, answer.values, answer.changes) if h.copy]
    (sum_,) = (h for h in whole if graph.values[h.value].shape == (32768, 512))
    backward = max(r.end for r in graph.regions if r.kind == "scan")
    assert sum_.nbytes == 512 * 32768 * 4
    assert (sum_.end > live.when[backward - 1]) is (cluster == "v5e:2x4")


def test_on_gpus_what_all_read_moved_dies_when_it_has_moved() -> None:
    def experts(weights: Any, x: Any) -> Any:
        hidden = jnp.einsum("ebd,edf->ebf", autoshard.annotate(x, None, "x", None), weights[0])
        mixed = [jnp.einsum("ebf,efd->ebd", hidden, w) for w in weights[1:]]
        return [autoshard.annotate(y, "x", None, None) for y in mixed]

    def f32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, "float32")

    weights = [f32(8, 1024, 256), f32(8, 256, 1024), f32(8, 256, 512)]
    graph = trace(experts, weights, f32(8, 512, 1024)).graph
    found = search(graph, autoshard.cluster("h100:8"), hints=graph.hints)
    answer = read_back(found.priced, found.solution.choice)
    (change,) = (c for c in answer.changes if c.side == "copy" and c.value not in graph.inputs)
    lying = list(held(found.priced, answer.values, answer.changes))
    original = next(h for h in lying if h.value == change.value and not h.copy)
    moved = next(h for h in lying if h.value == change.value and h.copy)
    assert original.end == moved.begin + 1 < moved.end
