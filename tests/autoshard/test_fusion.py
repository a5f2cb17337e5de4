"""What XLA fuses holds no memory, and every kernel reads each of its bytes once."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given

import autoshard
from autoshard.trace import trace
from passes.fusion import Fusion, fuse
from passes.ir.graph import Graph
from passes.overlap import early

MIB = 2.0**20


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def kept(graph: Graph, fusion: Fusion) -> list[str]:
    """Names of the operations whose results have memory, in program order."""
    makers = graph.producers()
    return [graph.ops[makers[v]].name for v in made(graph) if fusion.stored[v]]


def made(graph: Graph) -> list[int]:
    return [v for op in graph.ops for v in op.outputs]


def moved(fusion: Fusion) -> float:
    """Bytes that all kernels read and write."""
    return sum(n for t in fusion.traffic for values in t.moved for n, _ in values)


def kernels(fusion: Fusion) -> int:
    return sum(t.kernels for t in fusion.traffic)


def around_a_product(x: Any, w: Any, b: Any) -> Any:
    return jnp.maximum(jnp.tanh(x) @ w + b, 0)


def test_on_tpu_a_product_takes_the_chains_before_and_behind_it() -> None:
    graph = trace(around_a_product, f32(512, 256), f32(256, 128), f32(128)).graph
    fusion = fuse(graph, "tpu")
    assert kept(graph, fusion) == ["max"]
    assert kernels(fusion) == 1
    # x, w, b are read and the result is written, and nothing else.
    assert moved(fusion) == 4 * (512 * 256 + 256 * 128 + 128 + 512 * 128)


def test_elsewhere_a_product_is_a_kernel_of_its_own() -> None:
    graph = trace(around_a_product, f32(512, 256), f32(256, 128), f32(128)).graph
    assert kept(graph, fuse(graph, "gpu")) == ["tanh", "dot_general", "max"]


def test_elsewhere_no_reduction_runs_in_a_products_kernel() -> None:
    def rows(x: Any, w: Any) -> Any:
        return jnp.max(x @ w, axis=-1)

    graph = trace(rows, f32(512, 256), f32(256, 128)).graph
    assert kernels(fuse(graph, "tpu")) == 1
    fusion = fuse(graph, "gpu")
    assert kernels(fusion) == 2
    assert moved(fusion) == 4 * (512 * 256 + 256 * 128 + 2 * 512 * 128 + 512)


def test_elsewhere_a_product_reads_the_narrower_side_of_a_conversion() -> None:
    """And it takes no arithmetic in."""

    def narrowed(x: Any, w: Any) -> Any:
        return x.astype(jnp.bfloat16) @ w

    def widened(x: Any, w: Any) -> Any:
        return x.astype(jnp.float32) @ w

    def computed(x: Any, w: Any) -> Any:
        return jnp.tanh(x).astype(jnp.float32) @ w

    narrow, wide = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16), f32(256, 128)
    graph = trace(narrowed, f32(512, 256), jax.ShapeDtypeStruct((256, 128), jnp.bfloat16)).graph
    assert kept(graph, fuse(graph, "gpu")) == ["convert_element_type", "dot_general"]
    graph = trace(widened, narrow, wide).graph
    assert kept(graph, fuse(graph, "gpu")) == ["dot_general"]
    graph = trace(computed, narrow, wide).graph
    assert kept(graph, fuse(graph, "gpu")) == ["convert_element_type", "dot_general"]


def test_elsewhere_what_is_picked_from_is_computed_where_it_is_picked() -> None:
    def picked(scores: Any, labels: Any) -> Any:
        wide = scores.astype(jnp.float32)
        return jnp.take_along_axis(wide, labels[:, None], axis=1)[:, 0] - wide.max(axis=1)

    scores = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16)
    graph = trace(picked, scores, jax.ShapeDtypeStruct((512,), jnp.int32)).graph
    large = [
        op.outputs[0] for op in graph.ops if graph.values[op.outputs[0]].type.size == 512 << 10
    ]
    assert large
    assert not any(fuse(graph, "gpu").stored[v] for v in large)


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cpu"])
def test_nothing_is_fused_across_a_barrier(platform: str) -> None:
    """What a barrier is given is kept, and handed on as it is."""

    def steps(x: Any) -> Any:
        return jnp.sin(jax.lax.optimization_barrier(jnp.tanh(x)))

    graph = trace(steps, f32(512, 256)).graph
    fusion = fuse(graph, platform)
    assert kept(graph, fusion) == ["tanh", "sin"]
    assert moved(fusion) == 4 * 4 * 512 * 256  # x, tanh twice, sin


def test_a_softmax_of_products_is_kept_once() -> None:
    """The scores are never written: their exponentials are, and read by the next product."""

    def attention(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.softmax(q @ k.T) @ v

    graph = trace(attention, f32(1024, 64), f32(1024, 64), f32(1024, 64)).graph
    fusion = fuse(graph, "tpu")
    large = [v for v in made(graph) if graph.values[v].type.size == 1024**2 and fusion.stored[v]]
    makers = graph.producers()
    assert [graph.ops[makers[v]].name for v in large] == ["exp"]


def test_what_an_optimizer_updates_is_read_once_and_apart_from_its_gradient() -> None:
    """Between gradient and update lies a sum over the batch's axes."""

    def step(w: Any, m: Any, x: Any, y: Any) -> Any:
        g = x.T @ y
        m = 0.9 * m + g
        return w - 0.1 * m, m

    graph = trace(step, f32(512, 256), f32(512, 256), f32(64, 512), f32(64, 256)).graph
    fusion = fuse(graph, "tpu")
    assert "dot_general" in kept(graph, fusion)
    assert kernels(fusion) == 2
    part = 4 * 512 * 256
    # The product writes g; the update reads g, m and w and writes two.
    assert moved(fusion) == 4 * 64 * (512 + 256) + part + 5 * part


def test_a_chain_that_never_ends_is_kept_on_its_way() -> None:
    """Else its last part would read all that came before."""

    def stream(x: Any, *steps: Any) -> Any:
        out = []
        for s in steps:
            x = x + jnp.sin(s)
            out.append(x.sum(axis=0))
        return out

    graph = trace(stream, *[f32(256, 256)] * 40).graph
    for platform in ("tpu", "gpu"):
        most = max(
            sum(n for values in t.moved for n, _ in values) for t in fuse(graph, platform).traffic
        )
        assert most < 20 * 256 * 256 * 4


def test_a_row_of_zeros_with_one_element_is_made_on_the_fly() -> None:
    def loss(x: Any, labels: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(x), labels[:, None], axis=1).mean()

    labels = jax.ShapeDtypeStruct((512,), jnp.int32)
    graph = trace(jax.grad(loss), f32(512, 1000), labels).graph
    assert "scatter-add" in {op.name for op in graph.ops}
    assert "scatter-add" not in kept(graph, fuse(graph, "tpu"))
    assert "scatter-add" in kept(graph, fuse(graph, "gpu"))


@st.composite
def chains(draw: st.DrawFn) -> Any:
    """A function of two arrays made of elementwise steps, products, and sums."""
    steps = draw(st.lists(st.sampled_from(["sin", "mul", "dot", "sum", "both"]), max_size=8))

    def run(x: Any, y: Any) -> Any:
        z = x
        for s in steps:
            if s == "sin":
                z = jnp.sin(z)
            elif s == "mul":
                z = z * y
            elif s == "dot":
                z = z @ y
            elif s == "sum":
                z = z - z.sum(axis=0)
            else:
                z = jnp.cos(z) + x
        return z * 2

    return run


@given(run=chains(), platform=st.sampled_from(["tpu", "gpu", "cpu"]))
def test_kernels_read_what_is_there_and_write_what_is_kept(run: Any, platform: str) -> None:
    graph = trace(run, f32(64, 64), f32(64, 64)).graph
    fusion = fuse(graph, platform)
    assert all(fusion.stored[v] for v in graph.outputs)
    whole = sum(graph.values[v].type.nbytes for v in range(len(graph.values)))
    readers = sum(len(op.inputs) for op in graph.ops) + 1
    assert 64 * 64 * 4 <= moved(fusion) <= whole * readers
    # Each operation on elements is computed at least once, somewhere.
    done = {w[0] for t in fusion.traffic for work in t.work for w in work}
    assert {op.name for op in graph.ops if not op.is_link} - {"dot_general"} <= done


def test_weights_are_early_and_activations_are_not() -> None:
    def loss(ws: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return jnp.tanh(x @ w.astype(x.dtype)), None

        return jax.lax.scan(layer, x * 2, ws)[0].sum()

    graph = trace(loss, f32(3, 64, 64), f32(8, 64)).graph
    found = early(graph)
    (product,) = [op for op in graph.ops if op.name == "dot_general"]
    assert product.inputs[1] in found
    assert product.inputs[0] not in found


def mlp_step(params: Any, x: Any) -> Any:
    def loss(params: Any) -> Any:
        h = x
        for w in params:
            h = jax.nn.gelu(h @ w)
        return jnp.square(h).mean()

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), value


@pytest.mark.libtpu
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_tpu_compiler_agrees(chip: str) -> None:
    """Compute by its own cycles and its peak memory, of a train step that fuses much."""
    args = [f32(2048, 2048)] * 4, f32(16384, 2048)
    plan = autoshard.plan(mlp_step, *args, cluster=f"tpu-{chip}:2x4", solver="dp")
    compiled = plan.verify().compiled
    assert compiled is not None
    assert compiled.compute is not None
    assert compiled.memory is not None
    assert plan.cost.compute_time == pytest.approx(compiled.compute, rel=0.2)
    assert plan.cost.peak_memory == pytest.approx(compiled.memory.peak, rel=0.2)
