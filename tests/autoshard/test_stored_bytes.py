"""Values are counted as XLA:TPU keeps them: half as wide where only one-pass products read them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard
from autoshard.trace import trace
from passes.ir.graph import Graph
from passes.stored_bytes import stored_bytes


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def halved(graph: Graph, platform: str = "tpu") -> list[str]:
    """Names of the operations that make what is kept at half its bytes."""
    found, producers = stored_bytes(graph, platform), graph.producers()
    return [
        graph.ops[producers[v.id]].name
        for v in graph.values
        if found.of_value[v.id] * 2 == v.type.nbytes and producers[v.id] >= 0
    ]


def only_products(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x).T @ w


def a_sum_too(x: jax.Array, w: jax.Array) -> Any:
    y = jnp.tanh(x)
    return y.T @ w, y.sum()


def exact(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot(jnp.tanh(x).T, w, precision="highest")


def stacked(x: jax.Array, ws: jax.Array) -> jax.Array:
    def body(c: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return c + 1, jnp.sin(w)

    _, ys = jax.lax.scan(body, x, ws)
    return ys[0] @ x


@pytest.mark.parametrize(
    ("fn", "shapes", "wanted"),
    [
        (only_products, ((64, 32), (64, 16)), {"tanh", "transpose"}),
        (a_sum_too, ((64, 32), (64, 16)), {"transpose"}),
        (exact, ((64, 32), (64, 16)), set()),
    ],
)
def test_what_only_one_pass_products_read_is_kept_at_half(
    fn: Any, shapes: tuple[tuple[int, ...], ...], wanted: set[str]
) -> None:
    graph = trace(fn, *(f32(*s) for s in shapes)).graph
    assert set(halved(graph)) == wanted
    assert halved(graph, "gpu") == []


def test_stacks_and_slices_hand_it_on() -> None:
    graph = trace(stacked, f32(16, 16), f32(3, 16, 16)).graph
    assert {"sin", "scan_stack"} <= set(halved(graph))


def loss(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.tanh(x @ w) ** 2)


@pytest.mark.libtpu
@pytest.mark.parametrize("solver", ["dp", "fsdp", "tp"])
def test_the_tpu_compiler_sends_as_many_bytes(solver: str) -> None:
    """Weights gathered as bfloat16, gradients summed whole as float32."""
    grads = jax.value_and_grad(loss)
    plan = autoshard.plan(grads, f32(1024, 2048), f32(4096, 1024), cluster="v5e:2x4", solver=solver)
    found = plan.verify()
    assert found.compiled is not None
    assert plan.cost.comm_bytes == pytest.approx(found.compiled.sent, rel=0.05, abs=64)
