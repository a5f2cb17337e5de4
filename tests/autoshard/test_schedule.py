"""Operations run in an order that their operands allow, and a step's updates run early."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

import autoshard
from autoshard.state import state_pairs
from autoshard.trace import Traced, trace
from cost_models.cluster import cluster
from passes.compiler import Scheduler, scheduler
from passes.fusion import fuse
from passes.late_gradients import adds, run_last
from passes.liveness import Liveness, liveness
from passes.relaid import Copied, as_laid, copied, copy_bytes, in_groups
from passes.stored_bytes import stored_bytes

ZOO: dict[str, Callable[[], Any]] = {
    "gpt": partial(zoo.gpt2_small_unrolled, layers=2, batch=4),
    "gpt scanned": partial(zoo.gpt2_small_scan, layers=2, batch=4),
    "conv_net": partial(zoo.conv_net, blocks=1),
    "dlrm": zoo.dlrm,
    "decode": partial(zoo.gpt_decode, layers=2),
}


PICKED = jax.ShapeDtypeStruct((64,), jnp.int32)


def lived(traced: Traced, platform: str, hides: bool = False) -> Liveness:
    """Lives on a TPU, on a GPU, or on one whose scheduler hides latencies."""
    graph = traced.graph
    fusion = fuse(graph, platform)
    pairs = [p for p in state_pairs(traced) if p[0] in graph.donated]
    tpu = platform == "tpu"
    how = Scheduler(hides, updates_late=tpu, frees_first=tpu)
    return liveness(graph, fusion.stored, pairs, fusion.filled, how)


@pytest.mark.parametrize(("platform", "hides"), [("tpu", False), ("gpu", False), ("gpu", True)])
@pytest.mark.parametrize("name", ZOO)
def test_every_operation_runs_once_after_what_it_reads(
    name: str, platform: str, hides: bool
) -> None:
    fn, args = ZOO[name]()
    traced = trace(fn, *args, donate_argnums=(0,))
    graph, live = traced.graph, lived(traced, platform, hides)
    assert sorted(live.order) == list(range(len(graph.ops)))
    makers = graph.producers()
    for op in graph.ops:
        for v in op.inputs:
            assert makers[v] < 0 or live.when[makers[v]] < live.when[op.id]
    for region in graph.regions:
        steps = live.when[region.begin : region.end]
        if hides:  # gradients come last, in the loop around what they were made in
            steps = () if region.parent else tuple(sorted(steps))
        if platform == "tpu":  # what frees memory comes first
            steps = tuple(sorted(steps))
        if region.id and steps:  # what lies in a region lies together
            assert list(steps) == list(range(steps[0], steps[0] + len(steps)))


def test_the_product_that_frees_the_larger_value_runs_first_on_tpu() -> None:
    def gradients(p: Any, v: Any, g: Any) -> Any:
        kept = jnp.cumsum(p, 0)
        return jnp.cumsum(g @ v.T, 1), jnp.cumsum(kept.T @ g, 1)

    large, small = (jax.ShapeDtypeStruct((1024, n), jnp.float32) for n in (1024, 64))
    traced = trace(gradients, large, small, small)
    products = [op for op in traced.graph.ops if op.name == "dot_general"]
    sizes = {op.id: traced.graph.values[op.outputs[0]].type.size for op in products}
    of_large = max(sizes, key=sizes.__getitem__)
    of_small = max(o for o in sizes if o != of_large)
    assert of_large < of_small  # as it is traced
    on_tpu, on_gpu = (lived(traced, platform).when for platform in ("tpu", "gpu"))
    assert on_tpu[of_small] < on_tpu[of_large]
    assert on_gpu[of_small] > on_gpu[of_large]


@pytest.mark.parametrize("hides", [True, False])
def test_gradients_of_scanned_weights_come_last(hides: bool) -> None:
    fn, args = ZOO["gpt scanned"]()
    traced = trace(fn, *args, donate_argnums=(0,))
    graph, live = traced.graph, lived(traced, "gpu", hides)
    weights = {(768, 3072), (3072, 768), (768, 768)}
    body = {op.region for op in graph.ops if op.name == "scan_stack"}
    gradients, others = set[int](), set[int]()
    for op in graph.ops:
        if op.name == "dot_general" and op.region == max(body):  # the backward pass
            is_gradient = graph.values[op.outputs[0]].type.shape in weights
            (gradients if is_gradient else others).add(live.when[op.id])
    assert len(gradients) == 6
    assert (min(gradients) > max(others)) is hides


@pytest.mark.parametrize("hides", [True, False])
@pytest.mark.parametrize("name", ["gpt", "dlrm"])
def test_gradients_outside_loops_come_last_and_those_of_tables_behind_them(
    name: str, hides: bool
) -> None:
    fn, args = ZOO[name]()
    traced = trace(fn, *args, donate_argnums=(0,))
    graph, live = traced.graph, lived(traced, "gpu", hides)
    filled = fuse(graph, "gpu").filled
    weights = {(768, 3072), (3072, 768), (768, 768)}
    products, gradients, tables = list[int](), list[int](), list[int]()
    for op in graph.ops:
        made = [graph.values[v].type for v in op.outputs]
        if op.name == "dot_general" and made[0].shape != (50304, 768):  # a head's runs first
            (gradients if made[0].shape in weights else products).append(live.when[op.id])
        elif adds(op, filled) and made[0].shape[-1] == 64 and made[0].nbytes > 1 << 16:
            tables.append(live.when[op.id])
    if name == "gpt":
        assert len(gradients) == 12
        assert (min(gradients) > max(products)) is hides
    else:
        assert (min(tables) > max(products)) is hides


@pytest.mark.parametrize(
    ("gpus", "table", "compiled"),
    [
        ("h100:8", True, 223),
        ("h100:8", False, 140),
        ("a100:8", True, 143),
        ("a100:8", False, 125),
    ],
)
def test_what_gradients_wait_for_lies_there_where_rows_of_a_table_are_exchanged(
    gpus: str, table: bool, compiled: int
) -> None:
    """Peaks in MiB of XLA:GPU, of jax 0.10.2."""

    def loss(p: Any, x: Any, ids: Any) -> Any:
        x = x + p["table"][ids] if table else x
        for w in p["layers"]:
            x = jnp.tanh(x @ w)
        return jnp.mean(x * x)

    def step(p: Any, x: Any, ids: Any) -> Any:
        told, grads = jax.value_and_grad(loss)(p, x, ids)
        return jax.tree.map(lambda w, g: w - 0.1 * g, p, grads), told

    rows, width = 8 * 4096, 512
    p: Any = {"layers": [jax.ShapeDtypeStruct((width, width), jnp.float32)] * 12}
    if table:
        p["table"] = jax.ShapeDtypeStruct((16384, width), jnp.float32)
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
    plan = autoshard.plan(
        *(step, p, x, ids),
        cluster=gpus,
        mesh={"x": 8},
        hints={"p/table": jax.P(None, "x")} if table else {},
        solver="fsdp" if table else "dp",
        donate_argnums=(0,),
    )
    assert plan.cost.peak_memory / 2**20 == pytest.approx(compiled, rel=0.12)


def test_one_device_has_no_latency_to_hide() -> None:
    """XLA:GPU schedules for one H100 as for one A100, for each of several otherwise."""
    names = ("h100:1", "h100:8", "a100:8")
    assert [scheduler(cluster(n)).hides_latencies for n in names] == [False, True, False]


@pytest.mark.parametrize("moving", [True, False])
def test_gradients_wait_for_statistics_of_the_batch(moving: bool) -> None:
    def loss(ws: Any, x: Any) -> Any:
        for w in ws:
            x = x @ w
            x = jnp.tanh(x - x.mean(0 if moving else 1, keepdims=True))
        return jnp.mean(x * x)

    ws = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 4
    graph = trace(jax.grad(loss), ws, jax.ShapeDtypeStruct((1024, 256), jnp.float32)).graph
    assert bool(run_last(graph, frozenset())) is moving


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_head_is_updated_after_the_last_loop_on_tpu(platform: str) -> None:
    def step(state: Any, batch: Any) -> Any:
        def loss(state: Any) -> Any:
            layers, head = state
            x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch, layers)
            return jnp.sum((x @ head) ** 2), jnp.mean(x)

        (_, told), grads = jax.value_and_grad(loss, has_aux=True)(state)
        return jax.tree.map(lambda w, g: w - 0.1 * g, state, grads), told

    shapes = (4, 256, 256), (256, 512)
    state = tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    traced = trace(step, state, jax.ShapeDtypeStruct((64, 256), jnp.float32), donate_argnums=(0,))
    graph, live = traced.graph, lived(traced, platform)
    makers = graph.producers()
    loop = max(r.end for r in graph.regions if r.kind == "scan")
    ends = live.when[loop - 1]
    layers, head, told = (live.when[makers[v]] for v in graph.outputs)
    assert layers > ends
    assert (head > ends) is (platform == "tpu")
    assert told < ends  # what is no state does not wait
    made = [op for op in graph.ops if graph.values[op.outputs[0]].type.shape == (512, 256)]
    product = next(op for op in made if op.name == "dot_general")
    assert live.when[product.id] < ends  # nor does the gradient itself


@pytest.mark.parametrize("name", ZOO)
def test_what_is_donated_is_read_before_its_place_is_taken(name: str) -> None:
    fn, args = ZOO[name]()
    traced = trace(fn, *args, donate_argnums=(0,))
    graph, live = traced.graph, lived(traced, "tpu")
    makers, readers = graph.producers(), graph.consumers()
    for given, result in state_pairs(traced):
        if given in graph.donated and makers[result] >= 0:
            last = live.when[makers[result]]
            before = [o for o, _ in readers[given] if o < makers[result]]
            assert all(live.when[o] < last for o in before)


def table_step(optimizer: Any, clip: bool) -> tuple[Any, tuple[Any, ...]]:
    """A step of eight tables, whose gradients are each as large as a table."""
    rows, width = 4096, 128
    if clip:
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)

    def step(state: Any, picked: Any) -> Any:
        tables, memory = state

        def loss(tables: Any) -> Any:
            return sum(jnp.sum(t[picked] ** 2) for t in tables)

        grads = jax.grad(loss)(tables)
        updates, memory = optimizer.update(grads, memory, tables)
        return optax.apply_updates(tables, updates), memory

    tables = [jax.ShapeDtypeStruct((rows, width), jnp.float32)] * 8
    state = (tables, jax.eval_shape(optimizer.init, tables))
    return step, (state, PICKED)


def gradients_at_once(fn: Any, args: Any) -> int:
    """The most gradients that lie in memory together."""
    traced = trace(fn, *args, donate_argnums=(0,))
    live = lived(traced, "tpu")
    made = [op.outputs[0] for op in traced.graph.ops if op.name == "scatter-add"]
    there = np.zeros(live.steps + 1, int)
    for v in made:
        begin, end = live.spans[v]
        there[begin:end] += 1
    return int(there.max())


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adagrad(0.1), optax.adamw(0.1)])
def test_a_gradient_is_used_up_before_the_next_is_made(optimizer: Any) -> None:
    assert gradients_at_once(*table_step(optimizer, clip=False)) == 1


def test_gradients_wait_for_their_norm() -> None:
    assert gradients_at_once(*table_step(optax.sgd(0.1), clip=True)) == 8


@pytest.mark.parametrize("early", [True, False])
def test_zeros_of_a_gradient_are_arrays_on_gpu(early: bool) -> None:
    fn, args = table_step(optax.adagrad(0.1), clip=False)
    traced = trace(fn, *args, donate_argnums=(0,))
    fusion, live = fuse(traced.graph, "gpu"), lived(traced, "gpu", early)
    assert len(fusion.filled) == 16  # adagrad also picks zeros where it has seen no gradient
    there = np.zeros(live.steps + 1, int)
    for v in fusion.filled:
        begin, end = live.spans[v]
        there[begin:end] += 1
    assert there.max() == (16 if early else 1)
    assert not fuse(traced.graph, "tpu").filled


def test_a_constant_for_a_region_is_made_before_it() -> None:
    def fn(x: Any, picked: Any) -> Any:
        nothing = jnp.zeros_like(x)

        @jax.checkpoint
        def part(y: Any) -> Any:
            return jnp.where(jnp.sin(y) > 1, jnp.cos(y), nothing)

        return part(x) + jnp.zeros_like(x).at[picked].add(1.0)

    traced = trace(fn, jax.ShapeDtypeStruct((4096, 64), jnp.float32), PICKED)
    graph, live = traced.graph, lived(traced, "gpu")
    assert len(fuse(graph, "gpu").filled) == 2
    assert sorted(live.order) == list(range(len(graph.ops)))
    for region in graph.regions[1:]:
        steps = live.when[region.begin : region.end]
        assert list(steps) == list(range(steps[0], steps[0] + len(steps)))


def test_a_narrow_table_of_few_rows_has_a_copy_in_whole_tiles_on_tpu() -> None:
    def step(state: Any, picked: Any) -> Any:
        table, sums = state
        grads = jax.grad(lambda t: jnp.sum(t[picked] ** 2))(table)
        sums = sums + grads**2
        return table - grads / jnp.sqrt(sums + 1e-6), sums

    table = jax.ShapeDtypeStruct((1 << 16, 32), jnp.float32)
    args = ((table, table), PICKED)
    traced = trace(step, *args, donate_argnums=(0,))
    graph, live = traced.graph, lived(traced, "tpu")
    spans = copied(graph, live, stored_bytes(graph, "tpu"), "tpu")
    gradient = next(op.outputs[0] for op in graph.ops if op.name == "scatter-add")
    assert set(spans) == {*graph.inputs[:2], gradient}
    given, sums = (spans[v] for v in graph.inputs[:2])
    assert given.early == sums.early == 0  # beside gathers
    picked = next(op for op in graph.ops if op.name == "gather")
    added = next(op for op in graph.ops if op.name == "scatter-add")
    assert given.begin == live.when[picked.id]  # as they are needed
    assert sums.begin > live.when[added.id]
    whole = graph.values[gradient].type
    assert copy_bytes(whole, (-1,), (8,)) == 4 * whole.nbytes  # 128 columns for 32
    assert copy_bytes(whole, (0,), (8,)) == whole.nbytes / 2
    assert copy_bytes(whole, (1,), (8,)) == 4 * whole.nbytes  # however few
    assert copied(graph, live, stored_bytes(graph, "gpu"), "gpu") == {}


@pytest.mark.parametrize("narrow", [True, False])
def test_a_table_whose_gradient_is_resharded_has_a_copy_for_those_who_pick_on_tpu(
    narrow: bool,
) -> None:
    def step(state: Any, picked: Any, weights: Any) -> Any:
        def loss(table: Any) -> Any:
            rows = jnp.stack([table[picked], table[picked + 1]])
            return jnp.sum((rows if narrow else jnp.sin(rows)) @ weights)

        given, sums = state
        grads = jax.grad(loss)(given)
        sums = sums + grads**2
        return given - grads / jnp.sqrt(sums + 1e-6), sums

    rows = jax.ShapeDtypeStruct((1 << 16, 32), jnp.float32)
    weights = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    traced = trace(step, (rows, rows), PICKED, weights, donate_argnums=(0,))
    graph, live = traced.graph, lived(traced, "tpu")
    spans = copied(graph, live, stored_bytes(graph, "tpu"), "tpu")
    given, sums = (spans[v] for v in graph.inputs[:2])
    picks = [live.when[op.id] for op in graph.ops if op.name == "gather"]
    (table, state), gradient = graph.inputs[:2], given.gradient
    assert gradient == sums.gradient >= 0
    assert as_laid(given, table, set()).end > max(picks) + 1
    assert not as_laid(given, table, set()).narrow  # the update wants it as it is
    assert as_laid(given, table, {gradient}).end == max(picks) + 1
    assert as_laid(given, table, {gradient}).narrow is narrow
    assert as_laid(sums, state, {gradient}).end == 0
    assert as_laid(given, table, {gradient, table}).end == 0  # another copy is picked from


def test_copies_to_pick_from_are_made_in_two_groups_where_vmem_holds_some() -> None:
    step, end, size = 10, 20, 0.5
    copies = {v: Copied(step, end + v, 0, picked=end + v) for v in range(5)}
    copies[7] = Copied(step, end, 0, gradient=3, picked=0)  # state
    found = in_groups(copies, dict.fromkeys(copies, size), 1.0)
    first, second = ({v for v, c in found.items() if c.begin == b} for b in (step, end + 1))
    assert first == {0, 1, 7}  # one of each group lies in VMEM
    assert second == {3}  # beside the last of the first group, as it is picked from
    assert in_groups({}, {}, 1.0) == {}
    every = in_groups(copies, dict.fromkeys(copies, 1.0), 1.0)  # too large for that
    assert set(every) == set(copies)
