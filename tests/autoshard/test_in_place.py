"""What takes the place of what was read last, against XLA:TPU's own figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard
from autoshard.compiled import memory
from autoshard.targets import target_devices

ROWS, WORDS = 4096, 32768
LOGITS = 4 * ROWS * WORDS
ARGS = (
    jax.ShapeDtypeStruct((ROWS, 256), jnp.float32),
    jax.ShapeDtypeStruct((256, WORDS), jnp.float32),
    jax.ShapeDtypeStruct((ROWS,), jnp.int32),
)


def picked(x: Any, at: Any) -> Any:
    return jnp.take_along_axis(x, at[:, None], 1).sum()


def likelihood(x: Any, w: Any, at: Any) -> Any:
    """The maximum runs in the product's kernel, so that it makes two arrays."""
    return picked(jax.nn.log_softmax(x @ w), at)


def accuracy(x: Any, w: Any, at: Any) -> Any:
    """An argmax needs a kernel of its own, which makes the maximum, too."""
    logits = x @ w
    right = jnp.argmax(logits, -1) == at
    return picked(jax.nn.log_softmax(logits), at), right.sum()


def argmax_late(x: Any, w: Any, at: Any) -> Any:
    logits = x @ w
    likely = picked(jax.nn.log_softmax(logits), at)
    return likely, (jnp.argmax(logits, -1) == at).sum()


def squares_late(x: Any, w: Any, at: Any) -> Any:
    y = x @ w
    part = picked(y / y.sum(-1, keepdims=True), at)
    return part, (y * y).sum()


def argmax_and_sum(x: Any, w: Any, at: Any) -> Any:
    y = x @ w
    place = jnp.argmax(y, -1)
    return picked(y / y.sum(-1, keepdims=True), at), place


def sum_of_quotient(x: Any, w: Any, at: Any) -> Any:
    y = x @ w
    quotient = y / jnp.argmax(y, -1)[:, None]
    return picked(quotient, at), quotient.sum(-1)


CASES = [
    (likelihood, 2),
    (accuracy, 1),
    (argmax_late, 1),
    (squares_late, 2),
    (argmax_and_sum, 2),
    (sum_of_quotient, 1),
]


def planned(fn: Callable[..., Any], chip: str = "tpu-v5e:2x2") -> autoshard.Plan:
    hints = {"*": jax.P()}
    return autoshard.plan(fn, *ARGS, cluster=chip, mesh={"x": 4}, solver="propagate", hints=hints)


@pytest.mark.parametrize(("fn", "arrays"), CASES)
def test_logits_that_lie_there_at_once(fn: Callable[..., Any], arrays: int) -> None:
    assert planned(fn).cost.peak_memory == pytest.approx(arrays * LOGITS, rel=0.1)


@pytest.mark.libtpu
@pytest.mark.parametrize(("fn", "arrays"), CASES)
def test_as_the_compiler_has_it(fn: Callable[..., Any], arrays: int) -> None:
    plan = planned(fn)
    compiled = memory(plan.lower(target_devices(autoshard.cluster("tpu-v5e:2x2"))).compile())
    assert compiled is not None
    assert compiled.peak == pytest.approx(arrays * LOGITS, rel=0.1)
    assert compiled.peak == pytest.approx(plan.cost.peak_memory, rel=0.05)
