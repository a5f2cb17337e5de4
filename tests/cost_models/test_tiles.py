"""Products in tiles: oracles are a measured product, a count of waves, and the roofline."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.cluster import Chip, cluster
from cost_models.product import product_seconds
from cost_models.roofline import compute_seconds
from cost_models.tiles import tile_seconds

A100 = cluster("a100:1x8").chip
SIZES = st.integers(1, 4096)


def seconds(chip: Chip, m: int, n: int, k: int, batch: int = 1, dtype: str = "bfloat16") -> float:
    moved = 2.0 * batch * (m * k + k * n + m * n)
    return tile_seconds(chip, batch, m, n, k, dtype, moved, 2.0 * batch * m * n)


@pytest.mark.parametrize(
    ("chip", "m", "n", "k", "dtype", "tflops"),
    [
        # github.com/stas00/ml-engineering, compute/accelerator: the best shape for A100 SXM
        ("a100", 1024, 10240, 5120, "bfloat16", 271.2),
        # github.com/zzc0721/torch-performance-test-data/issues/140
        ("v100", 8192, 8192, 8192, "float16", 97.36),
        ("v100", 4096, 4096, 4096, "float16", 95.73),
        ("v100", 2048, 2048, 2048, "float16", 78.23),
    ],
)
def test_measured_products(chip: str, m: int, n: int, k: int, dtype: str, tflops: float) -> None:
    found = 2 * m * n * k / seconds(cluster(f"{chip}:8").chip, m, n, k, dtype=dtype) / 1e12
    assert found == pytest.approx(tflops, rel=0.1)


@given(SIZES, SIZES, SIZES, st.integers(1, 64))
def test_never_quicker_than_the_roofline(m: int, n: int, k: int, batch: int) -> None:
    flops, moved = 2.0 * batch * m * n * k, 2.0 * batch * (m * k + k * n + m * n)
    bound = compute_seconds(A100, flops, moved, "bfloat16", True)
    assert seconds(A100, m, n, k, batch) >= bound * (1 - 1e-9)


@given(SIZES, SIZES, SIZES)
def test_the_sides_of_a_product_are_alike(m: int, n: int, k: int) -> None:
    assert seconds(A100, m, n, k) == pytest.approx(seconds(A100, n, m, k))


def test_one_tile_more_than_a_wave_holds_costs_a_wave() -> None:
    """108 tiles of 256 x 128 fill the cores once; a long k is split over idle ones otherwise."""
    k = 256  # too short to be split
    full = seconds(A100, 256 * 12, 128 * 9, k)
    more = seconds(A100, 256 * 12, 128 * 10, k)
    half = seconds(A100, 256 * 12, 128 * 18, k)
    assert full < more
    assert more - full > 0.3 * (half - full), "the tenth column of tiles is no tenth of the time"


def test_few_tiles_split_what_is_contracted() -> None:
    """The gradient of a weight: 36 tiles would keep a third of the cores busy."""
    assert 2 * 768 * 768 * 65536 / seconds(A100, 768, 768, 65536) > 0.7 * 271.2e12
    assert 2 * 768 * 768 * 256 / seconds(A100, 768, 768, 256) < 0.5 * 271.2e12, "nothing to split"


def test_chips_that_say_no_cores_are_priced_by_the_roofline() -> None:
    plain = dataclasses.replace(A100, cores=0)
    moved = 2.0 * 3 * 1024**2
    assert product_seconds(plain, 1, 1024, 1024, 1024, "bfloat16", moved) == compute_seconds(
        plain, 2.0 * 1024**3, moved, "bfloat16", True
    )
    assert product_seconds(A100, 1, 1024, 1024, 1024, "bfloat16", moved) > 0


def test_what_is_never_written_is_not_paid_for() -> None:
    """A product inside a fused kernel moves its operands at most."""
    inside = product_seconds(A100, 32, 2048, 2048, 128, "bfloat16", 2.0 * 32 * 2 * 2048 * 128)
    stored = product_seconds(
        A100, 32, 2048, 2048, 128, "bfloat16", 2.0 * 32 * (2 * 2048 * 128 + 2048 * 2048)
    )
    assert inside < 0.8 * stored
