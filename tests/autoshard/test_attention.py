"""Attention is found by its form, whatever is around it; what a fused kernel hides is gone."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard
from autoshard.trace import trace
from passes.attention import NONE, attention
from passes.fusion import Fusion, fuse
from passes.ir.graph import Graph
from passes.normalize import drop_dead

BATCH, HEADS, LONG, FEATURE = 2, 4, 256, 32
SCORES = BATCH * HEADS * LONG * LONG


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


X = bf16(BATCH, LONG, HEADS, FEATURE)


def plain(q: Any, k: Any, v: Any) -> Any:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / math.sqrt(FEATURE)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(q.dtype), v)


def masked(q: Any, k: Any, v: Any) -> Any:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.tril(jnp.ones((LONG, LONG), bool)), scores, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(q.dtype), v)


def dropping(q: Any, k: Any, v: Any) -> Any:
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    keep = jax.random.bernoulli(jax.random.key(0), 0.9, weights.shape)
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.where(keep, weights / 0.9, 0).astype(q.dtype), v)


def jaxs_own(q: Any, k: Any, v: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def scanned(q: Any, k: Any, v: Any) -> Any:
    """Three layers; the backward loop reads what the forward one has stacked."""
    return jax.lax.scan(lambda x, _: (plain(x, k, v), None), q, None, length=3)[0]


def scanned_again(q: Any, k: Any, v: Any) -> Any:
    """Three layers that are computed again in the backward loop."""
    layer = jax.checkpoint(masked)
    return jax.lax.scan(lambda x, _: (layer(x, k, v), None), q, None, length=3)[0]


FORMS = [plain, masked, dropping, jaxs_own, scanned, scanned_again]


def gradients(fn: Any) -> Any:
    return jax.value_and_grad(lambda *qkv: fn(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))


def traced(fn: Any) -> Graph:
    return drop_dead(trace(fn, X, X, X).graph)


def as_large(graph: Graph, fusion: Fusion) -> list[str]:
    """What is kept that is as large as the scores, or larger."""
    made = [(op.name, v) for op in graph.ops for v in op.outputs]
    return [n for n, v in made if fusion.stored[v] and graph.values[v].type.size >= SCORES]


@pytest.mark.parametrize("platform", ["gpu", "tpu", "cpu"])
@pytest.mark.parametrize("form", FORMS)
def test_no_scores_leave_a_fused_kernel(form: Any, platform: str) -> None:
    graph = traced(gradients(form))
    found = attention(graph)
    assert len(found.softmaxes) == (2 if form is scanned_again else 1)
    assert as_large(graph, fuse(graph, platform))  # without the option they are there
    fusion = fuse(graph, platform, found)
    assert as_large(graph, fusion) == []
    # What moves is a few times as large as q, k, v and what is kept of each row.
    rows = 3 * 4 * BATCH * HEADS * LONG
    inputs = 3 * graph.values[graph.inputs[0]].type.nbytes
    moved = max(n for t in fusion.traffic for values in t.moved for n, _ in values)
    assert moved <= max(rows, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_a_backward_pass_multiplies_five_times(form: Any) -> None:
    """Scores again, their gradient, and those of q, k and v (FlashAttention, algorithm 4)."""
    graph = traced(gradients(form))
    fusion = fuse(graph, "gpu", attention(graph))
    products = [op for op in graph.ops if op.name == "dot_general"]
    runs = sum(fusion.traffic[op.id].runs for op in products)
    # Computed again, a layer's scores are multiplied, and what no gradient reads is left out.
    assert runs == 2 + 5 + (1 if form is scanned_again else 0)


def test_the_forward_pass_alone() -> None:
    graph = traced(masked)
    found = attention(graph)
    assert len(found.softmaxes) == 1
    assert found.again == frozenset()
    assert as_large(graph, fuse(graph, "gpu", found)) == []


def entropy(table: Any, x: Any, labels: Any) -> Any:
    """A softmax between two products, in the backward pass: no attention."""
    scores = jax.nn.log_softmax((x @ table.T).astype(jnp.float32))
    return -(scores * labels).sum()


def gated(x: Any, gate: Any, w: Any) -> Any:
    """A softmax over experts whose result weighs, and is not multiplied in batches."""
    return jax.nn.softmax(x @ gate) @ w


def test_other_softmaxes_are_none() -> None:
    table, x = bf16(1024, 64), bf16(32, 64)
    labels = bf16(32, 1024)
    loss = jax.value_and_grad(entropy, argnums=(0, 1))
    assert attention(trace(loss, table, x, labels).graph) is NONE
    assert attention(trace(gated, bf16(32, 64), bf16(64, 8), bf16(8, 64)).graph) is NONE


def test_weights_that_are_a_result_are_stored() -> None:
    def both(q: Any, k: Any, v: Any) -> Any:
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return weights, jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    graph = traced(both)
    fusion = fuse(graph, "gpu", attention(graph))
    assert fusion.stored[graph.outputs[0]]


def test_the_option_is_cheaper_and_says_what_it_is() -> None:
    args = (X, X, X)
    plans = [
        autoshard.plan(gradients(masked), *args, cluster="h100:2", fused_attention=fused)
        for fused in (False, True)
    ]
    plainly, fused = (p.cost for p in plans)
    assert fused.step_time < plainly.step_time
    assert fused.peak_memory < plainly.peak_memory / 4
    assert fused.flops == plainly.flops
    assert "1 attention found" in str(plans[1])
    assert "fused" not in str(plans[0])


def test_a_plan_remembers_it() -> None:
    plan = autoshard.plan(gradients(masked), X, X, X, cluster="h100:2", fused_attention=True)
    assert json.loads(plan.to_json())["fused_attention"] is True
    again = autoshard.Plan.from_json(plan.to_json(), gradients(masked), X, X, X)
    assert again.explain("*") == plan.explain("*")
