"""A train step over the stages of a pipeline gives the numbers of the step as it is.

Whatever the schedule, the number of stages and the model; a stage runs on one device, or is split
over two. The oracle is the function itself, run by jax.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import zoo
from pipeline_models import MODELS, filled, worst

from autoshard.controller import Controller
from autoshard.in_stages import Staged, in_stages
from passes.pipeline import both_ways, generators, offload, vee
from passes.pipeline.schedule import Schedule
from passes.stages import NoStages
from passes.time_loop import unit_path

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_a_hurry")]


@cache
def case(name: str, count: int, steps: int = 8) -> tuple[Staged, list[Any], list[Any]]:
    """A model in so many steps and stages, its arguments and its results."""
    fn, shapes = MODELS[name]()
    args = filled(shapes)
    staged = in_stages(fn, args, {}, {}, microbatches=steps, count=count)
    return staged, jax.tree.leaves(args), jax.tree.leaves(jax.jit(fn)(*args))


def check(name: str, schedule: Schedule, each: int = 1) -> None:
    staged, flat, want = case(name, schedule.pieces, schedule.microbatches * each)
    devices = jax.devices()
    split = [devices[d * each : (d + 1) * each] for d in range(schedule.devices)]
    run = Controller(staged.traced, staged.loop, staged.stages, schedule, split)
    assert worst(run(*flat), want) < 1e-4


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": generators.gpipe,
    "1f1b": generators.one_f_one_b,
    "eager": generators.eager,
    "interleaved": partial(generators.interleaved, chunks=2),
    "2bp": generators.two_bp,
    "zb_h1": generators.zb_h1,
    "zb_h2": generators.zb_h2,
    "v_min": vee.v_min,
    "v_half": vee.v_half,
    "zb_v": vee.zb_v,
    "dualpipe": both_ways.dualpipe,
    "bitpipe": both_ways.bitpipe,
    "offload": offload.pipe_offload,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_numbers(schedule: str) -> None:
    check("gpt", SCHEDULES[schedule](4, 8))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_gives_the_numbers(model: str) -> None:
    check(model, generators.zb_h1(4, 8), each=2)


@pytest.mark.parametrize("model", ["gpt_scan_remat", "unet"])
def test_two_stages(model: str) -> None:
    check(model, generators.zb_h1(2, 4), each=4)


def test_pieces_in_which_nothing_is_multiplied() -> None:
    """They take no FLOPs, and still come after what they wait for."""
    check("unet", vee.v_min(8, 8))


def test_eight_stages() -> None:
    check("gpt", generators.zb_h2(8, 8))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_operation_lies_in_one_stage_and_work_goes_one_way(model: str, count: int) -> None:
    """F never waits for a later stage, B and W never for an earlier one; nothing waits for W."""
    staged, _, _ = case(model, count)
    loop, stages = staged.loop, staged.stages
    inside = {path for path, phase in loop.phases.items() if phase == "loop"}
    assert stages.stage.keys() == stages.kind.keys() == inside
    assert set(stages.stage.values()) == set(range(count))
    made = {v: unit_path(op) for op in loop.graph.ops for v in op.outputs}
    for op in loop.graph.ops:
        here = unit_path(op)
        for v in op.inputs:
            there = made.get(v)
            if here not in inside or there not in inside or there == here:
                continue
            before, after = stages.stage[there], stages.stage[here]
            kinds = stages.kind[there] + stages.kind[here]
            if kinds == "FF":
                assert before <= after
            elif kinds[0] != "F":
                assert before >= after
                assert kinds[1] != "F"
                assert kinds == "WW" or kinds[0] == "B"
    total = sum(sum(each.values()) for each in stages.flops)
    wanted = sum(
        op.rule.flops * loop.graph.trips(op.region)
        for op in loop.graph.ops
        if unit_path(op) in inside
    )
    assert total == pytest.approx(wanted)


@pytest.mark.parametrize("scan", [False, True])
def test_stages_of_a_gpt_are_even(scan: bool) -> None:
    """Layers alike: forward, backward and weights cost about the same, in each stage alike."""
    fn, args = zoo.gpt(width=64, layers=4, heads=2, sequence=16, batch=16, vocab=32, scan=scan)
    stages = in_stages(fn, args, {}, {}, microbatches=8, count=4).stages
    forward = [each["F"] for each in stages.flops]
    assert max(forward) < 1.1 * min(forward)
    for each in stages.flops[1:]:
        assert each["B"] == pytest.approx(each["F"], rel=0.15)
        assert each["W"] == pytest.approx(each["F"], rel=0.15)


def test_more_stages_than_there_is_to_do() -> None:
    def fn(w: Any, x: Any) -> Any:
        return jax.value_and_grad(lambda w: jnp.sum(x @ w))(w)

    args = jnp.ones((4, 4)), jnp.ones((8, 4))
    with pytest.raises(NoStages, match=r"fn has \d+ forward operations .* too few for 9 stages"):
        in_stages(fn, args, {}, {}, microbatches=2, count=9)


def test_the_controller_is_never_further_ahead_than_it_may() -> None:
    staged, flat, want = case("gpt", 4)
    devices = [[d] for d in jax.devices()[:4]]
    schedule = generators.one_f_one_b(4, 8)
    for ahead in (1, 100):
        run = Controller(staged.traced, staged.loop, staged.stages, schedule, devices, ahead=ahead)
        assert worst(run(*flat), want) < 1e-4
        begun = run.flight.begun
        assert all(sum(b.is_task for b in own) <= ahead for own in begun)


@pytest.mark.parametrize("model", ["gpt", "gpt_scan_remat"])
def test_each_stage_holds_and_updates_its_own_weights(model: str) -> None:
    """Weights and moments lie on the stages that use them; only embeddings on two."""
    staged, flat, _ = case(model, 4)
    devices = [[d] for d in jax.devices()[:4]]
    run = Controller(
        staged.traced, staged.loop, staged.stages, generators.one_f_one_b(4, 8), devices
    )
    sizes = {p: x.nbytes for p, x in zip(run.program.inputs, flat, strict=True)}
    held = [set(needed) for needed in run.needed]
    for group in run.updating:
        held[group.stage].update(group.inputs)
    total = sum(sizes.values())
    avals = run.program.avals
    sizes |= {p: avals[p].size * avals[p].dtype.itemsize for p in run.made.stacked.cuts}
    assert all(sum(sizes[p] for p in own) < 0.5 * total for own in held)
    assert sum(sizes[p] for own in held for p in own) < 1.5 * total
    results = run(*flat)
    assert {d for x in results for d in x.devices()} == set(jax.devices()[:4])


def test_a_call_returns_before_the_work_is_done() -> None:
    fn, args = zoo.gpt(width=128, layers=4, heads=4, sequence=128, batch=64, vocab=128)
    flat = [jnp.ones(x.shape, x.dtype) for x in jax.tree.leaves(args)]
    staged = in_stages(fn, args, {}, {}, microbatches=16, count=4)
    devices = [[d] for d in jax.devices()[:4]]
    schedule = generators.one_f_one_b(4, 16)
    run = Controller(staged.traced, staged.loop, staged.stages, schedule, devices, ahead=8)
    jax.block_until_ready(run(*flat))  # compiled
    results = run(*flat)
    assert not all(x.is_ready() for x in results if isinstance(x, jax.Array))
