"""Do the experts' versions compute what the plain step does, and is a plan as fast as they are?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import expert_report
import experts
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from accuracy_programs import moe
from expert_versions import DATA, EXPERTS, FSDP, TENSOR, Version, lowered

from cost_models.cluster import cluster

# The same models, small enough to run on eight virtual devices.
SMALL: dict[str, Callable[..., zoo.Job]] = {
    "gpt_1p3b": partial(zoo.gpt, width=32, layers=2, heads=4, sequence=8, batch=8, vocab=64),
    "moe": partial(moe, layers=1, experts=8, groups=8, tokens=16, width=16),
    "dlrm": partial(zoo.dlrm, batch=16, width=8, rows=(10, 4096)),
}


# Of each the version that splits most.
FULLEST = {
    "gpt_1p3b": "fsdp+tp+sequence",
    "moe": "fsdp+experts+tp",
    "dlrm": "rows+columns",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_version_computes_what_the_plain_step_does(name: str) -> None:
    fn, args = SMALL[name]()
    args = zoo.filled(args)
    expected, loss = jax.jit(fn)(*args)
    program = dataclasses.replace(EXPERTS[name], make=SMALL[name])
    kind = next(v for v in program.versions if v.name == FULLEST[name])
    version = dataclasses.replace(kind, mesh=(4, 2))
    compiled = lowered(program, version, jax.devices("cpu")[:8]).compile()
    copies = jax.tree.map(jnp.copy, args)  # the state is given away
    state, found = compiled(*jax.device_put(copies, compiled.input_shardings[0]))
    assert found == pytest.approx(float(loss), rel=1e-2)
    # of the optimizer's numbers, sums of gradients: adam divides small numbers by small ones
    for want, got in zip(*map(jax.tree.leaves, (expected["opt"], state["opt"])), strict=True):
        np.testing.assert_allclose(got, want, rtol=0.05, atol=1e-3)


def feed_forward(width: int = 1024, use: zoo.Use = zoo.as_it_is) -> zoo.Job:
    """The part of a transformer that XLA:TPU compiles in seconds."""
    params = zoo.shapes(w1=(width, 4 * width), w2=(4 * width, width))

    def loss_of(params: zoo.Tree, x: jax.Array) -> jax.Array:
        hidden = use(jax.nn.relu(use(x, "normed") @ use(params["w1"], "w1")), "hidden")
        return jnp.mean(jnp.square(use(x + hidden @ use(params["w2"], "w2"), "stream")))

    data, rule = zoo.shape(32, 128, width), optax.sgd(0.1, momentum=0.9)
    return zoo.train_job(loss_of, params, data, rule)


@pytest.mark.slow
@pytest.mark.libtpu
def test_a_plan_is_as_fast_as_the_best_of_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        Version("dp", (4, 1), DATA),
        Version("fsdp", (4, 1), FSDP),
        Version("tp", (1, 4), TENSOR),
    ]
    program = dataclasses.replace(EXPERTS["gpt2_small"], make=feed_forward)
    monkeypatch.setitem(experts.EXPERTS, "feed_forward", program)
    where = cluster("tpu-v5e:2x2")
    rows = [experts.judge("feed_forward", v, where, None) for v in (None, *wanted)]
    assert expert_report.ratio(rows) <= 1, "\n".join(map(str, rows))


def test_the_page_of_the_experts_is_what_was_judged() -> None:
    """docs/expert_plans.md is generated, never written by hand."""
    assert expert_report.REPORT.read_text() == expert_report.report(expert_report.read_rows())


def test_a_version_that_does_not_fit_is_no_rival() -> None:
    ours = {"version": expert_report.OURS, "step": 2.0}
    dp, tp = {"version": "dp", "step": None}, {"version": "tp", "step": 4.0}
    assert expert_report.ratio([ours, dp, tp]) == 0.5
    assert expert_report.ratio([ours, dp]) == 0
