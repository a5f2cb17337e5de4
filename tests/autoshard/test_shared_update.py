"""Groups that share an update: the same numbers, and each holds no more than its part of the state.

Numbers are those of jax's own jit; what lies where is read off the arrays, and what is sent off the
compiled program of the update.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from pipeline_models import MODELS, filled, worst

import autoshard
from autoshard.in_parts import stage_parts
from autoshard.pipeline_data import whole_memory
from autoshard.pipelined import PipelinedPlan
from passes.ir.plan import PlanError
from passes.search import NoFeasiblePlan

pytestmark = pytest.mark.usefixtures("in_a_hurry")


MESHES = ({"stage": 2, "data": 4, "model": 1}, {"stage": 2, "data": 2, "model": 2})


def planned(fn: Any, args: Any, mesh: dict[str, int], **options: Any) -> PipelinedPlan:
    given = {"microbatches": 4, "schedule": "1F1B", "shared_update": True} | options
    plan = autoshard.plan(fn, *args, cluster="h100:8", stages=mesh["stage"], mesh=mesh, **given)
    assert isinstance(plan, PipelinedPlan)
    return plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mesh"), [("gpt_scan", MESHES[1]), ("encoder_decoder", MESHES[0])]
)
def test_numbers_step_after_step(model: str, mesh: dict[str, int]) -> None:
    """With clipping by the global norm, whose squares each group adds up of its part."""
    fn, shapes = MODELS[model]()
    args = filled(shapes)
    run = planned(fn, args, mesh, solver="tp").compile()
    state, want, plain = args[0], args[0], jax.jit(fn)
    for _ in range(2):
        state, value = run(state, *args[1:])
        want, expected = plain(want, *args[1:])
        assert float(value) == pytest.approx(float(expected), rel=1e-4)
        assert worst(jax.tree.leaves(state), jax.tree.leaves(want)) < 1e-3
    moments = state["opt"] if isinstance(state, dict) else state[1]
    moments = [x for x in jax.tree.leaves(moments) if x.ndim > 1]
    apart = [x for x in moments if "data" in jax.tree.leaves(tuple(x.sharding.spec))]
    assert sum(x.nbytes for x in apart) > 0.9 * sum(x.nbytes for x in moments)
    for x in apart:
        assert len({str(s.index) for s in x.addressable_shards}) >= mesh["data"]


def layers(tx: Any, count: int = 4, width: int = 16) -> tuple[Callable[..., Any], Any]:
    """A train step of equal layers."""
    params = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * count

    def loss(params: Any, x: Any) -> Any:
        y = x
        for w in params:
            y = jnp.tanh(y @ w)
        return jnp.mean((y - x) ** 2)

    def train_step(state: Any, x: Any) -> Any:
        params, opt = state
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    x = jax.ShapeDtypeStruct((32, width), jnp.float32)
    return train_step, ((params, jax.eval_shape(tx.init, params)), x)


OPTIMIZERS: dict[str, tuple[Any, bool]] = {
    "adam": (optax.adam(1e-2, eps=1e-3), True),
    "lion": (optax.lion(1e-2), True),
    "sgd": (optax.sgd(1e-2), False),
    "momentum": (optax.sgd(1e-2, momentum=0.9), True),
    "adafactor": (optax.adafactor(1e-2, min_dim_size_to_factor=8), True),
    "lamb": (optax.lamb(1e-2, eps=1e-3), True),
    "clipped elementwise": (optax.chain(optax.clip(0.1), optax.adam(1e-2, eps=1e-3)), True),
    "where finite": (optax.apply_if_finite(optax.adam(1e-2, eps=1e-3), 5), False),
}


@cache
def parts(name: str) -> tuple[PipelinedPlan, Any, Any]:
    fn, shapes = layers(OPTIMIZERS[name][0])
    return planned(fn, shapes, MESHES[0]), fn, shapes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_which_optimizers_are_in_parts(name: str) -> None:
    """Those whose operations leave a dim alone; one that runs in a branch is not, as a whole."""
    plan, _, _ = parts(name)
    spared = max(p.spared for p in plan.data.pieces)
    assert (spared > 0) == OPTIMIZERS[name][1]
    assert ("optimizer state over 4 groups" in str(plan)) == (spared > 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_of_every_optimizer(name: str) -> None:
    plan, fn, shapes = parts(name)
    args = filled(shapes)
    got = plan.compile()(*args)
    assert worst(jax.tree.leaves(got), jax.tree.leaves(jax.jit(fn)(*args))) < 1e-4


@pytest.mark.parametrize("donated", [(), (0,)])
def test_a_device_lies_less_full_by_what_is_said(donated: tuple[int, ...]) -> None:
    """Where the state is not donated, the old one lies beside the new one."""
    fn, shapes = layers(OPTIMIZERS["adam"][0], width=256)
    shared, whole = (
        planned(fn, shapes, MESHES[0], shared_update=flag, donate_argnums=donated)
        for flag in (True, False)
    )
    weights = 2 * 256 * 256 * 4  # of the two layers of a stage
    for own, other in zip(shared.data.pieces, whole.data.pieces, strict=True):
        assert own.spared == 2 * weights * 3 / 4 * (1 if donated else 2)
        assert other.lying - own.lying == pytest.approx(own.spared, rel=0.01)
        loss = 4 * (own == shared.data.pieces[-1])
        assert (other.reduced, other.scattered, other.gathered) == (weights + loss, 0, 0)
        assert (own.reduced, own.scattered, own.gathered) == (loss, weights, weights)
    assert 1 <= whole_memory(shared.data) / whole.cost.peak_memory < 1.1
    assert whole_memory(whole.data) == whole.cost.peak_memory


def test_what_fits_in_parts_only_is_in_parts() -> None:
    fn, shapes = layers(OPTIMIZERS["adam"][0], width=256)
    peaks = {
        flag: planned(fn, shapes, MESHES[0], shared_update=flag).cost.peak_memory
        for flag in (True, False)
    }
    limit = (peaks[True] + peaks[False]) / 2
    plan = planned(fn, shapes, MESHES[0], shared_update=None, memory_limit=limit)
    assert plan.data.shared_update
    assert plan.cost.peak_memory <= limit
    with pytest.raises(NoFeasiblePlan):
        planned(fn, shapes, MESHES[0], shared_update=False, memory_limit=limit)


@pytest.mark.parametrize("width", [16, 1024])
def test_the_better_of_both_is_taken(width: int) -> None:
    """Small arrays take two collectives' latency instead of one's; large ones gain by it."""
    fn, shapes = layers(OPTIMIZERS["adam"][0], width=width)
    found = {
        flag: planned(fn, shapes, MESHES[0], shared_update=flag) for flag in (None, True, False)
    }
    times = {flag: plan.cost.step_time for flag, plan in found.items()}
    assert times[None] == min(times[True], times[False])
    assert found[None].data.shared_update == (times[True] <= times[False])


def test_the_program_of_an_update_sends_no_state() -> None:
    """It gathers new parameters, and nothing else; it holds the parts of moments only, and once."""
    fn, shapes = layers(OPTIMIZERS["adam"][0], width=64)
    plan = planned(fn, shapes, MESHES[0], donate_argnums=0)
    controller = plan.compile().run  # type: ignore[attr-defined]
    controller(*jax.tree.leaves(filled(shapes)))
    weights = 2 * 64 * 64 * 4
    checked = 0
    each = zip(controller.updating, controller.overwritten, controller.updates, strict=True)
    for group, over, run in each:
        layout, mesh = controller.layouts[group.stage], controller.meshes[0][group.stage]
        if not any(p in layout.over.rest for p in group.inputs):
            continue
        avals = controller.program.avals

        def shaped(p: int, spec: Any, *first: int, mesh: Any = mesh, avals: Any = avals) -> Any:
            shape, sharding = (*first, *avals[p].shape), jax.NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(shape, avals[p].dtype, sharding=sharding)

        inputs = {p: shaped(p, layout.whole[p]) for p in group.inputs}
        compiled = run.lower(
            [inputs[p] for p in over],
            [x for p, x in inputs.items() if p not in over],
            [[shaped(p, jax.P("data"), 4)] for p in group.made],
            [shaped(p, jax.P()) for p in group.ins],
        ).compile()
        gathered = [
            np.prod([int(n) for n in dims.split(",") if n]) * 4
            for dims in re.findall(r"= f32\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
        ]
        assert sum(gathered) == weights
        memory = compiled.memory_analysis()
        state = weights * (1 + 2 / 4)
        assert memory.argument_size_in_bytes == pytest.approx(weights + state, rel=0.01)
        assert memory.alias_size_in_bytes == pytest.approx(state, rel=0.01)
        checked += 1
    assert checked == 2


def test_master_weights_that_tasks_read_narrow_rest_in_parts() -> None:
    """Converted ahead of the tasks: what is gathered is the narrow copy, not the new weights."""

    def step(w: Any, m: Any, x: Any) -> Any:
        def loss(w: Any, x: Any) -> Any:
            narrow = [v.astype(jnp.bfloat16) for v in w]
            y = x
            for v in narrow:
                y = jnp.tanh(y @ v)
            return jnp.mean((y - x).astype(jnp.float32) ** 2)

        value, grads = jax.value_and_grad(loss)(w, x)
        m = [0.9 * a + g for a, g in zip(m, grads, strict=True)]
        return [v - 0.1 * a for v, a in zip(w, m, strict=True)], m, value

    w = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 4
    shapes = (w, w, jax.ShapeDtypeStruct((32, 64), jnp.bfloat16))
    plan = planned(step, shapes, MESHES[0])
    for piece in plan.data.pieces:
        assert piece.spared == 4 * (2 * 64 * 64 * 4) * 3 / 4
        assert piece.gathered == 2 * 64 * 64 * 2
    args = filled(shapes)
    got, want = plan.compile()(*args), jax.jit(step)(*args)
    assert worst(jax.tree.leaves(got), jax.tree.leaves(want)) < 2e-2
    assert all("data" in x.sharding.spec for x in got[0])


def test_a_shared_plan_is_kept_and_explained() -> None:
    fn, shapes = zoo.gpt(width=64, layers=4, heads=4, sequence=32, batch=16, vocab=128, scan=True)
    plan = planned(fn, shapes, MESHES[1])
    read = autoshard.Plan.from_json(plan.to_json(), fn, *shapes)
    assert isinstance(read, PipelinedPlan)
    assert read.to_json() == plan.to_json()
    assert [x.whole for x in read.layouts()] == [x.whole for x in plan.layouts()]
    told = plan.explain("state/opt/**/w1")
    assert "mu/layers/w1: each of 2 groups has its part of dim 2" in told
    assert "each of" not in plan.explain("state/params/**/w1")


def test_stacked_layers_are_never_in_parts_over_layers() -> None:
    """Their first dim is that of the stages, whose pieces are put together without a copy."""
    fn, shapes = MODELS["gpt_scan"]()
    plan = planned(fn, shapes, MESHES[1])
    cut = plan._bound_cut("test")
    for stage in range(2):
        over = stage_parts(cut, stage, 2, 2)
        assert any(p in cut.made.stacked.cuts for p in over.rest)
        for p, dim in over.dims.items():
            assert p not in cut.made.stacked.cuts or dim > 0


def test_several_processes_refuse_what_does_not_fit_whole(monkeypatch: Any) -> None:
    """One program for all processes has the state whole in each group."""
    fn, shapes = layers(OPTIMIZERS["adam"][0], width=256)
    mesh = {"stage": 2, "data": 4}
    plan = planned(fn, shapes, mesh)
    tight = planned(fn, shapes, mesh, memory_limit=plan.cost.peak_memory * 1.01)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "each group updates all of its stage" in plan.lowering
    plan.compile()
    with pytest.raises(PlanError, match=r"state in parts over 4 groups, .* shared_update=False"):
        tight.compile()
