"""What lies in memory in and around loops, counted by hand in arrays of 64 MiB.

XLA:TPU's own figures for the same programs (v5e, jax 0.10.2, libtpu 0.0.42.1): 10.5, 7 and 8. Of
what lies where results will be, XLA:GPU's (H100) are what is asserted here, and XLA:TPU's (v5p).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard

SIZE = 4096
BYTES = 4 * SIZE * SIZE
ONE = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
FOUR = jax.ShapeDtypeStruct((4, SIZE, SIZE), jnp.float32)


def reads_what_was_computed_before(x: Any, w: Any, each: Any) -> Any:
    before = jnp.tanh(x @ w)

    def body(total: Any, s: Any) -> Any:
        y = jnp.sin(before @ s)
        z = jnp.cos(y @ y.T)
        return total + z.T @ y, None

    return jax.lax.scan(body, jnp.zeros(ONE.shape), each)[0].sum()


def carries_an_argument(x: Any, each: Any) -> Any:
    def body(x: Any, s: Any) -> Any:
        y = jnp.sin(x @ s)
        return jnp.cos(y @ y.T), None

    return jax.lax.scan(body, x, each)[0].sum()


def sums_up_two(each: Any) -> Any:
    def body(sums: Any, s: Any) -> Any:
        y = jnp.sin(s @ s.T)
        return (sums[0] + y @ s, sums[1] + jnp.cos(y) @ s), None

    a, b = jax.lax.scan(body, (jnp.zeros(ONE.shape),) * 2, each)[0]
    return a @ b


@pytest.mark.parametrize(
    ("fn", "args", "arrays"),
    [
        # The arguments, what is computed before, the sum, y, z, and the summand.
        (reads_what_was_computed_before, (ONE, ONE, FOUR), 6 + 5),
        # The arguments, the carry or y, and what follows it, beside what it is made of.
        (carries_an_argument, (ONE, FOUR), 5 + 2),
        # The arguments, two sums, y, and a summand; in the end two sums and the result.
        (sums_up_two, (FOUR,), 4 + 4),
    ],
)
def test_what_loops_read_and_carry_is_there(
    fn: Callable[..., Any], args: tuple[Any, ...], arrays: int
) -> None:
    plan = autoshard.plan(fn, *args, cluster="h100:1", solver="dp")
    assert plan.cost.peak_memory / BYTES == pytest.approx(arrays, abs=0.01)


def test_a_donated_argument_that_a_loop_carries_and_gives_back_is_one_buffer() -> None:
    def steps(state: Any, each: Any) -> Any:
        return jax.lax.scan(lambda x, s: (x + jnp.sin(s @ s), None), state, each)[0]

    plan = autoshard.plan(steps, ONE, FOUR, cluster="h100:1", solver="dp", donate_argnums=0)
    kept = autoshard.plan(steps, ONE, FOUR, cluster="h100:1", solver="dp")
    assert plan.cost.peak_memory / BYTES == pytest.approx(5 + 1, abs=0.01)
    assert kept.cost.peak_memory > plan.cost.peak_memory


@pytest.mark.parametrize("cluster", ["h100:1", "v5e:1x1"])
def test_a_donated_stack_lies_beside_the_one_that_a_loop_makes_of_its_slices(cluster: str) -> None:
    def steps(stack: Any, x: Any) -> Any:
        def layer(x: Any, part: Any) -> Any:
            part = jax.lax.dynamic_update_slice_in_dim(part, x[:1], 3, axis=0)
            return x @ part, part

        return jax.lax.scan(layer, x, stack)

    given = autoshard.plan(steps, FOUR, ONE, cluster=cluster, solver="dp", donate_argnums=0)
    kept = autoshard.plan(steps, FOUR, ONE, cluster=cluster, solver="dp")
    # One stack and the other, before the new one is copied to where the old one lay.
    assert given.cost.peak_memory / BYTES >= 4 + 4
    assert kept.cost.peak_memory >= given.cost.peak_memory


def gradients(ws: Any, x: Any) -> Any:
    """Of layers, the results of which wait for their gradients."""

    def loss(ws: Any) -> Any:
        y = x
        for w in ws:
            y = jnp.tanh(y @ w)
        return jnp.sum(y * y)

    return jax.grad(loss)(ws)


def replaced(old: Any, x: Any) -> Any:
    """Reads what is given away once, and makes as much at the end."""
    y = jnp.cumsum(x @ old, axis=1)
    z = jnp.cumsum(y @ x, axis=1)
    return jnp.cumsum(jnp.cumsum(z @ y, axis=1) @ x, axis=1)


def of_gradients(rows: int, cluster: str, layers: int = 12) -> autoshard.Plan:
    ws = [jax.ShapeDtypeStruct((1024, 1024), jnp.float32)] * layers
    x = jax.ShapeDtypeStruct((rows, 1024), jnp.float32)
    return autoshard.plan(gradients, ws, x, cluster=cluster, solver="dp")


def of_replaced(cluster: str, given: bool) -> autoshard.Plan:
    donated = (0,) if given else ()
    return autoshard.plan(replaced, ONE, ONE, cluster=cluster, solver="dp", donate_argnums=donated)


@pytest.mark.parametrize("cluster", ["h100:1", "v5p:1x1x1"])
def test_what_waits_lies_where_results_will_be_if_they_are_as_large(cluster: str) -> None:
    mib, arguments_and_results = 2**20, 2 * 12 * 4
    fits, larger = (of_gradients(rows, cluster).cost.peak_memory / mib for rows in (1024, 2048))
    assert arguments_and_results + 4 <= fits <= arguments_and_results + 12
    assert larger >= arguments_and_results + 8 + 11 * 8


@pytest.mark.parametrize("cluster", ["h100:1", "v5p:1x1x1"])
def test_an_argument_that_is_given_away_lends_its_memory_after_its_last_read(cluster: str) -> None:
    given, kept = (of_replaced(cluster, g).cost.peak_memory / BYTES for g in (True, False))
    assert given == kept - 1  # the result's own
    assert given < 5  # x, what is given away, and three that wait


@pytest.mark.libtpu
def test_the_compiler_lends_as_much() -> None:
    mib, fits = 2**20, of_gradients(1024, "v5p:1x1x1").verify().compiled
    assert fits is not None
    assert fits.memory is not None
    assert fits.memory.temporaries < 8 * mib  # of 44 that wait
    larger = of_gradients(2048, "v5p:1x1x1")
    for plan in (larger, *(of_replaced("v5p:1x1x1", given) for given in (True, False))):
        found = plan.verify().compiled
        assert found is not None
        assert found.memory is not None
        assert plan.cost.peak_memory == pytest.approx(found.memory.peak, abs=mib)
