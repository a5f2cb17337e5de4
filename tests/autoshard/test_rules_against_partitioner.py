"""XLA's partitioner splits what our rules say may be split, and pays what they say it costs.

Each splittable factor is put on a mesh axis by itself: operands and results are sharded along it,
the operation is compiled for as many virtual CPU devices, and the collectives are read from the
compiled program. A parallel factor needs none, a reduction an all-reduce, a halo permutes between
neighbours. What the CPU's compiler can not do is listed with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import passes.rules  # noqa: F401
from autoshard.jax_compat import jax_version
from autoshard.rule_samples import Sample, equation, f32
from autoshard.rule_samples_places import place_samples
from autoshard.signature import signature
from passes.ir.rule import Dim, Factor, Rule
from passes.rules.registry import hand_rule

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def gradients() -> Iterator[Sample]:
    """Gradients of a convolution's weights: pictures and windows are split together."""
    cases = {
        "plain": ((1, 1), f32(2, 4, 8, 8), f32(6, 4, 3, 3)),
        "strided": ((2, 2), f32(2, 4, 16, 16), f32(6, 4, 3, 3)),
        "patches": ((2, 2), f32(2, 4, 64, 64), f32(6, 4, 2, 2)),
    }
    for name, (strides, x, w) in cases.items():

        def conv(w: Any, x: Any, strides: Any = strides) -> Any:
            return lax.conv_general_dilated(x, w, strides, "SAME")

        def to_weights(g: Any, x: Any, conv: Any = conv, w: Any = w) -> Any:
            return jax.linear_transpose(lambda v: conv(v, x), w)(g)

        out = f32(*jax.eval_shape(conv, w, x).shape)
        yield Sample("conv_general_dilated", f"{name}, to the weights", to_weights, (out, x))


SAMPLES = (*place_samples(), *gradients())
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)

# (sample, factor kind) -> why the compiled program has other collectives.
GROUPS = "The CPU's compiler turns groups into one convolution before it partitions."
FFT = "This XLA splits a Fourier transform on TPU only; elsewhere it gathers the operand."
TOP_K = "On CPU it is a custom call that the partitioner does not know; on TPU it is split."
LAPACK = "On CPU it calls BLAS, which the partitioner splits by batch dims only."
ELSEWHERE = {
    ("conv_general_dilated: grouped", "parallel"): GROUPS,
    ("conv_general_dilated: grouped", "halo"): GROUPS,
    ("top_k", "parallel"): TOP_K,
    ("top_k: batched", "parallel"): TOP_K,
    ("triangular_solve: left", "parallel"): LAPACK,
    ("triangular_solve: right", "parallel"): LAPACK,
}
if jax_version() < (0, 11):
    ELSEWHERE |= {
        (f"fft: {kind}", "parallel"): FFT
        for kind in ("complex", "inverse", "real", "inverse real", "two dims")
    }
    ELSEWHERE["ragged_dot_general: summed by group", "parallel"] = (
        "The devices exchange the group sizes, a few bytes."
    )


def wanted(factor: Factor) -> set[str]:
    if factor.kind == "halo":
        return {"collective-permute"}
    return {"all-reduce"} if factor.kind == "reduction" else set()


def sharding(dims: tuple[Dim, ...], factor: int, mesh: Mesh) -> NamedSharding | None:
    """Split along one factor; None when it is not the major one of its dim."""
    if any(factor in dim[1:] for dim in dims):
        return None
    return NamedSharding(mesh, PartitionSpec(*("x" if factor in dim else None for dim in dims)))


def collectives(eqn: Any, rule: Rule, factor: int) -> set[str] | None:
    """What the compiled program sends; None when no sharding can say this split."""
    size = rule.factors[factor].size
    parts = next((n for n in range(2, 9) if size % n == 0), None)
    if parts is None:
        return None
    mesh = Mesh(np.array(jax.devices()[:parts]), ("x",), axis_types=(AxisType.Auto,))
    ins = [sharding(dims, factor, mesh) for dims in rule.operands]
    outs = [sharding(dims, factor, mesh) for dims in rule.results]
    if None in ins or None in outs:
        return None
    params = eqn.primitive.get_bind_params(eqn.params)

    def run(*args: Any) -> Any:
        out = eqn.primitive.bind(*args, **params)
        return tuple(out) if eqn.primitive.multiple_results else (out,)

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    split = jax.jit(run, in_shardings=ins, out_shardings=tuple(outs), keep_unused=True)
    return set(COLLECTIVE.findall(split.lower(*avals).compile().as_text()))


def surprises(sample: Sample) -> Iterator[tuple[str, str]]:
    """(factor kind, what is wrong) for each factor that is not split as its kind says."""
    eqn = equation(sample)
    rule = hand_rule(signature(eqn))
    assert rule is not None
    for n, factor in enumerate(rule.factors):
        if not rule.splittable(n):
            continue
        sent = collectives(eqn, rule, n)
        want = wanted(factor)
        allowed = want | ({"collective-permute"} if factor.halo else set())
        missing = factor.kind == "reduction" and not want & (sent or want)
        if sent is not None and (sent - allowed or missing):
            yield (
                factor.kind,
                f"{factor.name} of {rule} sends {', '.join(sorted(sent)) or 'nothing'}",
            )


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_splits_cost_what_the_rule_says(sample: Sample) -> None:
    found = list(surprises(sample))
    unlisted = [text for kind, text in found if (str(sample), kind) not in ELSEWHERE]
    assert not unlisted, "\n".join(unlisted)
    listed = {kind for name, kind in ELSEWHERE if name == str(sample)}
    assert listed == {kind for kind, _ in found}, "the CPU's compiler can do it now"


def test_every_exception_is_a_sample() -> None:
    assert {name for name, _ in ELSEWHERE} <= {str(s) for s in SAMPLES}


def test_a_dim_that_must_be_gathered_is_noticed() -> None:
    sample = next(s for s in SAMPLES if str(s) == "dynamic_slice: one dim")
    wrong = Rule.parse("i j, [], [] -> i j", {"i": 2, "j": 6})
    assert collectives(equation(sample), wrong, 0) == {"all-gather"}
