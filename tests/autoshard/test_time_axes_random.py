"""Whatever dim of whatever program is split over time, the numbers are those of plain jit.

What must couple the steps does, and is named with its line.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from time_programs import ARGS, MOVES, STEPS, cut, near, program

from passes.ir.plan import TimeAxis
from passes.microbatch_loop import NoTimeLoop

pytestmark = pytest.mark.usefixtures("in_a_hurry")

steps_taken = st.lists(
    st.tuples(st.sampled_from(STEPS), st.sampled_from((0, 0, 0, 1, 2, 3)), st.integers(0, 4)),
    min_size=1,
    max_size=6,
)
hinted = st.sampled_from([(p, d) for p, x in enumerate(ARGS) for d in range(x.ndim)])


def check(taken: Any, grad: bool, at: tuple[int, int], other: tuple[int, int] | None) -> bool:
    """Whether something ran in steps, of which the numbers are right."""
    fn = program(taken, grad, at[0])
    axes = [TimeAxis("micro", 2, (at,))]
    if other is not None and other != at:
        axes.append(TimeAxis("seq", 2, (other,)))
    try:
        made, _ = cut(fn, ARGS, *axes)
    except NoTimeLoop:
        return False
    assert near(jax.jit(made)(*ARGS), jax.jit(fn)(*ARGS))
    return True


@settings(max_examples=30, deadline=None)
@given(steps_taken, st.booleans(), hinted, st.none() | hinted)
def test_any_program_in_steps_over_any_dim(
    taken: Any, grad: bool, at: tuple[int, int], other: tuple[int, int] | None
) -> None:
    check(taken, grad, at, other)


# What must couple: the same dim reversed, added up or sorted along


@pytest.mark.parametrize("what", MOVES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_moved_along_the_dim_runs_before_or_after(what: Any, dim: int) -> None:
    def fn(x: Any) -> Any:
        return jnp.tanh(what(jnp.sin(x), axis=dim) @ ARGS[1])

    args = (ARGS[3],)
    axis = TimeAxis("micro", 2, ((0, 0),))
    made, said = cut(fn, args, axis)
    assert near(jax.jit(made)(*args), jax.jit(fn)(*args))
    assert ("waits for all of them" in said) == (dim == 0)
    if dim == 0:
        assert "what all of dim 0 of x makes" in said
        assert "test_time_axes_random.py:" in said


def test_nothing_runs_where_the_first_thing_couples() -> None:
    with pytest.raises(
        NoTimeLoop,
        match=r"'micro' over dim 1 of x: sort at test_time_axes_random.py:\d+ .* needs",
    ):
        cut(lambda x: jnp.sort(x) @ ARGS[1], (ARGS[3],), TimeAxis("micro", 2, ((0, 1),)))
