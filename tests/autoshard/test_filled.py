"""Filled constants on GPUs: copies that are made together, and slices of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard
from passes.answer import Change
from passes.filled import copies_at_once, made_as_read
from passes.reshard import Step, Waited
from passes.search import Found

ROWS, WIDTH = 4096, 64


def step(tables: Any, ids: Any) -> Any:
    """What is picked of each table is drawn to zero; rows that nobody picks are kept."""
    grads = jax.grad(lambda ts: sum(jnp.sum(t[ids] ** 2) for t in ts))(tables)
    return [jnp.where(g == 0, 0.0, t - 0.1 * g) for t, g in zip(tables, grads, strict=True)]


def planned(tables: int, cluster: str = "h100:8") -> Found:
    args = (
        [jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)] * tables,
        jax.ShapeDtypeStruct((512,), jnp.int32),
    )
    hints = {"tables/*": jax.P("x")}
    plan = autoshard.plan(
        step, *args, cluster=cluster, mesh={"x": 8}, hints=hints, donate_argnums=(0,)
    )
    assert plan._found is not None
    return plan._found


@pytest.mark.parametrize("tables", [1, 2, 5])
def test_zeros_of_all_gradients_are_made_before_the_first_is_added_to(tables: int) -> None:
    priced = planned(tables).priced
    added = [priced.live.when[op.id] for op in priced.graph.ops if op.name == "scatter-add"]
    copies = list(copies_at_once(priced))
    assert [(begin, end) for _, begin, end in copies] == [
        (min(added), step) for step in sorted(added)[1:-1]
    ]
    assert not list(copies_at_once(planned(tables, "v5e:2x4").priced))


@pytest.mark.parametrize(("targets", "expected"), [({(0,)}, (0,)), ({(0,), (1,)}, None)])
def test_a_filled_constant_is_made_as_all_its_readers_slice_it(
    targets: set[tuple[int, ...]], expected: tuple[int, ...] | None
) -> None:
    priced = planned(2).priced
    graph = priced.graph
    v = next(op.inputs[0] for op in graph.ops if op.name == "scatter-add")
    reads = graph.consumers()[v]
    assert len(reads) == 2
    moves, nobody = (Step("slice", 0, 1.0, 1 / 8),), Waited(0, 0.0)
    cut = [
        Change(o, "operand", k, v, (-1,), target, -1, moves, 1.0, 1.0, nobody)
        for (o, k), target in zip(reads, sorted(targets) * 2, strict=False)
    ]
    assert made_as_read(priced, cut).get(v) == expected
    assert v not in made_as_read(priced, cut[:1])  # another reads it whole
