"""Every sample of every rule, in steps: parts put together again are the whole.

Each dim of each argument is split over two steps in each way that there is; what runs in the loop
and what does not, and what is added up, must give what the function gives (the oracle: jax).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoshard.jax_compat import bind
from autoshard.rule_samples import Sample, arguments, equation
from autoshard.rule_samples_all import all_samples
from autoshard.signature import signature
from autoshard.time_loop import in_steps
from autoshard.trace import Traced, trace
from passes.rules.registry import hand_rule
from passes.time_ahead import time_loop
from passes.time_axis import Split
from passes.time_loop import TimeLoop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_a_hurry")]


def load_cases() -> Any:
    spec = importlib.util.spec_from_file_location("programs", Path(__file__).parent / "programs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["programs"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.CASES


CASES = load_cases()


def loops(traced: Traced) -> Iterator[TimeLoop]:
    """A loop of two steps for each dim of each input, halves or every other element of it."""
    graph = traced.graph
    for v in graph.inputs:
        for d, n in enumerate(graph.values[v].shape):
            for low in sorted({1, n // 2} if d == 0 else {n // 2}) if n and n % 2 == 0 else ():
                yield time_loop(graph, {v: Split(d, low)}, 2, traced.deciders)


def rounding(traced: Traced) -> float:
    """As far as sums of the shortest floats in it may differ, relative to the largest number."""
    short = {v.type.dtype for v in traced.graph.values}
    if any(name.startswith("float8") for name in short):
        return 0.3
    return 3e-2 if short & {"bfloat16", "float16"} else 2e-3


def same(got: jax.Array, want: jax.Array, near: float) -> bool:
    if jax.dtypes.issubdtype(want.dtype, jax.dtypes.prng_key):
        got, want = jax.random.key_data(got), jax.random.key_data(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    wide = [
        np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x)
        for x in (got, want)
    ]
    if wide[1].dtype != np.float64:
        return bool(np.allclose(*wide, rtol=2e-3, atol=2e-4, equal_nan=True))
    finite = np.abs(wide[1][np.isfinite(wide[1])])
    return bool(
        np.allclose(
            *wide, rtol=near, atol=near * (0.1 + finite.max(initial=0)) / 10, equal_nan=True
        )
    )


def different() -> list[Sample]:
    """Samples without those that are split as another one is, and have the same parameters."""
    found: dict[tuple[str, str], Sample] = {}
    for sample in all_samples():
        eqn = equation(sample)
        rule = hand_rule(signature(eqn))
        name = "" if rule is not None and rule.fuses and not eqn.params else sample.primitive
        found.setdefault((str(rule), name), sample)
    return list(found.values())


@pytest.mark.parametrize("sample", different(), ids=str)
def test_steps_make_up_the_whole(sample: Sample) -> None:
    eqn, numbers = equation(sample), arguments(sample)

    def alone(*operands: Any) -> list[Any]:
        return bind(eqn, operands)

    check(trace(alone, *numbers), numbers, jax.jit(alone)(*numbers))


def check(traced: Traced, numbers: Sequence[Any], want: Sequence[Any]) -> None:
    """All loops, compiled at once."""
    found = [loop for loop in loops(traced) if "loop" in loop.phases.values()]
    runs = [in_steps(traced, loop) for loop in found]
    got = jax.jit(lambda *numbers: [run(*numbers) for run in runs])(*numbers)
    for loop, results in zip(found, got, strict=True):
        pairs = zip(results, want, strict=True)
        right = all(same(x, y, rounding(traced)) for x, y in pairs)
        assert right, f"{loop.seeds}: {loop.views}"


@pytest.mark.parametrize("name", CASES)
def test_programs_in_steps(name: str) -> None:
    case = CASES[name]
    want = jax.tree.leaves(jax.jit(case.fn)(*case.args))
    flat = [jnp.asarray(x) for x in jax.tree.leaves(case.args)]
    check(trace(case.fn, *case.args), flat, want)
