"""What is predicted is compiled and counted, and what was not foreseen is said."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import zoo

import autoshard
from autoshard import targets
from autoshard.ask_compiler import CompilerRefused, ask_compiler, out_of_memory
from autoshard.compiled import Profile
from autoshard.targets import NoCompiler, gpu_target, target_devices
from autoshard.verification import match
from cost_models.cluster import cluster


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def two_layers(w1: jax.Array, w2: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w1) @ w2


def step(params: dict[str, jax.Array], x: jax.Array) -> Any:
    def loss(p: dict[str, jax.Array]) -> jax.Array:
        return jnp.mean(two_layers(p["w1"], p["w2"], x) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value


ARGS = ({"w1": f32(512, 2048), "w2": f32(2048, 512)}, f32(256, 512))


class Picky:
    """A lowered program that XLA:GPU finds no tiles for, unless it is told to ask cuBLAS."""

    def __init__(self, message: str) -> None:
        self.message = message

    def compile(self, compiler_options: dict[str, str]) -> Any:
        if compiler_options.get("xla_gpu_enable_triton_gemm") != "False":
            raise jax.errors.JaxRuntimeError(self.message)
        return jax.jit(two_layers).lower(f32(8, 8), f32(8, 8), f32(8, 8)).compile()


def test_a_product_without_tiles_is_left_to_cublas_and_that_is_said() -> None:
    picky: Any = Picky("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.399")
    found = ask_compiler(picky, cluster("h100:8"), (8,), {}, "step")
    assert found.compiled is not None
    assert found.added == {"xla_gpu_enable_triton_gemm": "False"}
    plan = autoshard.plan(step, *ARGS, cluster="cpu:8")
    told = dataclasses.replace(plan.verify(), added=found.added)
    assert "xla_gpu_enable_triton_gemm=False" in str(told)
    with pytest.raises(CompilerRefused, match="does not take step"):
        ask_compiler(picky, cluster("h100:8"), (8,), {"xla_gpu_enable_triton_gemm": "True"}, "step")
    other: Any = Picky("INTERNAL: something else")
    with pytest.raises(CompilerRefused, match="something else"):
        ask_compiler(other, cluster("h100:8"), (8,), {}, "step")


@pytest.mark.parametrize("solver", ["ilp", "dp", "fsdp", "tp"])
@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "model": 4}])
def test_bytes_are_sent_as_foreseen(solver: str, mesh: dict[str, int]) -> None:
    plan = autoshard.plan(step, *ARGS, cluster="cpu:8", mesh=mesh, solver=solver)
    found = plan.verify()
    assert found.compiled is not None
    assert found.compiled.memory is not None
    assert found.fits
    # XLA:CPU sums where it could scatter, which sends twice as much; never less than foreseen.
    assert 0.9 <= found.compiled.sent / max(plan.cost.comm_bytes, 1) <= 2.1
    text = str(found)
    assert "peak memory" in text
    assert "test_verification.py:" in text or not found.seen


def test_a_convolution_split_along_two_dims_is_not_gathered() -> None:
    fn, args = zoo.conv_net(blocks=2, channels=64, side=14, batch=32)
    mesh = {"data": 4, "model": 2}
    plan = autoshard.plan(fn, *args, cluster="cpu:8", mesh=mesh, solver="tp", donate_argnums=0)
    along = [dict(op.strategy) for op in plan.ops if op.name == "conv_general_dilated"]
    assert any(len(set(split.values())) == 2 for split in along)
    of_convolutions = [s for s in plan.verify().seen if "conv_general" in s.found.op_name]
    assert sum(s.surprise for s in of_convolutions) == 0


def test_a_collective_that_no_line_of_the_plan_sends_is_a_surprise() -> None:
    plan = autoshard.plan(step, *ARGS, cluster="cpu:8", mesh={"data": 8}, solver="dp")
    found = plan.verify()
    assert found.compiled is not None
    blind = dataclasses.replace(
        plan.data, ops=tuple(dataclasses.replace(op, collectives=()) for op in plan.data.ops)
    )
    seen, unseen = match(blind, found.compiled.collectives)
    assert all(s.surprise == pytest.approx(s.found.sent) for s in seen)
    assert unseen == ()
    text = str(dataclasses.replace(found, seen=seen))
    told = [line for line in text.splitlines() if "that the plan did not foresee" in line]
    assert told
    assert len(told) == len(set(told)), "like ones of a line are told together"
    # and the other way round: nothing is compiled of what was foreseen
    seen, unseen = match(plan.data, ())
    assert seen == ()
    assert sum(sent for _, sent in unseen) == pytest.approx(plan.cost.comm_bytes)


def test_several_plans_are_compiled_and_ranked() -> None:
    plan = autoshard.plan(step, *ARGS, cluster="cpu:8")
    found = plan.verify(top=3)
    assert len(found.others) == 2
    assert len({(o.mesh, o.predicted) for o in (found, *found.others)}) == 3
    assert "by the compiled programs" in str(found)
    with pytest.raises(autoshard.PlanError, match="plan again"):
        autoshard.Plan.from_json(plan.to_json(), step, *ARGS).verify(top=2)


@pytest.mark.parametrize(
    ("spec", "found", "said"),
    [
        ("tpu-v5e:2x2", {}, r"pip install .autoshard\[verify-tpu\]"),
        ("h100:8", {}, "no compiler for GPU here: pip install --no-deps jax-cuda12-plugin=="),
        (
            "h100:8",
            {"jax-cuda12-plugin": "0.1", "jax-cuda12-pjrt": "0.1"},
            "of version 0.1 and jax",
        ),
    ],
)
def test_a_compiler_that_is_not_here_is_named_with_its_wheels(
    spec: str, found: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    targets._topology.cache_clear()
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(targets.importlib.metadata, "version", version)
    with pytest.raises(NoCompiler, match=said):
        target_devices(cluster(spec))


def test_a_chip_of_which_xla_is_told_nothing_is_refused() -> None:
    unknown = dataclasses.replace(cluster("h100:8"), compiler={})
    with pytest.raises(NoCompiler, match=r"no cuda_compute_capability in a \[compiler\] table"):
        target_devices(unknown)
    with pytest.raises(NoCompiler, match="cpu:1024 has 1024 devices"):
        target_devices(cluster("cpu:1024"))


def test_xla_is_told_of_a_gpu_in_its_own_words() -> None:
    text = gpu_target(cluster("h100:8").compiler)
    assert "core_count: 132\n" in text
    assert "cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED" in text
    assert "major: 8 minor: 0 feature_extension: NONE" in gpu_target(cluster("a100:8").compiler)
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Used 39.00G of 15.75G hbm.", 39.0),
        ("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (512.00M)"
         " exceeds available HBM", 0.5),
        ("RESOURCE_EXHAUSTED: for another reason", 0.0),
    ],
)  # fmt: skip
def test_what_a_program_wanted_is_read_from_the_compilers_message(message: str, gib: float) -> None:
    assert out_of_memory(message) == gib * 2**30
    assert out_of_memory("INVALID_ARGUMENT: no") is None


def test_a_plan_carries_the_options_of_its_compiler_and_others_do_not_get_them() -> None:
    plan = autoshard.plan(step, *ARGS, cluster="tpu-v5e:2x4")
    assert plan.compiler_options
    again = autoshard.Plan.from_json(plan.to_json(), step, *ARGS)
    assert again.compiler_options == plan.compiler_options
    assert next(iter(plan.compiler_options)) in str(plan)
    arrays = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), ARGS)
    _, loss = again.compile()(*arrays)  # XLA:CPU does not know them
    assert jnp.isfinite(loss)
    assert autoshard.plan(step, *ARGS, cluster="cpu:8").compiler_options == {}


@pytest.mark.libtpu
def test_the_tpu_compiler_confirms_a_plan_and_its_options() -> None:
    plan = autoshard.plan(step, *ARGS, cluster="tpu-v5e:2x4", mesh={"data": 8}, solver="fsdp")
    found = plan.verify(top=2)
    assert found.options == plan.compiler_options
    assert found.compiled is not None
    assert found.compiled.compute is not None
    assert 0.3 <= plan.cost.compute_time / found.compiled.compute <= 3
    assert [o.options for o in found.others][-1] == {}
    assert "no options" in str(found)


@pytest.mark.libtpu
def test_gathers_run_beside_compute_on_v6e_with_the_plans_options_and_not_without() -> None:
    def layers(weights: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
        def layer(y: jax.Array, ws: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            for w in ws:
                y = jnp.tanh(y @ w)
            return y, None

        return jax.lax.scan(layer, x, weights)[0]

    weight, x = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 2048, 2048), (16384, 2048)))
    target = {"cluster": "tpu-v6e:2x4", "mesh": {"data": 8}}
    plan = autoshard.plan(layers, (weight,) * 3, x, **target, solver="fsdp")
    found = plan.verify(top=2)

    def hidden(found: Profile | None) -> float:
        assert found is not None
        assert found.step is not None
        assert found.compute is not None
        return 1 - (found.step - found.compute) / found.comm

    assert hidden(found.compiled) > 0.2
    assert hidden(found.others[-1].compiled) == pytest.approx(0, abs=1e-6)
    assert plan.cost.step_time < plan.cost.compute_time + 0.7 * plan.cost.comm_time
