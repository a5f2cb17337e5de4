"""Values that lie in a result's memory never meet there, and fit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from passes.lent import Span, lent

SPANS = st.lists(
    st.builds(
        lambda begin, steps, nbytes: Span(begin, begin + steps, float(nbytes)),
        st.integers(0, 12), st.integers(1, 6), st.integers(1, 40),
    ),
    max_size=12,
)  # fmt: skip
IDLE = st.lists(
    st.builds(
        lambda end, nbytes: Span(0, end, float(nbytes)), st.integers(1, 18), st.integers(1, 40)
    ),
    max_size=3,
)


def fits(values: list[Span], pieces: list[Span]) -> bool:
    """Whether each value has a piece of its own while it lives, tried one after the other."""
    if not values:
        return True
    first, *rest = values
    for k, piece in enumerate(pieces):
        if piece.nbytes < first.nbytes or piece.end < first.end:
            continue
        apart = [v for v in rest if v.begin < first.end and first.begin < v.end]
        others = [*pieces[:k], *pieces[k + 1 :]]
        if fits(apart, others):
            return True
    return False


@given(IDLE, SPANS)
def test_what_is_lent_has_a_place_at_every_step(idle: list[Span], needed: list[Span]) -> None:
    found = [needed[k] for k in sorted(lent(idle, needed))]
    for step in range(20):
        there = [Span(0, v.end, v.nbytes) for v in found if v.begin <= step < v.end]
        assert fits(there, idle)


def test_nothing_is_lent_where_nothing_is_idle() -> None:
    assert not lent([], [Span(0, 1, 1.0)])
    assert not lent([Span(0, 4, 2.0)], [Span(0, 2, 3.0), Span(3, 5, 1.0)])


def test_one_value_at_a_time() -> None:
    assert len(lent([Span(0, 9, 4.0)], [Span(1, 5, 2.0), Span(2, 6, 2.0)])) == 1
