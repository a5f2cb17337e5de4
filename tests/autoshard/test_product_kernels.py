"""What else a product's kernel does, and what XLA:TPU counts for it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec

import autoshard
from autoshard.hlo import read
from autoshard.targets import target_devices
from autoshard.trace import trace
from passes.attention import NONE
from passes.decisions import decide
from passes.fusion import fuse
from passes.ir.mesh import Mesh
from passes.liveness import liveness
from passes.meshes import links_of
from passes.op_cost import OpCost
from passes.plan_cost import cost_of
from passes.price import price
from passes.solve.problem import INFINITY
from passes.strategies import Layouts

BF16, F32 = jnp.bfloat16, jnp.float32


def array(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def product(x: Any, w: Any) -> Any:
    return x @ w


def product_and_sums(x: Any, w: Any) -> Any:
    y = x @ w
    return y, jnp.sin(y.astype(F32).sum(0))


def of_computed(x: Any, w: Any, s: Any) -> Any:
    return (x + s) @ w.astype(BF16)


def of_one_computed(x: Any, w: Any, s: Any) -> Any:
    return (x + s) @ w


WIDE = array(8192, 256), array(256, 8192)
DEEP = array(4096, 2048), array(2048, 8192, dtype=F32), array(2048)


def predicted(fn: Callable[..., Any], cluster: str, *args: Any) -> float:
    return autoshard.plan(fn, *args, cluster=cluster).cost.compute_time


def compiled(fn: Callable[..., Any], cluster: str, *args: Any) -> float:
    found = autoshard.plan(fn, *args, cluster=cluster).verify().compiled
    assert found is not None
    assert found.compute is not None
    return found.compute


def memory_bound(cluster: str) -> float:
    """Seconds that writing the product of WIDE takes at least."""
    return 8192 * 8192 * 2 / autoshard.cluster(cluster).chip.hbm_bandwidth


def test_on_v6e_sums_take_the_price_of_the_elements_away_but_not_the_bandwidth() -> None:
    plain, summed = (predicted(f, "v6e:1x1", *WIDE) for f in (product, product_and_sums))
    assert memory_bound("v6e:1x1") < summed < 0.5 * plain
    plain, summed = (predicted(f, "v5p:1x1x1", *WIDE) for f in (product, product_and_sums))
    assert summed > 0.95 * plain


@pytest.mark.libtpu
def test_the_tpu_compiler_counts_less_than_the_memory_can_do() -> None:
    """Why the prediction is no nearer to it."""
    plain, summed = (compiled(f, "v6e:1x1", *WIDE) for f in (product, product_and_sums))
    assert summed < memory_bound("v6e:1x1") < plain
    assert predicted(product, "v6e:1x1", *WIDE) == pytest.approx(plain, rel=0.25)


def test_a_product_of_two_computed_operands_takes_longer() -> None:
    narrow = DEEP[0], array(2048, 8192), DEEP[2]
    one, both = (
        predicted(of_one_computed, "v5p:1x1x1", *narrow),
        predicted(of_computed, "v5p:1x1x1", *DEEP),
    )
    assert one == pytest.approx(predicted(product, "v5p:1x1x1", *narrow[:2]), rel=0.05)
    assert both > 1.4 * one


@pytest.mark.libtpu
def test_the_tpu_compiler_takes_longer_for_two_computed_operands() -> None:
    found = compiled(of_computed, "v5p:1x1x1", *DEEP)
    assert found > 1.4 * compiled(product, "v5p:1x1x1", DEEP[0], array(2048, 8192))
    assert predicted(of_computed, "v5p:1x1x1", *DEEP) == pytest.approx(found, rel=0.2)


def handed_on(x: Any, w: Any) -> Any:
    """A product whose result another one reads at once: it stays in VMEM."""
    y = x @ w
    return jnp.matmul(y.T, y, preferred_element_type=F32)


NEAR = array(4096, 512), array(512, 1024)


def of_product(fn: Callable[..., Any], cluster: str) -> float:
    """Seconds of the first product of a function of NEAR."""
    graph = trace(fn, *NEAR).graph
    on, mesh = autoshard.cluster(cluster), Mesh(("data",), (1,))
    fusion = fuse(graph, on.platform, NONE)
    cost = OpCost(graph, fusion, mesh, on, links_of(on, mesh), Layouts(mesh.sizes))
    op = next(op for op in graph.ops if op.name == "dot_general")
    return cost.seconds(op, (-1,))


def test_on_v6e_a_narrow_result_costs_nothing_more_where_it_stays_in_vmem() -> None:
    share = {c: of_product(handed_on, c) / of_product(product, c) for c in ("v5e:1x1", "v6e:1x1")}
    assert share["v5e:1x1"] > 0.65
    assert share["v6e:1x1"] < 0.4


def read_by_another_kernel(x: Any, w: Any) -> Any:
    """As `handed_on`, but XLA:TPU can not make one kernel of both."""
    y = jax.lax.optimization_barrier(x @ w)
    return jnp.exp(y.astype(F32)).sum(-1)


def seconds_of_kernel(fn: Callable[..., Any], cluster: str) -> float:
    """Seconds that XLA:TPU counts for the kernel of the only product of a function of NEAR."""
    on = autoshard.cluster(cluster)
    put = jax.sharding.SingleDeviceSharding(target_devices(on)[0])
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=put) for a in NEAR]
    text = jax.jit(fn).lower(*args).compile().runtime_executable().hlo_modules()[0].to_string()
    found = [i for i in read(text).entry.instructions if i.op_name.endswith("dot_general")]
    return sum(i.cycles or 0 for i in found) / (float(on.compiler["clock_rate_ghz"]) * 1e9)


@pytest.mark.libtpu
@pytest.mark.parametrize("cluster", ["v5e:1x1", "v6e:1x1"])
def test_the_tpu_compiler_counts_as_much_for_a_result_that_stays_in_vmem(cluster: str) -> None:
    found = seconds_of_kernel(read_by_another_kernel, cluster)
    assert of_product(handed_on, cluster) == pytest.approx(found, rel=0.35)
    assert (found < 0.4 * seconds_of_kernel(product, cluster)) == (cluster == "v6e:1x1")


def gradient(x: Any, dy: Any) -> Any:
    return jnp.einsum("ki,kj->ij", x, dy, preferred_element_type=F32)


def updated(x: Any, dy: Any, w: Any, m: Any) -> Any:
    """A step of gradient descent with momentum."""
    m = 0.9 * m + gradient(x, dy)
    return w - 0.1 * m, m


def update_alone(g: Any, w: Any, m: Any) -> Any:
    m = 0.9 * m + g
    return w - 0.1 * m, m


def of_update(k: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    state = array(1024, 4096, dtype=F32)
    return array(k, 1024), array(k, 4096), state, state


def apart(cluster: str, k: int) -> float:
    """Seconds of the gradient and of the update, one after the other."""
    x, dy, w, m = of_update(k)
    made, read = predicted(gradient, cluster, x, dy), predicted(update_alone, cluster, w, w, m)
    return made + read


@pytest.mark.parametrize("cluster", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_an_update_runs_in_the_kernel_that_makes_its_gradient(cluster: str) -> None:
    saved = apart(cluster, 2048) - predicted(updated, cluster, *of_update(2048))
    # The gradient is neither written nor read again.
    chip = autoshard.cluster(cluster).chip
    assert saved > 0.9 * 2 * 4 * 1024 * 4096 / chip.hbm_bandwidth


@pytest.mark.libtpu
@pytest.mark.parametrize("cluster", ["v5e:1x1", "v6e:1x1"])
def test_the_tpu_compiler_updates_the_state_where_its_gradient_is_made(cluster: str) -> None:
    found = compiled(updated, cluster, *of_update(2048))
    x, dy, w, m = of_update(2048)
    separate = compiled(gradient, cluster, x, dy) + compiled(update_alone, cluster, w, w, m)
    assert found < 0.95 * separate
    assert predicted(updated, cluster, *of_update(2048)) == pytest.approx(found, rel=0.25)


def split(**hints: Any) -> autoshard.Plan:
    return autoshard.plan(
        updated, *of_update(16384), cluster="v5e:2x2", mesh={"data": 4}, hints=hints
    )


def test_an_update_of_what_is_summed_over_devices_runs_by_itself() -> None:
    rows, whole = PartitionSpec("data", None), PartitionSpec(None, None)
    summed = split(x=rows, dy=rows, w=whole, m=whole)  # each device has a part of the batch
    # Its kernels are those of a quarter of the batch; the gradient may be handed on in VMEM.
    assert summed.cost.compute_time == pytest.approx(apart("v5e:1x1", 16384 // 4), rel=0.1)
    assert summed.cost.compute_time > 1.15 * predicted(updated, "v5e:1x1", *of_update(16384 // 4))


def test_an_update_of_a_part_of_the_state_runs_with_the_gradient_of_that_part() -> None:
    columns, whole = PartitionSpec(None, "data"), PartitionSpec(None, None)
    parts = split(x=whole, dy=columns, w=columns, m=columns)
    state = array(1024, 1024, dtype=F32)
    one = predicted(updated, "v5e:1x1", array(16384, 1024), array(16384, 1024), state, state)
    assert parts.cost.compute_time == pytest.approx(one, rel=1e-6)


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 40).map(lambda n: 128 * n),
    st.integers(1, 40).map(lambda n: 128 * n),
    st.integers(1, 80).map(lambda n: 128 * n),
    st.sampled_from(["v5e:1x1", "v5p:1x1x1", "v6e:1x1", "h100:1"]),
)
def test_an_update_never_takes_longer_where_its_gradient_is_made(
    m: int, n: int, k: int, cluster: str
) -> None:
    state = array(m, n, dtype=F32)
    x, dy = array(k, m), array(k, n)
    graph = trace(updated, x, dy, state, state).graph
    on, mesh = autoshard.cluster(cluster), Mesh(("data",), (1,))
    fusion = fuse(graph, on.platform, NONE)
    cost = OpCost(graph, fusion, mesh, on, links_of(on, mesh), Layouts(mesh.sizes))
    for op in graph.ops:
        strategy = (-1,)
        together, by_itself = (cost.seconds(op, strategy, updates) for updates in (True, False))
        assert 0.0 <= together <= by_itself
    runs_there = any(t.update is not None for t in fusion.traffic)
    assert runs_there == (on.platform == "tpu")


def test_an_update_that_waits_for_all_gradients_runs_by_itself() -> None:
    def clipped(x: Any, dy: Any, w: Any, m: Any) -> Any:
        """A gradient of norm one is only known when all of it is there."""
        g = gradient(x, dy)
        return update_alone(g / jnp.sqrt((g * g).sum()), w, m)

    graph = trace(clipped, *of_update(2048)).graph
    assert all(t.update is None for t in fuse(graph, "tpu", NONE).traffic)


def masked(x: Any, dy: Any, h: Any, w: Any, m: Any) -> Any:
    """The gradient of a layer behind which a ReLU stands, and the update."""
    return updated(x, jnp.where(h > 0, dy, 0), w, m)


def of_masked(x: Any, dy: Any, h: Any, w: Any, m: Any) -> Any:
    return updated(jnp.where(h > 0, x, 0), dy, w, m)


def of_swapped(n: int = 2048) -> tuple[jax.ShapeDtypeStruct, ...]:
    x, state = array(2048, n), array(n, n, dtype=F32)
    return x, x, x, state, state


def test_on_v6e_state_is_laid_in_columns_where_the_second_operand_of_its_gradient_is_computed() -> (
    None
):
    """Four copies of 16 MiB, one side of each in VMEM."""
    found = [predicted(f, "v6e:1x1", *of_swapped()) for f in (masked, of_masked)]
    assert found[0] - found[1] == pytest.approx(4 * 2**24 / 697e9, rel=0.05)
    for chip in ("v5e:1x1", "v5p:1x1x1"):
        found = [predicted(f, chip, *of_swapped()) for f in (masked, of_masked)]
        assert found[0] == pytest.approx(found[1], rel=0.01)


def test_the_state_of_a_first_layer_is_laid_in_columns() -> None:
    """Its gradient masks by itself what no other product reads; the next one computes its ReLU."""

    def step(x: Any, w: Any, v: Any, m: Any, n: Any) -> Any:
        def loss(w: Any, v: Any) -> Any:
            return (jax.nn.relu(x @ w) @ v).sum()

        of_w, of_v = jax.grad(loss, (0, 1))(w, v)
        m, n = 0.9 * m + of_w, 0.9 * n + of_v
        return w - 0.1 * m, v - 0.1 * n, m, n

    w, v = array(512, 2048, dtype=F32), array(2048, 512, dtype=F32)
    graph = trace(step, array(1024, 512, dtype=F32), w, v, w, v).graph
    turned = {o: t.turned for o, t in enumerate(fuse(graph, "tpu").traffic) if t.turned}
    assert {graph.values[graph.ops[o].outputs[0]].shape for o in turned} == {(512, 2048)}
    assert sum(map(sum, turned.values())) == 4 * 4 * 512 * 2048


@pytest.mark.libtpu
def test_the_tpu_compiler_lays_state_in_columns_on_v6e() -> None:
    """Of 144 MiB, more than VMEM holds."""
    args = of_swapped(6144)
    turned, plain = (compiled(f, "v6e:1x1", *args) for f in (masked, of_masked))
    assert turned > 2 * plain
    assert predicted(masked, "v6e:1x1", *args) == pytest.approx(turned, rel=0.25)
    assert predicted(of_masked, "v6e:1x1", *args) == pytest.approx(plain, rel=0.25)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**16))
def test_a_problem_counts_updates_as_its_plan_does(seed: int) -> None:
    """The problem counts whole picoseconds, so each of its entries may be off by one."""
    graph = trace(two_updates, *of_two_updates()).graph
    on, mesh, rng = autoshard.cluster("v5e:2x2"), Mesh(("data", "model"), (2, 2)), Random(seed)
    fusion = fuse(graph, on.platform, NONE)
    assert sum(t.update is not None for t in fusion.traffic) == 2
    live, decisions = liveness(graph, fusion.stored), decide(graph, ())
    priced = price(graph, mesh, on, decisions, live, fusion, None)
    problem = priced.problem
    choice = [0] * len(problem.nodes)
    for node in rng.choices(range(len(choice)), k=4 * len(choice)):
        before, choice[node] = choice[node], rng.randrange(len(problem.nodes[node].costs))
        if problem.cost(choice) >= INFINITY:
            choice[node] = before
    entries = len(problem.nodes) + len(problem.edges) + len(graph.ops)
    said = problem.cost(choice) / 1e12 + priced.constant
    assert cost_of(priced, choice).step_time == pytest.approx(said, abs=entries * 2e-12)


def two_updates(x: Any, w: Any, v: Any, m: Any, n: Any) -> Any:
    """A step of two layers, with momentum."""

    def loss(w: Any, v: Any) -> Any:
        return (jnp.tanh(x @ w) @ v).astype(F32).sum()

    of_w, of_v = jax.grad(loss, (0, 1))(w, v)
    m, n = 0.9 * m + of_w, 0.9 * n + of_v
    return w - 0.1 * m, v - 0.1 * n, m, n


def of_two_updates() -> tuple[jax.ShapeDtypeStruct, ...]:
    w, v = array(512, 2048, dtype=F32), array(2048, 512, dtype=F32)
    return array(1024, 512), w, v, w, v
