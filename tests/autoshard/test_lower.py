"""A lowered plan computes what the plain function does, in the shardings it promises."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.mesh import DevicesError, device_mesh
from autoshard.same_numbers import difference
from autoshard.targets import target_devices
from autoshard.trace import trace
from passes.constraints import of_no_argument
from passes.ir.mesh import Mesh

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


programs = load("programs")
CASES = programs.CASES
X, W, STACK = programs.X, programs.W, programs.STACK
MESHES = ({"data": 8}, {"data": 4, "model": 2}, {"a": 2, "b": 2, "c": 2})
SOLVERS = ("propagate", "dp", "fsdp", "tp", "fsdp+tp")


def eager_cluster() -> autoshard.Cluster:
    """Links that cost nothing and a chip without start-up: all that can be split pays."""
    cpu = autoshard.cluster("cpu:8")
    links = [replace(n, bandwidth=1e18, latency=0.0, startup=0.0) for n in cpu.network]
    return replace(cpu, network=tuple(links), chip=replace(cpu.chip, kernel_latency=0.0))


EAGER = eager_cluster()


def host(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


@functools.cache
def plain(name: str) -> Any:
    case = CASES[name]
    return jax.tree.map(host, jax.jit(case.fn)(*case.args))


def check(name: str, mesh: dict[str, int], solver: str, cluster: Any = "cpu:8") -> autoshard.Plan:
    case, mesh = CASES[name], dict(CASES[name].mesh or mesh)
    plan = autoshard.plan(
        case.fn, *case.args, cluster=cluster, mesh=mesh, solver=solver, donate_argnums=case.donate
    )
    got = jax.tree.map(host, plan.compile()(*case.args))
    assert jax.tree.structure(got) == jax.tree.structure(plain(name))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(plain(name)), strict=True):
        tolerance = 0.02 if y.dtype.itemsize < 4 else 1e-4
        assert difference(x, y) <= tolerance, (x, y)
    return plan


# Same numbers


@pytest.mark.parametrize(("number", "name"), list(enumerate(CASES)))
def test_solver_plans_where_splitting_pays(number: int, name: str) -> None:
    check(name, MESHES[1 + number % 2], "ilp", EAGER)


# Every solver on every function, and on every mesh, but not on both at once.
COVER = [
    (name, MESHES[(i + j) % 3], solver)
    for i, name in enumerate(CASES)
    for j, solver in enumerate(SOLVERS)
    if (i + j) % 3 == 0 or name in ("train_step", "scan_grad", "embedding")
]


@pytest.mark.parametrize(("name", "mesh", "solver"), COVER)
def test_baselines(name: str, mesh: dict[str, int], solver: str) -> None:
    check(name, mesh, solver)


def test_plans_of_the_eager_cluster_do_split() -> None:
    """Or the tests above would show nothing."""
    plan = check("train_step", {"data": 4, "model": 2}, "ilp", EAGER)
    assert {a for op in plan.ops for a, _ in op.strategy} == {"data", "model"}
    assert "all-reduce" in plan.lower().compile().as_text()


@pytest.mark.parametrize("rows", [1, 7, 9, 12])
def test_sizes_that_the_mesh_does_not_divide(rows: int) -> None:
    def fn(x: Any, w: Any) -> Any:
        return jax.nn.softmax(x @ w).sum(0), x.T

    x, w = programs.numbers(rows, 6), programs.numbers(6, 10)
    expected = jax.jit(fn)(x, w)
    for mesh in MESHES:
        plan = autoshard.plan(fn, x, w, cluster=EAGER, mesh=mesh)
        for a, b in zip(plan.compile()(x, w), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_hints_are_what_comes_out() -> None:
    case = CASES["train_step"]
    plan = autoshard.plan(
        case.fn, *case.args, cluster="cpu:8", mesh={"data": 4, "model": 2},
        hints={"batch/*": P("data"), "params/w1": P(None, "model"), "params/w2": P("model", None)},
    )  # fmt: skip
    params, batch = plan.in_shardings
    assert params == {"w1": P(None, "model"), "w2": P("model")}
    assert batch == {"x": P("data"), "y": P("data")}
    (new, loss) = plan.compile()(*case.args)
    assert new["w1"].sharding.spec == P(None, "model")
    assert new["w2"].sharding.spec == P("model")
    np.testing.assert_allclose(loss, plain("train_step")[1], rtol=1e-5)
    # Megatron: the columns of w1 meet the rows of w2 in one sum, and gradients in another.
    text = plan.lower().compile().as_text()
    assert "all-reduce" in text


def test_two_hints_on_one_value_both_count() -> None:
    plan = autoshard.plan(
        lambda x: x * 2, X, cluster="cpu:8", mesh={"data": 4, "model": 2},
        hints={"x": P("data", P.UNCONSTRAINED), "*": P(P.UNCONSTRAINED, "model")},
    )  # fmt: skip
    assert plan.in_shardings == (P("data", "model"),)


def test_hint_on_the_layers_of_a_stack_is_kept() -> None:
    """A scan slices the stack; the layers themselves are in one place each."""
    case = CASES["scan_layers"]
    plan = autoshard.plan(
        case.fn, *case.args, cluster="cpu:8", mesh={"data": 4, "model": 2},
        hints={"stack": P("data", None, "model")},
    )  # fmt: skip
    assert plan.in_shardings[1] == P("data", None, "model")
    got = plan.compile()(*case.args)
    np.testing.assert_allclose(got[0], plain("scan_layers")[0], rtol=1e-4, atol=1e-5)


# Buffers and placement


@pytest.mark.parametrize("solver", ["ilp", "fsdp", "tp"])
def test_donation_aliases_buffers(solver: str) -> None:
    def fn(state: Any, x: Any) -> Any:
        return {"w": state["w"] - 0.1 * x.T @ x, "n": state["n"] + 1}, x.sum()

    state = {"w": W, "n": np.zeros((8,), np.float32)}
    mesh = {"data": 4, "model": 2}
    options: dict[str, Any] = {"cluster": EAGER, "mesh": mesh, "solver": solver}
    kept = autoshard.plan(fn, state, X, **options)
    given = autoshard.plan(fn, state, X, donate_argnums=0, **options)
    assert kept.lower().compile().memory_analysis().alias_size_in_bytes == 0
    bytes_here = sum(
        t.nbytes // np.prod([mesh[a] for axes in t.spec for a in axes], dtype=int)
        for t in given.data.arguments[:2]
    )
    assert given.lower().compile().memory_analysis().alias_size_in_bytes == bytes_here
    assert given.in_shardings[0] == given.out_shardings[0]
    placed = given.place(state, X)
    (new, _), old = given.compile()(*placed), placed[0]["w"]
    assert old.is_deleted()
    np.testing.assert_allclose(new["w"], W - 0.1 * X.T @ X, rtol=1e-4, atol=1e-5)


def test_donated_memory_is_counted_once() -> None:
    kept, given = (
        autoshard.plan(lambda x: x * 2, X, cluster="cpu:8", mesh={"data": 8}, donate_argnums=d)
        for d in ((), 0)
    )
    assert kept.cost.peak_memory == 2 * given.cost.peak_memory


def test_a_result_has_its_buffer_from_the_first_step_and_lends_it() -> None:
    wide, narrow = jnp.zeros((32, 512)), jnp.zeros((512, 32))
    x = jnp.zeros((64, 32))

    def widened_twice(x: Any, wide: Any, narrow: Any) -> Any:
        return ((x @ wide) @ narrow) @ wide

    plan = autoshard.plan(widened_twice, x, wide, narrow, cluster="cpu:1")
    one, other, arguments = 64 * 512 * 4, 64 * 32 * 4, sum(v.nbytes for v in (x, wide, narrow))
    assert plan.cost.peak_memory == arguments + one + other, "the first product lies in the last"
    found = jax.jit(widened_twice).lower(x, wide, narrow).compile().memory_analysis()
    assert (found.output_size_in_bytes, found.temp_size_in_bytes) == (one, other)


def test_a_training_loop_feeds_itself_without_moving_anything() -> None:
    case = CASES["train_step"]
    step = autoshard.parallelize(case.fn, cluster=EAGER, donate_argnums=0)
    plan = step.plan(*case.args)
    params, batch = plan.place(*case.args)
    expected = case.args[0]
    losses = []
    for _ in range(3):
        before = jax.tree.map(lambda x: x.sharding, params)
        params, loss = step(params, batch)
        assert jax.tree.map(lambda x: x.sharding, params) == before
        expected, _ = jax.jit(case.fn)(expected, case.args[1])
        losses.append(float(loss))
    np.testing.assert_allclose(params["w1"], expected["w1"], rtol=1e-4, atol=1e-5)
    assert losses[2] < losses[0]


def test_placed_arrays_are_kept() -> None:
    plan = autoshard.plan(
        lambda x, w: x @ w, X, W, cluster="cpu:8", mesh={"data": 8}, hints={"x": P("data")}
    )
    mesh = device_mesh(Mesh.of({"data": 8}), None)
    x, w = plan.place(X, W)
    assert x.sharding == NamedSharding(mesh, P("data"))
    again, _ = plan.place(x, w)
    assert again is x
    np.testing.assert_allclose(plan.compile()(x, w), X @ W, rtol=1e-4, atol=1e-5)
    assert not x.is_deleted()


def test_results_lie_as_promised() -> None:
    for name in ("train_step", "scan_layers", "random_keys", "sizes_some_axes_divide", "scalars"):
        case = CASES[name]
        plan = autoshard.plan(case.fn, *case.args, cluster=EAGER, mesh={"data": 4, "model": 2})
        out = plan.compile()(*case.args)
        specs = jax.tree.leaves(plan.out_shardings, is_leaf=lambda x: isinstance(x, P))
        for x, spec in zip(jax.tree.leaves(out), specs, strict=True):
            assert x.sharding.is_equivalent_to(NamedSharding(x.sharding.mesh, spec), x.ndim)


def test_devices_may_be_given() -> None:
    plan = autoshard.plan(lambda x: x * 2, X, cluster="cpu:4", hints={"x": P("data")})
    chosen = jax.devices()[4:]
    out = plan.compile(chosen)(X)
    assert out.sharding.device_set == set(chosen)
    np.testing.assert_array_equal(out, X * 2)


def test_too_few_devices() -> None:
    plan = autoshard.plan(lambda x: x * 2, X, cluster="tpu-v5e:4x4")
    with pytest.raises(DevicesError, match="needs 16 devices, but only 8 are here"):
        plan.lower()
    assert plan.mesh


def test_one_device() -> None:
    plan = autoshard.plan(CASES["train_step"].fn, *CASES["train_step"].args, cluster="cpu:1")
    out = plan.compile()(*CASES["train_step"].args)
    np.testing.assert_allclose(out[1], plain("train_step")[1], rtol=1e-6)


# parallelize, as jit


def test_keyword_and_static_arguments_work_as_in_jit() -> None:
    traces = []

    def fn(x: Any, power: int, *, scale: Any, mode: str = "sum") -> Any:
        traces.append(power)
        y = scale["by"] * x**power
        return y.sum() if mode == "sum" else y

    step = autoshard.parallelize(
        fn, cluster="cpu:8", static_argnums=1, static_argnames=("mode",), hints={"x": P("data")}
    )
    options: dict[str, Any] = {"scale": {"by": W[:8]}}
    for power, mode in ((2, "sum"), (3, "sum"), (3, "all")):
        for _ in range(2):
            got = step(X, power, mode=mode, **options)
            np.testing.assert_allclose(got, fn(X, power, mode=mode, **options), rtol=1e-5)
    plan = step.plan(X, 3, mode="all", **options)
    args, kwargs = plan.in_shardings
    assert args == (P("data"),)
    assert set(kwargs) == {"scale"}
    assert isinstance(step.lower(X, 3, mode="all", **options), jax.stages.Lowered)


def test_a_method_takes_its_instance_first() -> None:
    class Scale:
        def __init__(self, by: float) -> None:
            self.by = by

        @autoshard.parallelize(cluster="cpu:8", static_argnums=0)
        def __call__(self, x: Any) -> Any:
            return x * self.by

    x = jnp.arange(16.0)
    assert jnp.array_equal(Scale(2)(x), x * 2)
    assert jnp.array_equal(Scale(3)(x), x * 3)


def test_each_form_of_the_arguments_is_planned_once() -> None:
    traces = []

    @autoshard.parallelize(cluster="cpu:8")
    def fn(x: Any) -> Any:
        traces.append(x.shape)
        return x + 1

    for n in (8, 8, 16, 8, 16):
        np.testing.assert_array_equal(fn(np.ones(n, np.float32)), np.full(n, 2.0))
    assert sorted(set(traces)) == [(8,), (16,)]
    first = len(traces)
    fn(np.zeros(8, np.float32))
    assert len(traces) == first
    assert fn.__name__ == "fn"


def test_the_plan_of_another_form_of_arguments_is_refused() -> None:
    call = autoshard.plan(lambda x: x["a"] + 1, {"a": X}, cluster="cpu:8").compile()
    with pytest.raises(TypeError, match="form"):
        call({"b": X})


def test_weak_types_stay_weak() -> None:
    out = autoshard.plan(lambda a: (a * 2, a + X), 3.0, cluster="cpu:8").compile()(3.0)
    want = jax.jit(lambda a: (a * 2, a + X))(3.0)
    assert [(x.dtype, x.weak_type) for x in out] == [(x.dtype, x.weak_type) for x in want]


# Effects


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_debug_print_prints_once(mesh: dict[str, int], capfd: Any) -> None:
    def fn(x: Any) -> Any:
        y = autoshard.annotate(x * 2, next(iter(mesh)), None)
        jax.debug.print("the sum is {:.3f}, the shape {}", y.sum(), y.shape)
        return y + 1

    plan = autoshard.plan(fn, X, cluster="cpu:8", mesh=mesh)
    plan.compile()(X)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("the sum is") == 1


def test_callbacks_see_whole_arrays_once_and_in_order() -> None:
    from jax.experimental import io_callback

    seen: list[Any] = []

    def fn(x: Any) -> Any:
        y = autoshard.annotate(x * 2, "data", None)
        io_callback(lambda v: seen.append(np.array(v)), None, y, ordered=True)
        io_callback(lambda v: seen.append(np.array(v)), None, y + 1, ordered=True)
        return y

    plan = autoshard.plan(fn, X, cluster="cpu:8", mesh={"data": 8})
    plan.compile()(X)
    jax.effects_barrier()
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[0], X * 2)
    np.testing.assert_array_equal(seen[1], X * 2 + 1)


def test_a_print_in_a_loop_prints_every_turn(capfd: Any) -> None:
    def fn(x: Any) -> Any:
        def body(c: Any, i: Any) -> Any:
            jax.debug.print("turn {}", i)
            return jnp.tanh(c), c

        return jax.lax.scan(body, x, jnp.arange(4))

    plan = autoshard.plan(fn, X, cluster="cpu:8", mesh={"data": 8}, hints={"x": P("data")})
    plan.compile()(X)
    jax.effects_barrier()
    assert sorted(capfd.readouterr().out.split("\n"))[1:] == [f"turn {i}" for i in range(4)]


# What jax does by itself stays as it is


def test_remat_still_computes_twice() -> None:
    """The barrier that keeps XLA from reusing the first run is still there."""
    case = CASES["remat"]
    plan = autoshard.plan(case.fn, *case.args, cluster="cpu:8", mesh={"data": 8})
    assert "optimization_barrier" in plan.lower().as_text()


def test_the_users_own_constraint_on_another_mesh_is_a_hint() -> None:
    mine = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))

    def fn(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(x * 2, NamedSharding(mine, P("data"))) + 1

    plan = autoshard.plan(fn, X, cluster="cpu:8", mesh={"data": 4, "model": 2})
    assert plan.out_shardings is not None
    np.testing.assert_array_equal(plan.compile()(X), X * 2 + 1)


def test_names_of_the_program_and_its_arguments() -> None:
    text = autoshard.plan(
        CASES["train_step"].fn, *CASES["train_step"].args, cluster="cpu:8"
    ).lower().as_text()  # fmt: skip
    assert re.search(r"module @jit_train_step", text)


def test_an_array_on_one_device_is_moved() -> None:
    plan = autoshard.plan(lambda x: x + 1, X, cluster="cpu:8", hints={"x": P("data")})
    x = jax.device_put(X, SingleDeviceSharding(jax.devices()[3]))
    np.testing.assert_array_equal(plan.compile()(x), X + 1)
    assert not x.is_deleted()


# A TPU that is not here


@pytest.mark.libtpu
@pytest.mark.parametrize("name", ["train_step", "scan_of_remat_grad", "embedding", "random_keys"])
def test_lowers_and_compiles_for_a_tpu_topology(name: str) -> None:
    from jax.experimental import topologies

    case = CASES[name]
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    plan = autoshard.plan(case.fn, *case.args, cluster="tpu-v5e:2x4", mesh={"data": 4, "model": 2})
    compiled = plan.lower(topology.devices).compile()
    assert compiled.memory_analysis() is not None


def test_what_is_made_of_no_argument_is_not_constrained() -> None:
    def masked(x: Any, w: Any) -> Any:
        scores = x @ w
        return jnp.where(jnp.tril(jnp.ones(scores.shape, bool)), scores, -1e30).sum(axis=1)

    x, w = jnp.ones((64, 32)), jnp.ones((32, 64))
    plan = autoshard.plan(masked, x, w, cluster="cpu:8", mesh={"data": 8}, solver="dp")
    lines = [line for line in plan.lower().as_text().splitlines() if "sharding_constraint" in line]
    assert lines
    assert not any("xi1>" in line for line in lines)
    assert jnp.allclose(plan.compile()(x, w), masked(x, w))


def test_a_carry_that_begins_with_zeros_depends_on_what_the_loop_adds() -> None:
    def summed(xs: Any) -> Any:
        def body(carry: Any, x: Any) -> Any:
            total, count = carry
            return (total + x, count + 1.0), jnp.sin(total) * jnp.cos(count)

        zeros = jnp.zeros(xs.shape[1:])
        return jax.lax.scan(body, (zeros, zeros), xs)[1]

    graph = trace(summed, jnp.ones((4, 64, 8))).graph
    free = of_no_argument(graph)
    made = {op.name: op.outputs[0] in free for op in graph.ops}
    assert not made["sin"]  # from the second trip on
    assert made["cos"]
    assert not made["mul"]


def test_what_a_loop_reads_is_whole_for_those_who_want_it_whole() -> None:
    """Behind a barrier in a loop's body XLA would split keys for all readers as one wants them."""

    def attended(q: Any, k: Any, v: Any) -> Any:
        @jax.checkpoint
        def rows(q: Any) -> Any:
            weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
            return jnp.einsum("hqk,khd->qhd", weights, v)

        return jnp.sum(jax.lax.map(rows, q) ** 2)

    q, k = jnp.ones((4, 16, 8, 32)), jnp.ones((256, 8, 32))
    fn = jax.grad(attended, argnums=(0, 1, 2))
    plan = autoshard.plan(fn, q, k, k, cluster="cpu:8", mesh={"data": 8}, solver="tp")
    planned = [c.kind.replace("_", "-") for op in plan.ops for c in op.collectives]
    text = plan.lower().compile().as_text()
    compiled = re.findall(r" (all-gather|all-reduce|all-to-all)\(", text)
    assert sorted(compiled) == sorted(planned)


@pytest.mark.libtpu
def test_a_gather_of_two_dims_lays_nothing_anew() -> None:
    """As one gather the blocks of both dims arrive in a row, and are copied to their places."""
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((4096, 1024), (1024, 1024)))
    hints = {"x": P("a", None), "w": P("a", "b")}
    plan = autoshard.plan(
        lambda x, w: autoshard.annotate(jnp.tanh(x @ autoshard.annotate(w, None, None)), "a", None),
        *(x, w),
        cluster="v5e:2x2",
        mesh={"a": 2, "b": 2},
        hints=hints,
    )
    assert [len(r.path) or len(r.through) for r in plan.data.reshards] == [2]
    text = plan.lower(target_devices(autoshard.cluster("v5e:2x2"))).compile().as_text()
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) == 2
    assert not re.findall(r"%copy[.\d]* = bf16", text)
