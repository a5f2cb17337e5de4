"""The plans of experts, asked for by name."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

import autoshard

BATCH, WIDTH = 64, 128


def feed_forward(params: dict[str, Any], x: Any) -> Any:
    return jnp.maximum(x @ params["up"], 0) @ params["down"]


def planned(solver: str, mesh: dict[str, int] | None) -> autoshard.Plan:
    params = {"up": jnp.zeros((WIDTH, 4 * WIDTH)), "down": jnp.zeros((4 * WIDTH, WIDTH))}
    x = jnp.zeros((BATCH, WIDTH))
    return autoshard.plan(feed_forward, params, x, cluster="tpu-v5e:2x4", mesh=mesh, solver=solver)


def specs(plan: autoshard.Plan) -> dict[str, Any]:
    return {t.name.split("[")[-1].strip("'\"]"): t.spec for t in plan.data.arguments}


def test_tensor_parallel_splits_weights_over_the_last_axis_and_the_batch_over_the_others() -> None:
    found = specs(planned("tp", {"data": 4, "model": 2}))
    assert found == {
        "up": ((), ("model",)),
        "down": (("model",), ()),
        "x": (("data",), ()),
    }


def test_the_batch_is_found_behind_many_weights() -> None:
    widths = range(32, 32 + 8 * 20, 8)

    def network(weights: list[Any], tokens: Any) -> Any:
        x = weights[0][tokens]
        for w in weights[1:]:
            x = jnp.tanh(x @ w)
        return x

    weights = [jnp.zeros((n, n + 8)) for n in widths]
    tokens = jnp.zeros((64, 16), jnp.int32)
    plan = autoshard.plan(
        network, weights, tokens, cluster="tpu-v5e:2x4", mesh={"data": 8}, solver="dp"
    )
    spec = [t.spec for t in plan.data.arguments]
    assert spec[-1] == (("data",), ())
    assert all(s == ((), ()) for s in spec[:-1])


def test_tensor_parallel_on_one_axis_leaves_the_batch_whole() -> None:
    assert specs(planned("tp", {"model": 8}))["x"] == ((), ())


@pytest.mark.parametrize(("solver", "axes"), [("tp", {1, 2}), ("fsdp+tp", {2}), ("fsdp", {1})])
def test_each_is_searched_on_the_meshes_that_suit_it(solver: str, axes: set[int]) -> None:
    plan = planned(solver, None)
    meshes = [plan.mesh, *(dict(a.mesh) for a in plan.alternatives)]
    assert {len(m) for m in meshes} == axes


def test_a_search_compares_with_each_on_the_meshes_that_suit_it() -> None:
    plan = planned("ilp", None)
    axes: dict[str, set[int]] = {}
    for a in plan.alternatives:
        axes.setdefault(a.solver, set()).add(len(a.mesh))
    assert axes["dp"] == axes["fsdp"] == {1}
    assert axes["tp"] == {1, 2}
    assert axes["fsdp+tp"] == {2}
    assert axes["propagate"] == {1, 2, 3}  # hints alone go with any


def test_tensor_parallel_splits_heads_and_not_their_features() -> None:
    def attention(p: dict[str, Any], x: Any) -> Any:
        q, k, v = (jnp.einsum("bsw,whd->bshd", x, p[name]) for name in "qkv")
        weights = jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("bqhd,hdw->bqw", jnp.einsum("bhqk,bkhd->bqhd", weights, v), p["o"])

    params = {name: jnp.zeros((256, 4, 64)) for name in "qkv"} | {"o": jnp.zeros((4, 64, 256))}
    x = jnp.zeros((8, 32, 256))
    mesh = {"data": 4, "model": 2}
    plan = autoshard.plan(attention, params, x, cluster="h100:8", mesh=mesh, solver="tp")
    found = specs(plan)
    assert all(found[name] == ((), ("model",), ()) for name in "qkv")
    assert found["o"] == (("model",), (), ())
