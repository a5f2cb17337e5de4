"""Plans that compute layers again: as few as fit, what is said and kept of it, and with what else.

That the numbers stay is for test_remat.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import autoshard
from autoshard import cli
from autoshard.remat import rematable
from passes.ir.plan import PlanError
from passes.remat import fewest

typer_testing = pytest.importorskip("typer.testing")

GPU = "h100:1"


def mlp(
    scanned: bool = False, layers: int = 6, rows: int = 4096, middle: Any = jnp.sin
) -> tuple[Callable[..., Any], Any]:
    """A training step whose layers make much more than they are given."""

    def train_step(params: Any, x: Any) -> Any:
        def layer(x: Any, p: Any) -> Any:
            return x + jax.nn.gelu(middle(x @ p[0]) @ p[1]) @ p[2], None

        def loss(params: Any) -> Any:
            y = x
            if scanned:
                y, _ = lax.scan(layer, y, params)
            else:
                for k in range(layers):
                    y, _ = layer(y, [p[k] for p in params])
            return jnp.mean(y**2)

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    shapes = [(layers, 32, 256), (layers, 256, 256), (layers, 256, 32)]
    params = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return train_step, (params, jax.ShapeDtypeStruct((rows, 32), jnp.float32))


def filled(args: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.1, x.dtype), args)


def near(got: Any, want: Any) -> bool:
    same = jax.tree.map(lambda x, y: bool(jnp.allclose(x, y, 1e-4, 1e-6)), got, want)
    return all(jax.tree.leaves(same))


def note(plan: Any) -> str:
    return str(next(n for n in plan.data.notes if n.startswith("remat")))


# Memory


def test_less_memory_as_compiled_and_as_predicted() -> None:
    """A scan, as on CPUs XLA drops the barriers between layers that stand by themselves."""
    fn, args = mlp(scanned=True)
    here = rematable(fn, args, {}, {})
    compiled = [
        jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
        for f in (fn, here.with_again([0]))
    ]
    predicted = [
        autoshard.plan(fn, *args, cluster=GPU, remat=remat).cost.peak_memory
        for remat in ("none", "full")
    ]
    for before, after in (compiled, predicted):
        assert before > 3 * after


@pytest.mark.slow
@pytest.mark.libtpu
def test_less_memory_as_the_compiler_for_tpus_has_it() -> None:
    """With tanh, as it compiles a sine five times as long."""
    fn, args = mlp(layers=4, rows=1 << 18, middle=jnp.tanh)
    none, full = (
        autoshard.plan(fn, *args, cluster="tpu-v5e:1x1", remat=r) for r in ("none", "full")
    )
    peak = full.verify().compiled.memory.peak
    assert 0.8 < full.cost.peak_memory / peak < 1.25
    assert none.cost.peak_memory > 1.2 * peak


# As much as fits


def test_auto_computes_nothing_again_where_all_fits() -> None:
    fn, args = mlp()
    plan = autoshard.plan(fn, *args, cluster=GPU, remat="auto")
    assert plan.data.remat == ()
    assert note(plan) == "remat: it fits with none of 6 parts computed again"
    assert plan.cost == autoshard.plan(fn, *args, cluster=GPU).cost


def test_auto_computes_as_few_again_as_fit() -> None:
    fn, args = mlp()
    none, full = (
        autoshard.plan(fn, *args, cluster=GPU, remat=r).cost.peak_memory for r in ("none", "full")
    )
    counts = []
    for share in (0.9, 0.5, 0.2):
        limit = full + share * (none - full)
        plan = autoshard.plan(fn, *args, cluster=GPU, remat="auto", memory_limit=limit)
        assert plan.cost.peak_memory <= limit
        chosen = plan.data.remat
        counts.append(len(chosen))
        assert f"{len(chosen)} of 6 parts computed again" in note(plan)
        # Brute force: one less does not fit.
        less = rematable(fn, args, {}, {}).with_again(chosen[:-1])
        with pytest.raises(autoshard.NoFeasiblePlan):
            autoshard.plan(less, *args, cluster=GPU, memory_limit=limit)
    assert counts == sorted(set(counts))


def test_what_does_not_fit_however_much_is_computed_again() -> None:
    fn, args = mlp()
    with pytest.raises(autoshard.NoFeasiblePlan, match="although all 6 parts of it"):
        autoshard.plan(fn, *args, cluster=GPU, remat="auto", memory_limit=1 << 20)
    with pytest.raises(autoshard.NoFeasiblePlan, match="remat='auto'"):
        autoshard.plan(fn, *args, cluster=GPU, memory_limit=1 << 20)


@pytest.mark.parametrize("most", range(1, 9))
def test_the_fewest_are_found(most: int) -> None:
    for least in range(1, most + 1):
        assert fewest(lambda n, least=least: n if n >= least else None, most, most) == least


def test_a_baseline_that_does_not_fit_is_no_fit() -> None:
    fn, args = mlp()
    none = autoshard.plan(fn, *args, cluster="h100:2", solver="dp").cost.peak_memory
    plan = autoshard.plan(
        fn, *args, cluster="h100:2", solver="dp", remat="auto", memory_limit=0.7 * none
    )
    assert plan.data.remat
    assert plan.cost.peak_memory <= 0.7 * none


def test_nothing_to_compute_again_is_said() -> None:
    fn, args = (lambda x: x @ x), (jnp.ones((8, 8)),)
    for remat in ("full", "auto"):
        plan = autoshard.plan(fn, *args, cluster=GPU, remat=remat)
        assert "has nothing to compute again" in note(plan)


@pytest.mark.parametrize("remat", ["all", True, 3, ""])
def test_no_such_remat(remat: Any) -> None:
    fn, args = mlp()
    with pytest.raises(ValueError, match="remat is 'none', 'full' or 'auto', not"):
        autoshard.plan(fn, *args, cluster=GPU, remat=remat)


# What is kept of it


def test_the_plan_is_read_back_and_runs() -> None:
    fn, args = mlp(layers=3)
    plan = autoshard.plan(fn, *args, cluster="cpu:8", remat="full")
    assert json.loads(plan.to_json())["remat"] == [0, 1, 2]
    again = autoshard.Plan.from_json(plan.to_json(), fn, *args)
    assert again.to_json() == plan.to_json()
    values = filled(args)
    assert near(again.compile()(*values), jax.jit(fn)(*values))
    other, shapes = mlp(scanned=True)
    for function, given in ((other, shapes), mlp(layers=4), ((lambda x: x), (args[1],))):
        with pytest.raises(PlanError, match="another function"):
            autoshard.Plan.from_json(plan.to_json(), function, *given)


def test_with_the_decorator_and_its_options() -> None:
    fn, args = mlp(layers=3)

    def with_mode(params: Any, x: Any, mode: str) -> Any:
        return fn(params, x) if mode == "train" else x

    step = autoshard.parallelize(
        with_mode,
        cluster="cpu:8",
        remat="full",
        static_argnames="mode",
        hints={"x": jax.sharding.PartitionSpec("data")},
        mesh={"data": 8},
    )
    values = filled(args)
    assert near(step(*values, mode="train"), jax.jit(fn)(*values))
    plan = step.plan(*values, mode="train")
    assert plan.data.remat == (0, 1, 2)
    assert plan.in_shardings[1] == jax.sharding.PartitionSpec("data")


def test_the_command(tmp_path: Any) -> None:
    file = tmp_path / "train.py"
    file.write_text(
        "import jax, jax.numpy as jnp\n"
        "def loss(ps, x):\n"
        "    for p in ps: x = jnp.tanh(jnp.sin(x @ p))\n"
        "    return x.sum()\n"
        "def job():\n"
        "    return jax.grad(loss), ([jnp.ones((8, 8))] * 4, jnp.ones((64, 8)))\n"
    )
    run = typer_testing.CliRunner().invoke
    told = run(cli.app, ["plan", f"{file}:job", "--cluster", "cpu:8", "--remat", "full"])
    assert told.exit_code == 0
    assert "computed again in the backward half" in " ".join(told.output.split())
    refused = run(cli.app, ["plan", f"{file}:job", "--cluster", "cpu:8", "--remat", "half"])
    assert refused.exit_code == 2


# With what else


@pytest.mark.parametrize("scanned", [True, False])
def test_in_microbatches_and_in_blocks(scanned: bool) -> None:
    fn, args = mlp(scanned, layers=3)
    values = filled(args)
    plan = autoshard.plan(fn, *args, cluster="cpu:8", remat="full", microbatches=2, blockwise=2)
    assert near(plan.compile()(*values), jax.jit(fn)(*values))
    assert plan.data.remat
    assert plan.data.blocks == 2
    again = autoshard.Plan.from_json(plan.to_json(), fn, *args)
    assert again.to_json() == plan.to_json()


@pytest.mark.parametrize("scanned", [True, False])
def test_in_the_stages_of_a_pipeline(scanned: bool) -> None:
    fn, args = mlp(scanned, layers=4)
    options: dict[str, Any] = {"cluster": "cpu:2", "stages": 2, "microbatches": 4}
    options["schedule"] = "1F1B"
    plain = autoshard.plan(fn, *args, **options)
    plan = autoshard.plan(fn, *args, **options, remat="full")
    first, again = (p.data.pieces[0].activation for p in (plain, plan))
    assert again < 0.3 * first
    limit = (plan.cost.peak_memory + plain.cost.peak_memory) / 2
    auto = autoshard.plan(fn, *args, **options, remat="auto", memory_limit=limit)
    assert auto.data.remat
    read = autoshard.Plan.from_json(plan.to_json(), fn, *args)
    assert read.to_json() == plan.to_json()
    values = filled(args)
    assert near(read.compile()(*values), jax.jit(fn)(*values))
