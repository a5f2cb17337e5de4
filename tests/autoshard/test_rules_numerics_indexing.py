"""Look-ups, dynamic slices, ragged products: what splits, and that shards make up the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax

from autoshard.rule_shards import faults, find, find_all
from passes.ir.rule import Rule

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def real(*shape: int) -> Any:
    return np.random.standard_normal(shape).astype(np.float32)


def below(limit: int, *shape: int) -> Any:
    return np.random.randint(-2, limit + 2, shape).astype(np.int32)  # some out of bounds


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test draws the same numbers from np.random, whatever ran before it."""
    np.random.seed(0)


def check(name: str, fn: Callable[..., Any], *args: Any) -> Rule:
    """The rule of the last such equation, after its shards were seen to make up the whole."""
    eqn, numbers, rule = find(name, fn, *args)
    assert not faults(eqn, numbers, rule)
    return rule


def split_sizes(rule: Rule, kind: str) -> list[int]:
    return sorted(f.size for f in rule.factors if f.kind == kind and f.size > 1)


# Gather.

# Each example is compiled; shrinking a failure would take minutes.
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
MODES = ("clip", "fill", "promise_in_bounds")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("fn", "parallel", "reduced"),
    [
        (lambda x, i, mode: x.at[i].get(mode=mode), [4, 6, 10], [8]),
        (lambda x, i, mode: x.at[:, i].get(mode=mode), [4, 6, 8], [10]),
        (lambda x, i, mode: x.at[i, i[::-1]].get(mode=mode), [4, 6], [8, 10]),
        (lambda x, i, mode: x.at[None, :, i].get(mode=mode), [4, 6, 8], [10]),
        (lambda x, i, mode: x.at[i, 2:4].get(mode=mode), [4, 6], [8]),
    ],
    ids=["rows", "columns", "both", "a new dim", "rows of a stretch"],
)
def test_gather(mode: str, fn: Any, parallel: list[int], reduced: list[int]) -> None:
    i = below(8, 4, 6) if mode != "promise_in_bounds" else np.abs(below(5, 4, 6))
    rule = check("gather", partial(fn, mode=mode), real(8, 10), i)
    assert split_sizes(rule, "parallel") == parallel
    assert split_sizes(rule, "reduction") == reduced


@pytest.mark.parametrize("mode", MODES)
def test_gather_along_an_axis(mode: str) -> None:
    i = np.abs(below(5, 6, 10))
    take = partial(jnp.take_along_axis, mode=mode)
    rule = check("gather", lambda x, i: take(x, i, 0), real(8, 10), i)
    assert split_sizes(rule, "parallel") == [6, 10]
    assert split_sizes(rule, "reduction") == [8]


def test_gather_of_stretches_keeps_the_cut_dim_whole() -> None:
    cut = jax.vmap(lambda x, i: lax.dynamic_slice(x, (i, 0), (3, 8)))
    rule = check("gather", cut, real(4, 6, 8), below(4, 4))
    assert split_sizes(rule, "parallel") == [4, 8]
    assert split_sizes(rule, "reduction") == []
    assert 6 in split_sizes(rule, "whole")


def test_gather_linearity_depends_on_what_is_filled_in() -> None:
    i = below(8, 4)
    for fill, linear in ((None, True), (0, True), (np.nan, True), (7, False)):
        get = partial(lambda x, i, fill: x.at[i].get(mode="fill", fill_value=fill), fill=fill)
        assert bool(find("gather", get, real(8), i)[2].linear) is linear
    integers = np.arange(8, dtype=np.int32)
    rule = find("gather", lambda x, i: x.at[i].get(mode="fill"), integers, i)[2]
    assert rule.linear == ()


@settings(deadline=None, max_examples=15, phases=NO_SHRINKING)
@given(data=st.data())
def test_any_gather(data: st.DataObject) -> None:
    """Random dimension numbers: collapsed, window, batching and cut dims in any order."""
    rank = data.draw(st.integers(1, 4))
    roles = [data.draw(st.sampled_from(["row", "window", "cut", "batch"])) for _ in range(rank)]
    sizes = [data.draw(st.sampled_from([4, 6] if r == "cut" else [2, 4, 6])) for r in roles]
    batching = [d for d in range(rank) if roles[d] == "batch"]
    looked_up = [d for d in range(rank) if roles[d] in ("row", "cut")]
    collapsed = [d for d in range(rank) if roles[d] == "row" and data.draw(st.booleans())]
    slices = [
        {"row": 1, "batch": 1, "window": n, "cut": n // 2}[role]
        for role, n in zip(roles, sizes, strict=True)
    ]
    index_shape = [sizes[d] for d in batching] + [data.draw(st.sampled_from([2, 3]))]
    windows = rank - len(batching) - len(collapsed)
    out_rank = len(index_shape) + windows
    offsets = sorted(data.draw(st.permutations(range(out_rank)))[:windows])
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(offsets),
        collapsed_slice_dims=tuple(collapsed),
        start_index_map=tuple(looked_up),
        operand_batching_dims=tuple(batching),
        start_indices_batching_dims=tuple(range(len(batching))),
    )
    mode = data.draw(st.sampled_from(MODES[:2]))
    indices = below(4, *index_shape, len(looked_up))
    rule = check(
        "gather",
        lambda x, i: lax.gather(x, i, numbers, slices, mode=mode),
        real(*sizes),
        indices,
    )
    rows = [n for n, role in zip(sizes, roles, strict=True) if role == "row"]
    assert split_sizes(rule, "reduction") == sorted(rows)


# Scatter.

SCATTERS = {
    "scatter": "set",
    "scatter-add": "add",
    "scatter-max": "max",
    "scatter-min": "min",
    "scatter-mul": "multiply",
    "scatter-sub": "subtract",
}


@pytest.mark.parametrize("mode", ["clip", "drop"])
@pytest.mark.parametrize("name", SCATTERS)
def test_scatter_of_rows(name: str, mode: str) -> None:
    def fn(x: Any, i: Any, u: Any) -> Any:
        return getattr(x.at[i], SCATTERS[name])(u, mode=mode)

    rule = check(name, fn, real(8, 10), below(8, 4, 6), real(4, 6, 10))
    assert split_sizes(rule, "parallel") == [8, 10]
    combined = ([], [4, 6]) if name in ("scatter", "scatter-sub") else ([4, 6], [])
    assert (split_sizes(rule, "reduction"), split_sizes(rule, "whole")) == combined


@pytest.mark.parametrize("name", ["scatter", "scatter-add", "scatter-max"])
def test_scatter_with_batching_dims(name: str) -> None:
    def fn(x: Any, i: Any, u: Any) -> Any:
        return jax.vmap(lambda x, i, u: getattr(x.at[i], SCATTERS[name])(u))(x, i, u)

    rule = check(name, fn, real(4, 8, 6), below(8, 4, 3), real(4, 3, 6))
    assert split_sizes(rule, "parallel") == [4, 6, 8]


def test_scatter_of_single_elements() -> None:
    rule = check(
        "scatter-add",
        lambda x, i, u: x.at[i, i[::-1]].add(u),
        real(8, 10),
        below(8, 6),
        real(6),
    )
    assert split_sizes(rule, "parallel") == [8, 10]
    assert split_sizes(rule, "reduction") == [6]


def test_scatter_of_stretches_keeps_the_cut_dim_whole() -> None:
    update = jax.vmap(lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)))
    rule = check("scatter", update, real(4, 6, 8), real(4, 3, 8), below(4, 4))
    assert split_sizes(rule, "parallel") == [4, 8]
    assert 6 in split_sizes(rule, "whole")


def test_cache_update_for_each_batch_element_may_split_the_cache() -> None:
    update = jax.vmap(lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)))
    rule = check("scatter", update, real(4, 6, 8), real(4, 1, 8), below(4, 4))
    assert split_sizes(rule, "parallel") == [4, 6, 8]


def test_embedding_gradient() -> None:
    def loss(table: Any, i: Any) -> Any:
        return jnp.sum(jnp.sin(table[i]))

    rule = check("scatter-add", jax.grad(loss), real(8, 6), np.abs(below(6, 10)))
    assert split_sizes(rule, "parallel") == [6, 8]
    assert split_sizes(rule, "reduction") == [10]
    assert rule.linear == ((0, 2),)


def test_a_scatter_with_the_users_own_function_is_not_linear() -> None:
    rule = find("scatter", lambda x, i: x.at[i].apply(jnp.sin), real(8, 6), below(8, 4))[2]
    assert rule.linear == ()
    assert split_sizes(rule, "whole") == [4]


# Dynamic slices.


def test_dynamic_slice() -> None:
    rule = check(
        "dynamic_slice",
        lambda x, i: lax.dynamic_slice(x, (i, 0, 0), (4, 6, 4)),
        real(8, 6, 4),
        np.int32(7),
    )
    assert split_sizes(rule, "parallel") == [4, 6]


@pytest.mark.parametrize(("rows", "parallel"), [(1, [6, 8]), (4, [6]), (8, [6, 8])])
@pytest.mark.parametrize("start", [-3, 0, 5, 7, 30])
def test_dynamic_update_slice(rows: int, parallel: list[int], start: int) -> None:
    rule = check(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0), allow_negative_indices=False),
        real(8, 6),
        real(rows, 6),
        np.int32(start),
    )
    assert split_sizes(rule, "parallel") == parallel


# Ragged products.


def test_ragged_rows() -> None:
    sizes = np.array([3, 0, 4, 1], np.int32)
    rule = check("ragged_dot_general", lax.ragged_dot, real(8, 6), real(4, 6, 10), sizes)
    assert split_sizes(rule, "parallel") == [8, 10]
    assert split_sizes(rule, "reduction") == [4, 6]
    assert rule.flops == 2 * 8 * 6 * 10


def test_ragged_gradients() -> None:
    sizes = np.array([3, 0, 4, 1], np.int32)

    def loss(x: Any, w: Any) -> Any:
        return jnp.sum(jnp.sin(lax.ragged_dot(x, w, sizes)))

    x, w = real(8, 6), real(4, 6, 10)
    found = find_all("ragged_dot_general", jax.grad(loss, (0, 1)), x, w)
    assert len(found) == 3
    for eqn, ins, rule in found:
        assert not faults(eqn, ins, rule)
        assert rule.flops == 2 * 8 * 6 * 10


def test_ragged_rows_with_sizes_for_each_batch_element() -> None:
    sizes = np.array([[3, 5], [8, 0], [1, 2], [0, 8]], np.int32)
    product = jax.vmap(lax.ragged_dot)
    rule = check("ragged_dot_general", product, real(4, 8, 6), real(4, 2, 6, 10), sizes)
    assert split_sizes(rule, "parallel") == [4, 8, 10]


# What must fail.


def respelled(rule: Rule, factor: int, **changes: Any) -> Rule:
    factors = list(rule.factors)
    factors[factor] = replace(factors[factor], **changes)
    return replace(rule, factors=tuple(factors))


def test_rows_called_parallel_are_caught() -> None:
    eqn, ins, rule = find("gather", lambda x, i: x[i], real(8, 10), np.abs(below(4, 6)))
    row = next(k for k, f in enumerate(rule.factors) if f.kind == "reduction")
    assert faults(eqn, ins, respelled(rule, row, kind="parallel"))


def test_a_wrong_reduction_is_caught() -> None:
    eqn, ins, rule = find(
        "scatter-max", lambda x, i, u: x.at[i].max(u), real(8), below(8, 6), real(6)
    )
    updates = next(k for k, f in enumerate(rule.factors) if f.kind == "reduction")
    assert faults(eqn, ins, respelled(rule, updates, op="min"))


def test_a_wrong_linear_group_is_caught() -> None:
    eqn, ins, rule = find(
        "scatter-add", lambda x, i, u: x.at[i].add(u), real(8), below(8, 6), real(6)
    )
    assert faults(eqn, ins, replace(rule, linear=((0,),)))
