"""Any feasible choice of the problem, lowered and run, gives the numbers of plain jax.jit.

The planner may be wrong about what is fast; no plan may be wrong about what is computed. So random
programs are run not only as the solver would have them, but with a random sharding and strategy
for every decision.
"""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from jax import lax

import autoshard
from autoshard.bound_plan import Plan, traced_for
from autoshard.same_numbers import difference
from autoshard.state import state_pairs
from autoshard.trace import Traced
from passes.assemble import assemble
from passes.baselines import BASELINES
from passes.decisions import decide
from passes.fitting import fixed
from passes.fusion import fuse
from passes.ir.mesh import Mesh
from passes.liveness import liveness
from passes.plan_cost import cost_of
from passes.price import price
from passes.priced import Priced
from passes.solve.problem import INFINITY

pytestmark = pytest.mark.usefixtures("in_a_hurry")

MESHES = ({"a": 8}, {"a": 4, "b": 2}, {"a": 2, "b": 2, "c": 2})
CLUSTER = autoshard.cluster("cpu:8")


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


CASES = load("programs").CASES

# Random programs: steps over a growing pool of arrays. A step that does not apply is left out.


def matmul(a: Any, b: Any, ids: Any) -> Any:
    if a.ndim < 1 or b.ndim != 2:
        return None
    if a.shape[-1] == b.shape[0]:
        return jnp.tanh(a @ b)
    return jnp.tanh(a @ b.T) if a.shape[-1] == b.shape[1] else None


def batched_matmul(a: Any, b: Any, ids: Any) -> Any:
    return jnp.einsum("bij,bkj->bik", a, a) / 8 if a.ndim == 3 else None


def add(a: Any, b: Any, ids: Any) -> Any:
    return a + b if a.shape == b.shape else a + jnp.sin(b).sum()


def residual_sum(a: Any, b: Any, ids: Any) -> Any:
    """Sums of several reductions: partial values may wait for one another here."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        return None
    return (a @ b) / 8 + (jnp.cos(a) @ b) / 8 - a @ jnp.sin(b)


def multiply_columns(a: Any, b: Any, ids: Any) -> Any:
    return a * b.mean(axis=0) if a.ndim and b.ndim and a.shape == b.shape else None


def transpose(a: Any, b: Any, ids: Any) -> Any:
    return jnp.transpose(a) if a.ndim > 1 else None


def split_dim(a: Any, b: Any, ids: Any) -> Any:
    if not a.ndim or a.ndim > 3 or a.shape[-1] % 4:
        return None
    return a.reshape(*a.shape[:-1], 4, a.shape[-1] // 4)


def merge_dims(a: Any, b: Any, ids: Any) -> Any:
    return a.reshape(-1, a.shape[-1]) if a.ndim > 2 else a.reshape(-1) if a.ndim == 2 else None


def flatten_and_cut(a: Any, b: Any, ids: Any) -> Any:
    return a.reshape(-1)[: a.size // 8 * 8].reshape(8, -1) if a.size >= 8 else None


def reduce(a: Any, b: Any, ids: Any) -> Any:
    return a.sum(axis=0) if a.ndim > 1 else None


def reduce_max(a: Any, b: Any, ids: Any) -> Any:
    return a.max(axis=-1, keepdims=True) + a if a.ndim else None


def softmax(a: Any, b: Any, ids: Any) -> Any:
    return jax.nn.softmax(a, axis=-1) if a.ndim else None


def layer_norm(a: Any, b: Any, ids: Any) -> Any:
    return (a - a.mean(-1, keepdims=True)) / (1.0 + a.var(-1, keepdims=True)) if a.ndim else None


def scan_layers(a: Any, b: Any, ids: Any) -> Any:
    if a.ndim != 2 or b.ndim != 3 or b.shape[1:] != (a.shape[1], a.shape[1]):
        return None
    carry, seen = lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum(0)), a, b)
    return carry + seen.sum(0) / 8


def scan_rows(a: Any, b: Any, ids: Any) -> Any:
    if a.ndim < 2:
        return None
    return lax.scan(lambda c, x: (0.5 * c + x, c), jnp.zeros(a.shape[1:]), a, reverse=True)[1]


def while_loop(a: Any, b: Any, ids: Any) -> Any:
    """Reverse differentiation does not go through it, as jax has it: the way back is straight."""

    @jax.custom_vjp
    def loop(x: Any) -> Any:
        return lax.while_loop(lambda s: s[1] < 3, lambda s: (jnp.sin(s[0]) + x, s[1] + 1), (x, 0))[
            0
        ]

    loop.defvjp(lambda x: (loop(x), None), lambda _, g: (g,))
    return loop(a)


def cond(a: Any, b: Any, ids: Any) -> Any:
    return lax.cond(ids[0] > 3, lambda x: jnp.cos(x), lambda x: x * 2 + jnp.flip(x, 0), a)


def gather(a: Any, b: Any, ids: Any) -> Any:
    return a[ids % a.shape[0]] if a.ndim == 2 else None


def gather_clipped(a: Any, b: Any, ids: Any) -> Any:
    return a.at[ids * 2 - 3].get(mode="clip") if a.ndim else None


def gather_filled(a: Any, b: Any, ids: Any) -> Any:
    return a.at[ids * 2].get(mode="fill", fill_value=0.5) if a.ndim else None


def scatter_dropped(a: Any, b: Any, ids: Any) -> Any:
    return a.at[ids * 2].set(1.5, mode="drop") if a.ndim else None


def scatter_add(a: Any, b: Any, ids: Any) -> Any:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1:] != b.shape[1:] or b.shape[0] < 8:
        return None
    return a.at[ids % a.shape[0]].add(b[:8])


def concatenate(a: Any, b: Any, ids: Any) -> Any:
    if not a.ndim or a.ndim != b.ndim or a.shape[1:] != b.shape[1:] or a.size > 2048:
        return None
    return jnp.concatenate([a, b, a])


def cut(a: Any, b: Any, ids: Any) -> Any:
    return a[1:-1] if a.ndim and a.shape[0] > 3 else None


def cut_evenly(a: Any, b: Any, ids: Any) -> Any:
    return a[: a.shape[0] // 2] if a.ndim and a.shape[0] > 1 else None


def dynamic_slice(a: Any, b: Any, ids: Any) -> Any:
    return lax.dynamic_slice_in_dim(a, ids[1], a.shape[0] // 2) if a.ndim else None


def dynamic_update(a: Any, b: Any, ids: Any) -> Any:
    if not a.ndim or a.shape[0] < 2:
        return None
    # Not a part of `a` itself: XLA:CPU would read what it has just overwritten (jax 0.10 to 0.12).
    rows = jnp.broadcast_to(jnp.cos(a.mean(0)), (a.shape[0] // 2, *a.shape[1:]))
    return lax.dynamic_update_slice_in_dim(a, rows, ids[2], 0)


def pad(a: Any, b: Any, ids: Any) -> Any:
    return jnp.pad(a, [(1, 2)] + [(0, 0)] * (a.ndim - 1)) if a.ndim and a.size < 4096 else None


def cumsum(a: Any, b: Any, ids: Any) -> Any:
    return jnp.cumsum(a, axis=0) / 8 if a.ndim else None


def sort(a: Any, b: Any, ids: Any) -> Any:
    return jnp.sort(a, axis=-1) if a.ndim else None


def convolution(a: Any, b: Any, ids: Any) -> Any:
    if a.ndim != 3 or a.shape[-1] > 32:
        return None
    kernel = jnp.ones((3, a.shape[-1], 8)) / 16 + jnp.arange(8.0) / 64
    return lax.conv_general_dilated(
        a, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


def window(a: Any, b: Any, ids: Any) -> Any:
    if a.ndim != 2 or min(a.shape) < 2:
        return None
    return lax.reduce_window(a, -jnp.inf, lax.max, (2, 1), (2, 1), "VALID")


def checkpointed(a: Any, b: Any, ids: Any) -> Any:
    return jax.checkpoint(lambda x: jnp.sin(x) * x)(a)


OPS: tuple[Callable[[Any, Any, Any], Any], ...] = (
    add, transpose, reduce, matmul, residual_sum, multiply_columns, split_dim, merge_dims, softmax,
    batched_matmul, flatten_and_cut, reduce_max, layer_norm, scan_layers, scan_rows, while_loop,
    cond, gather, gather_clipped, gather_filled, scatter_dropped, scatter_add, concatenate, cut,
    cut_evenly, dynamic_slice, dynamic_update, pad,
    cumsum, sort, convolution, window, checkpointed,
)  # fmt: skip

Step = tuple[int, int, int, int]  # operation, first and second operand, annotation (0: none)
RNG = np.random.default_rng(3)
ARGS = (
    RNG.uniform(-1, 1, (8, 16)).astype(np.float32),
    RNG.uniform(-1, 1, (16, 16)).astype(np.float32),
    RNG.uniform(-1, 1, (4, 16, 16)).astype(np.float32),
    RNG.uniform(-1, 1, (8, 12)).astype(np.float32),
    RNG.integers(0, 8, 8).astype(np.int32),
)


def build(steps: Sequence[Step], grad: bool, mesh: Mesh) -> Callable[..., Any]:
    def forward(*args: Any) -> Any:
        pool, ids = list(args[:-1]), args[-1]
        for op, i, j, hint in steps:
            # The later arrays come first, so that programs are deep and not wide.
            a, b = pool[-1 - i % len(pool)], pool[-1 - j % len(pool)]
            out = OPS[op % len(OPS)](a, b, ids)
            if out is not None and out.size:
                pool.append(annotated(out, hint, mesh))
        return tuple(pool[len(args) - 1 :])[-3:]

    def backward(*args: Any) -> Any:
        def total(arrays: Any) -> Any:
            return sum(jnp.sum(jnp.sin(x)) for x in forward(*arrays, args[-1])) * 1.0

        return jax.value_and_grad(total)(args[:-1])

    return backward if grad else forward


def annotated(x: Any, hint: int, mesh: Mesh) -> Any:
    """x with a hint that its shape allows, or as it is."""
    if not hint or not x.ndim:
        return x
    d, axis = hint % x.ndim, hint % len(mesh.names)
    if x.shape[d] % mesh.sizes[axis]:
        return x
    spec = [mesh.names[axis] if k == d else autoshard.OPEN for k in range(x.ndim)]
    return autoshard.annotate(x, *spec, soft=hint % 5 == 0)


PROGRAMS = st.lists(
    st.tuples(
        st.integers(0, len(OPS) - 1),
        st.integers(0, 5),
        st.integers(0, 5),
        st.sampled_from([0, 0, 0, 0, 1, 2, 3, 5]),
    ),
    min_size=1,
    max_size=9,
)


# Random choices


def priced_on(traced: Traced, mesh: Mesh) -> Priced:
    graph, state = traced.graph, state_pairs(traced)
    fusion = fuse(graph, CLUSTER.platform)
    live = liveness(graph, fusion.stored, [p for p in state if p[0] in graph.donated])
    tied = replace(graph, ties=(*graph.ties, *state))
    return price(graph, mesh, CLUSTER, decide(tied, graph.hints), live, fusion, None)


def random_choice(priced: Priced, rng: random.Random, sweeps: int = 2) -> list[int]:
    """Each node in turn takes any choice that its neighbours allow; always feasible.

    The first choice of every node, replicated or unsplit, is where it starts.
    """
    problem = priced.problem
    around: list[list[tuple[int, Any]]] = [[] for _ in problem.nodes]
    for edge in problem.edges:
        around[edge.u].append((edge.v, edge.costs))
        around[edge.v].append((edge.u, edge.costs.T))
    choice = [int(node.costs.argmin()) for node in problem.nodes]
    order = list(range(len(choice)))
    for _ in range(sweeps):
        rng.shuffle(order)
        for node in order:
            total = problem.nodes[node].costs + sum(c[:, choice[o]] for o, c in around[node])
            allowed = np.flatnonzero(total < INFINITY)
            if len(allowed):
                choice[node] = int(rng.choice(list(allowed)))
    return choice


def random_plan(traced: Traced, priced: Priced, seed: int) -> Plan:
    choice = random_choice(priced, random.Random(seed))
    assert priced.problem.cost(choice) < INFINITY
    return Plan(assemble(priced, fixed(priced.problem, choice), "random", math.inf), traced)


def host(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def is_steady(fn: Callable[..., Any], expected: Any) -> bool:
    """Whether a rounding error in the arguments stays one; a sine of a long sum makes it grow."""
    near = [a * np.float32(1 + 2e-7) if a.dtype == np.float32 else a for a in ARGS]
    got = jax.tree.map(host, jax.jit(fn)(*near))
    return all(map(lambda x, y: difference(x, y) < 2e-5, *map(jax.tree.leaves, (got, expected))))


def check_same(plan: Plan, args: Sequence[Any], expected: Any, tolerance: float = 2e-4) -> None:
    try:
        call = plan.compile()
    except jax.errors.JaxRuntimeError as error:
        # XLA's partitioner makes an invalid program of some split gathers that clip (jax 0.10.2).
        assume("[hlo verifier]" not in str(error))
        raise
    got = jax.tree.map(host, call(*args))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert difference(x, y) <= tolerance, f"{x} is not {y}\n{plan.data.values}\n{plan}"


@settings(deadline=None, max_examples=25)
@given(PROGRAMS, st.booleans(), st.sampled_from(MESHES), st.integers(0, 2**16))
def test_random_plans_of_random_programs(
    steps: list[Step], grad: bool, sizes: dict[str, int], seed: int
) -> None:
    mesh = Mesh.of(sizes)
    fn = build(steps, grad, mesh)
    traced = traced_for(fn, ARGS, {}, {})
    expected = jax.tree.map(host, jax.jit(fn)(*ARGS))
    assume(is_steady(fn, expected))
    priced = priced_on(traced, mesh)
    for n in range(2):
        check_same(random_plan(traced, priced, seed + n), ARGS, expected)


@pytest.mark.parametrize(("number", "name"), list(enumerate(CASES)))
def test_random_plans_of_everything_jit_takes(number: int, name: str) -> None:
    case = CASES[name]
    mesh = Mesh.of(case.mesh or MESHES[1 + number % 2])
    traced = traced_for(case.fn, case.args, {}, {"donate_argnums": case.donate})
    expected = jax.tree.map(host, jax.jit(case.fn)(*case.args))
    plan = random_plan(traced, priced_on(traced, mesh), number)
    check_same(plan, case.args, expected, 0.02 if name in ("bfloat16", "float8") else 2e-4)


@settings(deadline=None, max_examples=12)
@given(PROGRAMS, st.booleans(), st.sampled_from(MESHES))
def test_the_solver_beats_every_baseline(
    steps: list[Step], grad: bool, sizes: dict[str, int]
) -> None:
    fn = build(steps, grad, Mesh.of(sizes))
    plan = autoshard.plan(fn, *ARGS, cluster=CLUSTER, mesh=sizes)
    assert {a.solver for a in plan.alternatives} == {"propagate", *BASELINES}
    for other in plan.alternatives:
        if other.cost is not None:
            assert plan.cost.step_time <= other.cost.step_time * (1 + 1e-9) + 1e-9, other
    for solver in ("propagate", *BASELINES):
        alone = autoshard.plan(fn, *ARGS, cluster=CLUSTER, mesh=sizes, solver=solver)
        (same,) = [a for a in plan.alternatives if a.solver == solver]
        assert same.cost is None or same.cost == alone.cost


@settings(deadline=None, max_examples=25)
@given(PROGRAMS, st.booleans(), st.sampled_from(MESHES), st.integers(0, 2**16))
def test_a_plans_time_is_what_the_problem_says(
    steps: list[Step], grad: bool, sizes: dict[str, int], seed: int
) -> None:
    """The problem counts whole picoseconds, so each of its entries may be off by one."""
    mesh = Mesh.of(sizes)
    priced = priced_on(traced_for(build(steps, grad, mesh), ARGS, {}, {}), mesh)
    choice = random_choice(priced, random.Random(seed))
    problem, cost = priced.problem, cost_of(priced, choice)
    entries = len(problem.nodes) + len(problem.edges) + len(priced.graph.ops)
    predicted = problem.cost(choice) / 1e12 + priced.constant
    assert cost.step_time == pytest.approx(predicted, abs=entries * 2e-12)
    assert cost.compute_time <= cost.step_time <= cost.bounds[1] * (1 + 1e-9)


@settings(deadline=None, max_examples=25)
@given(PROGRAMS, st.booleans(), st.sampled_from(MESHES), st.integers(0, 2**16))
def test_the_problem_never_holds_more_memory_than_the_plan(
    steps: list[Step], grad: bool, sizes: dict[str, int], seed: int
) -> None:
    """The problem leaves resharded copies and very small values out, and what is lent, in."""
    mesh = Mesh.of(sizes)
    priced = priced_on(traced_for(build(steps, grad, mesh), ARGS, {}, {}), mesh)
    choice = random_choice(priced, random.Random(seed))
    peak = float(priced.problem.memory(choice).max(initial=0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("passes.held.lent", lambda *_: [])
        assert peak <= cost_of(priced, choice).peak_memory + 1e-6
