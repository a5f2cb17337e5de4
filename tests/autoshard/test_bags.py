"""Bags of rows of a table: which sums they are, and what XLA:TPU takes for them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard
from autoshard.trace import trace
from passes.answer import read_back
from passes.bags import bags

BATCH, ROWS = 65536, 8192


def step(table: Any, ids: Any) -> Any:
    """Sums of bags, and what they add to the table's gradient."""
    value, grad = jax.value_and_grad(lambda t: jnp.sum(t[ids].sum(axis=1) ** 2))(table)
    return value, table - 0.1 * grad


def arguments(bag: int, width: int) -> tuple[Any, Any]:
    table = jax.ShapeDtypeStruct((ROWS, width), jnp.float32)
    return table, jax.ShapeDtypeStruct((BATCH, bag), jnp.int32)


def test_a_bag_is_added_up_and_its_gradient_spread_over_its_rows() -> None:
    graph = trace(step, *arguments(4, 128)).graph
    found = {graph.ops[o].name: graph.values[v].shape for o, v in bags(graph).items()}
    assert found == {"reduce_sum": (BATCH, 4, 128), "broadcast_in_dim": (BATCH, 4, 128)}


def test_other_sums_are_no_bags() -> None:
    x = jax.ShapeDtypeStruct((BATCH, 4, 128), jnp.float32)
    ids = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    table = jax.ShapeDtypeStruct((ROWS, 128), jnp.float32)
    for fn, args in (
        (lambda x: x.sum(1), (x,)),
        (lambda x: jnp.broadcast_to(x[:, :1], x.shape), (x,)),
        (lambda t, i: t[i].sum(0), (table, ids)),
        (lambda t, i: t[i].sum(1), (table, ids)),
    ):
        assert not bags(trace(fn, *args).graph)


@pytest.mark.libtpu
@pytest.mark.parametrize("chip", ["tpu-v5e:2x2", "tpu-v6e:2x2"])
@pytest.mark.parametrize(("bag", "width"), [(4, 128), (2, 256), (4, 16)])
def test_bags_take_what_the_compiler_says(chip: str, bag: int, width: int) -> None:
    """XLA estimates no time for picking rows, and we what the memory takes."""
    table, ids = arguments(bag, width)
    hints = {"table": jax.P(None, None), "ids": jax.P("x")}
    plan = autoshard.plan(
        lambda table, ids: table[ids].sum(axis=1),
        *(table, ids),
        cluster=chip,
        mesh={"x": 4},
        hints=hints,
    )
    compiled, found = plan.verify().compiled, plan._found
    assert compiled is not None
    assert found is not None
    priced = found.priced
    seconds = read_back(priced, found.solution.choice).seconds
    picked = sum(s for s, op in zip(seconds, priced.graph.ops, strict=True) if op.name == "gather")
    assert 0.7 < (plan.cost.compute_time - picked) / compiled.compute < 1.35
