from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.cluster import Chip, cluster, names
from cost_models.cluster_file import CATALOGUE, read
from cost_models.roofline import compute_seconds, peak_flops

V5E = cluster("tpu-v5e:1x1").chip
H100 = cluster("h100:1").chip
CPU = cluster("cpu").chip

# What XLA:TPU itself estimates, in cycles (libtpu 0.0.42.1, jax 0.10.2), of a bfloat16 product of
# M x K and K x N on one chip, and the clock in GHz. One efficiency per chip is all the model has.
XLA_CYCLES = [
    ("v4:1x1x1", 1.05, (4096, 4096, 4096), 596_564),
    ("v4:1x1x1", 1.05, (8192, 8192, 8192), 4_523_672),
    ("v5e:1x1", 1.5, (4096, 4096, 4096), 1_083_068),
    ("v5e:1x1", 1.5, (2048, 8192, 8192), 2_166_624),
    ("v5e:1x1", 1.5, (16384, 4096, 16384), 20_812_428),
    ("v5p:1x1x1", 1.75, (4096, 4096, 4096), 544_925),
    ("v5p:1x1x1", 1.75, (16384, 4096, 16384), 9_920_648),
    ("v6e:1x1", 1.75, (4096, 4096, 4096), 301_616),
    ("v6e:1x1", 1.75, (8192, 8192, 8192), 2_977_840),
]


@pytest.mark.parametrize(("spec", "ghz", "shape", "cycles"), XLA_CYCLES)
def test_large_products_as_xla_estimates_them(
    spec: str, ghz: float, shape: tuple[int, int, int], cycles: int
) -> None:
    m, k, n = shape
    moved = 2 * (m * k + k * n + m * n)
    ours = compute_seconds(cluster(spec).chip, 2 * m * k * n, moved, "bfloat16", True)
    assert ours == pytest.approx(cycles / (ghz * 1e9), rel=0.2)


def test_book_balance_of_v5e() -> None:
    # scaling-book, roofline: below about 240 FLOP/byte a v5e product waits for its memory.
    ridge = 240 * V5E.matrix_efficiency / V5E.hbm_efficiency

    def waits_for_memory(intensity: float) -> bool:
        with_bytes = compute_seconds(V5E, intensity * 1e6, 1e6, "bfloat16", True)
        return with_bytes > compute_seconds(V5E, intensity * 1e6, 0, "bfloat16", True)

    assert waits_for_memory(ridge * 0.85)
    assert not waits_for_memory(ridge * 1.15)


@pytest.mark.parametrize(
    ("chip", "dtype", "like"),
    [
        (V5E, "uint8", "int8"),
        (V5E, "int4", "int8"),
        (V5E, "float16", "bfloat16"),
        (V5E, "float8_e4m3fn", "bfloat16"),
        (V5E, "float64", "float32"),
        (V5E, "int32", "float32"),
        (V5E, "complex64", "float32"),
        (V5E, "bool", "float32"),
        (V5E, "no_such_dtype", "float32"),
        (H100, "float8_e5m2", "float8"),
        (H100, "float8_e8m0fnu", "float8"),
        (H100, "float4_e2m1fn", "float8"),
        (H100, "complex128", "float64"),
        (CPU, "int8", "bfloat16"),
        (CPU, "float16", "bfloat16"),
    ],
)
def test_a_dtype_without_units_of_its_own_runs_as_the_closest(
    chip: Chip, dtype: str, like: str
) -> None:
    assert peak_flops(chip, dtype) == chip.peak_flops[like]
    ours, other = (compute_seconds(chip, 1e12, 0, d, True) for d in (dtype, like))
    assert ours == other


def test_float32_products_are_dearer_than_bfloat16_but_no_more_than_three_times() -> None:
    # TPU: one bfloat16 pass at default precision; GPU: TF32; never the vector unit's rate.
    for spec in ("v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "a100:1", "h100:1"):
        chip = cluster(spec).chip
        assert 1 < peak_flops(chip, "bfloat16") / peak_flops(chip, "float32") < 3
        assert peak_flops(chip, "float32") > chip.vector_flops


def test_a_chip_that_lists_little_still_answers() -> None:
    odd = Chip("odd", {"float16": 1e12}, 1e11, 1, 1, 1e9)
    assert peak_flops(odd, "int32") == peak_flops(odd, "bfloat16") == 1e12


amounts = st.floats(0, 1e18)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([V5E, H100, CPU]), amounts, amounts, amounts, amounts,
    st.sampled_from(["bfloat16", "float32", "int8", "float8_e4m3fn", "bool"]), st.booleans(),
)  # fmt: skip
def test_more_work_never_takes_less_time(
    chip: Chip, f1: float, f2: float, b1: float, b2: float, dtype: str, matrix: bool
) -> None:
    less = compute_seconds(chip, min(f1, f2), min(b1, b2), dtype, matrix)
    more = compute_seconds(chip, max(f1, f2), max(b1, b2), dtype, matrix)
    assert 0 <= less <= more
    parts = compute_seconds(chip, f1, 0, dtype, matrix) + compute_seconds(
        chip, 0, b1, dtype, matrix
    )
    assert compute_seconds(chip, f1, b1, dtype, matrix) <= parts


def test_the_matrix_unit_is_worth_using() -> None:
    for chip in (V5E, H100, CPU):
        matrix, vector = (compute_seconds(chip, 1e12, 0, "bfloat16", m) for m in (True, False))
        assert matrix < vector


def test_it_is_cheap_enough_to_be_called_for_every_strategy() -> None:
    start = time.process_time()
    for k in range(100_000):
        compute_seconds(V5E, k, 2.0 * k, "bfloat16", True)
    assert time.process_time() - start < 1.0


def test_the_catalogue_has_no_other_dtype_names() -> None:
    known = {"bfloat16", "float16", "float32", "float64", "int8", "int4", "float8", "float4"}
    for name in names():
        assert set(read(CATALOGUE / f"{name}.toml")["chip"]["peak"]) <= known
