"""The halo of a sliding window, against a count of the elements that each result reads."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from passes.rules.factors import Factors
from passes.rules.windows import Window, split_window


def reads(w: Window, read: int, p: int) -> set[int]:
    """Operand elements that result p reads (possibly outside the operand), counted one by one."""
    places = (p * w.stride - w.low + q * w.dilation for q in range(w.size))
    return {at // w.base for at in places if at % w.base == 0}


WINDOWS = st.builds(
    Window,
    size=st.integers(1, 5),
    stride=st.integers(1, 3),
    low=st.integers(-2, 4),
    base=st.integers(1, 3),
    dilation=st.integers(1, 3),
)


@settings(deadline=None, max_examples=300)
@given(WINDOWS, st.integers(1, 4), st.integers(2, 4))
def test_the_halo_holds_all_that_a_piece_reads(w: Window, units: int, pieces: int) -> None:
    made = w.base * units * pieces
    read = made * w.stride // w.base
    assume(made * w.stride == read * w.base)
    f = Factors()
    dims = split_window(f, read, made, w)
    rule = f.rule([[dims[0]]], [[dims[1]]])
    kinds = {factor.kind for factor in rule.factors}
    j = pieces // 2
    mine = range(j * made // pieces, (j + 1) * made // pieces)
    own = range(j * read // pieces, (j + 1) * read // pieces)
    wanted = set().union(*(reads(w, read, p) for p in mine))
    before = max([0, *(own.start - at for at in wanted)])
    after = max([0, *(at - own.stop + 1 for at in wanted)])
    assert w.halo >= before + after
    if w.base == 1 or (w.stride == w.dilation == 1 and w.size >= w.base):  # reaches both ends
        assert w.halo == before + after
    assert ("parallel" in kinds) <= (w.halo == 0)
    assert ("halo" in kinds) <= (0 < w.halo <= read // 2)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(1, 4))
def test_the_halo_back_holds_every_window_that_touches_a_piece(
    size: int, stride: int, low: int, units: int
) -> None:
    w = Window(size, stride, low)
    made, read = 3 * units, 3 * units * stride
    own = range(read // 3, 2 * read // 3)
    touching = [reads(w, read, p) for p in range(-20, made + 20)]
    wanted = set().union(*(t for t in touching if t & set(own)))
    before = max([0, *(own.start - at for at in wanted)])
    after = max([0, *(at - own.stop + 1 for at in wanted)])
    if wanted:
        assert w.back_halo == before + after
