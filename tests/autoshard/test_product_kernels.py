"""What else a product's kernel does, and what XLA:TPU counts for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard

BF16, F32 = jnp.bfloat16, jnp.float32


def array(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def product(x: Any, w: Any) -> Any:
    return x @ w


def product_and_sums(x: Any, w: Any) -> Any:
    y = x @ w
    return y, jnp.sin(y.astype(F32).sum(0))


def of_computed(x: Any, w: Any, s: Any) -> Any:
    return (x + s) @ w.astype(BF16)


def of_one_computed(x: Any, w: Any, s: Any) -> Any:
    return (x + s) @ w


WIDE = array(8192, 256), array(256, 8192)
DEEP = array(4096, 2048), array(2048, 8192, dtype=F32), array(2048)


def predicted(fn: Callable[..., Any], cluster: str, *args: Any) -> float:
    return autoshard.plan(fn, *args, cluster=cluster).cost.compute_time


def compiled(fn: Callable[..., Any], cluster: str, *args: Any) -> float:
    found = autoshard.plan(fn, *args, cluster=cluster).verify().compiled
    assert found is not None
    assert found.compute is not None
    return found.compute


def memory_bound(cluster: str) -> float:
    """Seconds that writing the product of WIDE takes at least."""
    return 8192 * 8192 * 2 / autoshard.cluster(cluster).chip.hbm_bandwidth


def test_on_v6e_sums_take_the_price_of_the_elements_away_but_not_the_bandwidth() -> None:
    plain, summed = (predicted(f, "v6e:1x1", *WIDE) for f in (product, product_and_sums))
    assert memory_bound("v6e:1x1") < summed < 0.5 * plain
    plain, summed = (predicted(f, "v5p:1x1x1", *WIDE) for f in (product, product_and_sums))
    assert summed > 0.95 * plain


@pytest.mark.libtpu
def test_the_tpu_compiler_counts_less_than_the_memory_can_do() -> None:
    """Why the prediction is no nearer to it."""
    plain, summed = (compiled(f, "v6e:1x1", *WIDE) for f in (product, product_and_sums))
    assert summed < memory_bound("v6e:1x1") < plain
    assert predicted(product, "v6e:1x1", *WIDE) == pytest.approx(plain, rel=0.25)


def test_a_product_of_two_computed_operands_takes_longer() -> None:
    narrow = DEEP[0], array(2048, 8192), DEEP[2]
    one, both = (
        predicted(of_one_computed, "v5p:1x1x1", *narrow),
        predicted(of_computed, "v5p:1x1x1", *DEEP),
    )
    assert one == pytest.approx(predicted(product, "v5p:1x1x1", *narrow[:2]), rel=0.05)
    assert both > 1.4 * one


@pytest.mark.libtpu
def test_the_tpu_compiler_takes_longer_for_two_computed_operands() -> None:
    found = compiled(of_computed, "v5p:1x1x1", *DEEP)
    assert found > 1.4 * compiled(product, "v5p:1x1x1", DEEP[0], array(2048, 8192))
    assert predicted(of_computed, "v5p:1x1x1", *DEEP) == pytest.approx(found, rel=0.2)
