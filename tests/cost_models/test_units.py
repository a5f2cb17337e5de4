from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.units import GB, GiB, MiB, format_bytes, format_flops, format_seconds, parse_bytes

SCALE = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (3.1e-6, "3.1 us"), (999.6e-6, "1 ms"), (0.0123, "12.3 ms"), (90000, "90000 s"),
        (-2e-3, "-2 ms"), (math.inf, "inf s"), (math.nan, "nan s"),
    ],
)  # fmt: skip
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_bytes_and_flops() -> None:
    assert [format_bytes(b) for b in (0, 1023, 1.2 * GiB, 15.75 * GiB)] == [
        "0 B", "0.999 KiB", "1.2 GiB", "15.8 GiB",
    ]  # fmt: skip
    assert [format_flops(f) for f in (0, 12, 34.36e9, 1e18)] == [
        "0 FLOP", "12 FLOP", "34.4 GFLOP", "1000 PFLOP",
    ]  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(st.floats(1e-9, 1e6))
def test_a_printed_time_reads_back_to_three_digits(seconds: float) -> None:
    number, unit = format_seconds(seconds).split()
    assert float(number) * SCALE[unit] == pytest.approx(seconds, rel=5.1e-3)
    assert len(number.replace(".", "").lstrip("0")) <= 3 or seconds >= 1000


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("16GB", 16 * GB), ("15.75GiB", 63 * GiB // 4), ("512 MiB", 512 * MiB), ("1e9", GB),
        (" 2gib ", 2 * GiB), ("7", 7), (12.0, 12), (0, 0), ("1.5e3kb", 1_500_000),
    ],
)  # fmt: skip
def test_reads_bytes(text: str | float, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GB", "16G", "-1GB", -1, "1.2.3GB", "1_000", "16 GB of", math.nan, math.inf, True]
)
def test_refuses_what_is_no_size(text: str | float) -> None:
    with pytest.raises(ValueError, match="as a number of bytes; write 16GB"):
        parse_bytes(text)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=8))
def test_any_text_is_a_size_or_a_clear_error(text: str) -> None:
    # Whatever is not a size raises ValueError and nothing else.
    with contextlib.suppress(ValueError):
        assert parse_bytes(text) >= 0
