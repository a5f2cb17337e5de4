"""What is small and read soon stays in VMEM; nothing else does."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from passes.handed_on import FAR, moved_part, waiting

KERNELS = st.integers(0, 500)
SHARES = st.floats(0.0, 2.0)


@given(SHARES, SHARES, KERNELS, KERNELS)
def test_larger_values_and_those_that_wait_longer_are_moved_more(
    a: float, b: float, soon: int, late: int
) -> None:
    (a, b), (soon, late) = sorted((a, b)), sorted((soon, late))
    assert 0.0 < moved_part(a, waiting(soon)) <= moved_part(b, waiting(late)) <= 1.0


@given(SHARES, KERNELS)
def test_what_lies_in_hbm_is_moved_whole(share: float, kernels: int) -> None:
    assert moved_part(share, FAR) == 1.0
    assert waiting(kernels) < FAR
