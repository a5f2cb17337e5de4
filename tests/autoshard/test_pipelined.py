"""plan(stages=...): the same numbers, a plan that can be read and kept, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax.sharding import PartitionSpec as P
from pipeline_models import MODELS, filled, worst

import autoshard
from autoshard.cli_errors import NO_PLAN, USER, failure
from autoshard.pipelined import PipelinedPlan
from passes.ir.mesh import MeshError
from passes.ir.plan import PlanError
from passes.microbatch_loop import NoTimeLoop
from passes.pipeline.schedule import ScheduleError
from passes.search import NoFeasiblePlan
from passes.stages import NoStages

pytestmark = pytest.mark.usefixtures("in_a_hurry")

ON = {"cluster": "h100:8"}


@cache
def case(name: str) -> tuple[Callable[..., Any], Any, list[Any]]:
    fn, shapes = MODELS[name]()
    args = filled(shapes)
    return fn, args, jax.tree.leaves(jax.jit(fn)(*args))


def small(layers: int = 4, batch: int = 16) -> Any:
    return zoo.gpt(width=64, layers=layers, heads=4, sequence=32, batch=batch, vocab=128, scan=True)


def pipelined(fn: Any, *args: Any, **options: Any) -> PipelinedPlan:
    plan = autoshard.plan(fn, *args, **{**ON, **options})
    assert isinstance(plan, PipelinedPlan)
    return plan


FORMS = {
    "1F1B": {"stage": 2, "data": 2, "model": 2},
    "interleaved 1F1B": {"stage": 2, "data": 2, "model": 2},
    "ZB-H1": {"stage": 4, "data": 1, "model": 2},
    "ZB-V": {"stage": 2, "data": 1, "model": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", FORMS)
@pytest.mark.parametrize("model", ["gpt_scan_remat", "gpt", "encoder_decoder"])
def test_numbers_with_sharding_inside_the_stages(model: str, schedule: str) -> None:
    """Megatron's split inside a stage, so that something is split in models as small as these."""
    fn, args, want = case(model)
    mesh = FORMS[schedule]
    plan = pipelined(
        fn, *args, stages=mesh["stage"], mesh=mesh, microbatches=4, schedule=schedule, solver="tp"
    )
    assert any(op.strategy for op in plan.ops)
    got = plan.compile()(*args)
    assert worst(jax.tree.leaves(got), want) < 1e-4


@pytest.mark.slow
def test_the_next_step_takes_the_results_of_the_last() -> None:
    """Stacked weights stay with their stages: nothing is put together in between."""
    fn, args, _ = case("gpt_scan")
    plan = pipelined(fn, *args, stages=2, mesh={"stage": 2, "data": 2, "model": 2}, microbatches=4)
    run, whole = plan.compile(), jax.jit(fn)
    state, want = args[0], args[0]
    outs = jax.eval_shape(fn, *args)
    assert jax.tree.structure(outs[0]) == jax.tree.structure(args[0])
    for _ in range(3):
        state, value = run(state, *args[1:])
        want, expected = whole(want, *args[1:])
        assert float(value) == pytest.approx(float(expected), rel=1e-4)
    assert worst(jax.tree.leaves(state), jax.tree.leaves(want)) < 1e-3
    stacked = [x for x in jax.tree.leaves(state) if x.ndim == 3 and x.shape[0] == 6]
    assert stacked
    assert all(x.sharding.spec[0] == "stage" for x in stacked)


@cache
def plain() -> PipelinedPlan:
    """One that several tests look at."""
    fn, args = small()
    return pipelined(fn, *args, stages=2, microbatches=4, schedule="1f1b")


def test_a_plan_reads_and_is_kept() -> None:
    fn, args = small()
    plan = plain()
    text = str(plan)
    assert "1F1B, 4 microbatches" in text
    assert "device 0 |F" in text
    assert max(map(len, text.splitlines())) <= 100
    read = autoshard.Plan.from_json(plan.to_json())
    assert isinstance(read, PipelinedPlan)
    assert str(read) == text
    assert read.to_json() == plan.to_json()
    with pytest.raises(PlanError, match="needs the function"):
        read.compile()
    bound = read.bind(fn, *args)
    assert len(bound.layouts()) == 2
    other, shapes = small(layers=6)
    with pytest.raises(PlanError, match="is not what was planned"):
        read.bind(other, *shapes)


@pytest.mark.slow
def test_the_search_takes_the_fastest() -> None:
    fn, args = small()
    best = pipelined(fn, *args, stages=2)
    times = [a.cost.step_time for a in best.alternatives if a.cost]
    assert times == sorted(times)
    assert best.cost.step_time <= times[0]
    fixed = pipelined(fn, *args, stages=2, microbatches=4, schedule="GPipe")
    assert best.cost.step_time <= fixed.cost.step_time


def test_one_program_for_all_devices_may_be_faster() -> None:
    fn, args = small()
    ask = partial(autoshard.plan, fn, *args, cluster="h100:2", microbatches=2)
    whole, best = ask(), ask(stages="auto")
    assert best.cost.step_time <= whole.cost.step_time


def test_the_timeline_is_the_step() -> None:
    fn, args = small()
    plan = pipelined(fn, *args, stages=4, microbatches=4, schedule="ZB-H1")
    last = max(row.end for row in plan.timeline.rows)
    assert last <= plan.cost.step_time <= last + max(plan.data.tails) + 1e-12
    assert plan.data.apart
    assert plan.cost.peak_memory == max(plan.data.memory)


def test_a_piece_may_have_nothing_to_do() -> None:
    """One of eight pieces of this model is a few operations whose results nobody reads."""
    fn, args, _ = case("mixture_of_experts")
    form = {"cluster": "cpu:8", "solver": "tp", "microbatches": 16}
    plan = pipelined(fn, *args, stages=8, schedule="auto", **form)
    assert len(plan.data.pieces) == 8
    assert min(piece.forward for piece in plan.data.pieces) >= 0


def test_gradients_are_summed_over_groups_once() -> None:
    """More microbatches need no more of it."""
    fn, args = small(batch=64)
    mesh = {"stage": 2, "data": 4, "model": 1}
    few, many = (
        pipelined(fn, *args, stages=2, mesh=mesh, microbatches=m, schedule="1F1B") for m in (2, 16)
    )
    assert max(few.data.tails) == pytest.approx(max(many.data.tails), rel=0.01)


def classifier(params: Any, images: Any, labels: Any, normed: bool = False) -> tuple[Any, Any, Any]:
    """A step of dense layers that also counts right answers; normed: over the whole batch."""

    def loss(params: Any) -> Any:
        x = images
        for w in params:
            x = jnp.tanh(x @ w)
            x = (x - x.mean(0)) / (0.1 + x.std(0)) if normed else x
        picked = jnp.take_along_axis(jax.nn.log_softmax(x), labels[:, None], 1)
        return -picked.mean(), (x.argmax(1) == labels).sum()

    (value, right), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value, right


@pytest.mark.parametrize("normed", [False, True])
def test_a_metric_and_a_norm_over_the_batch(normed: bool) -> None:
    """A sum of the loop that is a result as it is; a batch norm, after which all has to wait."""
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal((8, 8)).astype(np.float32) for _ in range(4)]
    images = rng.standard_normal((16, 8)).astype(np.float32)
    args = weights, images, rng.integers(0, 8, 16).astype(np.int32)
    fn = partial(classifier, normed=normed)
    form = {"stages": 2, "mesh": {"data": 2}, "microbatches": 4, "schedule": "1F1B"}
    plan = pipelined(fn, *args, cluster="cpu:4", **form)
    assert any("before or after all microbatches" in note for note in plan.data.notes) == normed
    got = jax.tree.leaves(plan.compile()(*args))
    assert worst(got, jax.tree.leaves(jax.jit(fn)(*args))) < 1e-4


def clipped_by_sample(params: Any, images: Any, targets: Any) -> tuple[Any, Any, Any, float]:
    """Gradients of samples, each clipped by its own norm (Abadi et al., arXiv 1607.00133)."""

    def loss(params: Any, x: Any, y: Any) -> Any:
        for w in params:
            x = jnp.tanh(x @ w)
        return ((x - y) ** 2).mean()

    grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, images, targets)
    norms = jnp.sqrt(sum(jnp.sum(g**2, (1, 2)) for g in grads))
    scale = jnp.minimum(1, 0.1 / norms)
    new = [p - (g * scale[:, None, None]).mean(0) for p, g in zip(params, grads, strict=True)]
    return new, norms.mean(), images, 3.0


@pytest.mark.parametrize("schedule", ["1F1B", "ZB-H1"])
def test_what_is_made_of_gradients_in_each_microbatch(schedule: str) -> None:
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal((8, 8)).astype(np.float32) for _ in range(4)]
    args = weights, *rng.standard_normal((2, 16, 8)).astype(np.float32)
    form = {"stages": 2, "mesh": {"data": 2}, "microbatches": 4, "schedule": schedule}
    got = pipelined(clipped_by_sample, *args, cluster="cpu:4", **form).compile()(*args)
    want = jax.jit(clipped_by_sample)(*args)
    assert worst(jax.tree.leaves(got), jax.tree.leaves(want)) < 1e-4


def test_a_mesh_need_not_repeat_the_number_of_stages() -> None:
    fn, args = small()
    asked = partial(pipelined, fn, *args, stages=np.int64(2), microbatches=4, schedule="1F1B")
    inside, whole = {"data": 2, "model": 2}, {"stage": 2, "data": np.int64(2), "model": 2}
    assert asked(mesh=inside).to_json() == asked(mesh=whole).to_json()


def test_hints_that_no_stage_follows_are_told() -> None:
    fn, args = small()
    mesh = {"data": 2, "model": 2}
    asked = partial(pipelined, fn, *args, stages=2, mesh=mesh, microbatches=4)
    wanted = {"state/params/**/w1": P("stage", "data", "model"), "batch": P("data")}
    notes = asked(schedule="1F1B", hints=wanted).data.notes
    said = [n for n in notes if "hints[" in n]
    assert said == [
        "'stage' in hints['state/params/**/w1'] decides nothing: a stage holds the layers that it "
        "runs",
        "'data' in hints['state/params/**/w1'] is not followed: every group holds all weights of "
        "its stages; shared_update=True splits the optimizer's state over the groups",
    ]


def test_a_batch_that_is_not_found_is_to_be_hinted() -> None:
    def step(w: Any, x: Any) -> Any:  # x: [time, batch, width]
        def loss(w: Any) -> Any:
            start = jnp.zeros(x.shape[1:])
            return (jax.lax.scan(lambda h, x: (jnp.tanh(x + h @ w), None), start, x)[0] ** 2).mean()

        return w - 0.1 * jax.grad(loss)(w)

    shapes = np.zeros((8, 8), np.float32), np.zeros((6, 16, 8), np.float32)
    with pytest.raises(NoTimeLoop, match=r"batch is another dim, hints say so.*'micro'\)"):
        pipelined(step, *shapes, stages=2, microbatches=3, donate_argnums=0)


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "more stages than layers": (NoStages, "4 at most", {"stages": 8}),
    "stages that do not divide": (NoStages, "can not share 8 devices evenly; 2 can", {"stages": 3}),
    "microbatches": (
        NoTimeLoop,
        "it is 4 .dim 0 of .* was found to be the batch",
        {"microbatches": 5},
    ),
    "pieces": (
        NoStages,
        "ZB-V on 4 stages is 8 pieces.* 4 at most; 2 stages can",
        {"stages": 4, "schedule": "ZB-V"},
    ),
    "chunks": (NoStages, "3 chunks on 2 stages is 6 pieces.* 4 at most$", {"chunks": 3}),
    "microbatches of groups": (
        NoTimeLoop,
        "16 over 4 groups can not be cut into 8 .* divides it is 4",
        {"mesh": {"stage": 2, "data": 4}, "microbatches": 8},
    ),
    "groups": (
        NoTimeLoop,
        "16 can not be shared by 3 data-parallel groups; .* divides it is 2",
        {"cluster": "h100:6", "mesh": {"stage": 2, "data": 3}},
    ),
    "memory": (NoFeasiblePlan, "MiB|KiB", {"memory_limit": "300KiB"}),
    "no memory": (NoFeasiblePlan, "no pipeline fits in 0 B per device", {"memory_limit": 0}),
    "no schedule": (ScheduleError, "no schedule is called 'zb-h9'", {"schedule": "zb-h9"}),
    "not a multiple": (
        ScheduleError,
        "multiple of 2 microbatches",
        {"stages": 2, "schedule": "interleaved 1F1B", "microbatches": 1},
    ),
    "no number": (ValueError, "stages is a whole number", {"stages": 0}),
    "no number of chunks": (
        ValueError,
        "chunks is a whole number from 1 on, not -2",
        {"schedule": "interleaved 1F1B", "chunks": -2},
    ),
    "half a chunk": (ValueError, "whole number from 1 on, not 1.5", {"chunks": 1.5}),
    "chunks of another schedule": (
        ScheduleError,
        "ZB-V has 2 chunks per stage, not 3: leave chunks out, or choose interleaved 1F1B and Pipe",
        {"schedule": "zbv", "chunks": 3},
    ),
    "microbatches of chunks": (
        ScheduleError,
        "3 chunks on 2 stages take a multiple of 2 microbatches, not 1; the nearest is 2",
        {"chunks": 3, "microbatches": 1, "layers": 6},
    ),
    "no name of a schedule": (TypeError, "schedule is the name of one", {"schedule": ["1F1B"]}),
    "neither true nor false": (
        TypeError,
        "shared_update is True, False or None, not 'yes'",
        {"shared_update": "yes"},
    ),
    "a mesh beside the stages": (
        ValueError,
        "mesh stage=2 model=8 has 16 devices",
        {"mesh": {"model": 8}},
    ),
    "two numbers of stages": (MeshError, "axis stage=4", {"mesh": {"stage": 4, "data": 2}}),
}


@pytest.mark.parametrize("what", BAD)
def test_what_can_not_be_is_refused_in_words(what: str) -> None:
    kind, words, options = BAD[what]
    fn, args = small(layers=options.get("layers", 4))
    options = {k: v for k, v in options.items() if k != "layers"}
    with pytest.raises(kind, match=words) as caught:
        pipelined(fn, *args, **{"stages": 2, **options})
    told = failure(caught.value)
    assert told.code in (NO_PLAN, USER)
    assert told.sentence == str(caught.value)
    assert "stage_step.py" not in told.sentence  # lines of the user's only


def test_a_function_without_a_batch() -> None:
    def step(w: Any) -> Any:
        return jnp.tanh(w @ w).sum()

    with pytest.raises(NoTimeLoop, match=r"no batch dimension|nothing of step can run"):
        pipelined(step, np.ones((8, 8), np.float32), stages=2)


def test_what_a_pipeline_does_not_have_says_so() -> None:
    fn, args = small()
    plan = plain()
    for ask in (lambda: plan.lower(), lambda: plan.in_shardings, lambda: plan.verify(top=2)):
        with pytest.raises(PlanError):
            ask()
    with pytest.raises(ValueError, match="give stages too"):
        autoshard.plan(fn, *args, cluster="h100:8", schedule="1F1B")
