"""An operation's numbers are right however it is split, and however its operands and results are.

Single operations, in strategies and shardings drawn at random. Those for which XLA's partitioner is
wrong in some of them (`autoshard.island` tells which) come in many forms.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from autoshard.bound_plan import Plan, traced_for
from autoshard.same_numbers import difference
from cost_models.cluster import cluster
from passes.assemble import assemble
from passes.decisions import decide
from passes.fitting import fixed
from passes.fusion import fuse
from passes.ir.graph import Graph
from passes.ir.mesh import Mesh
from passes.liveness import liveness
from passes.price import price
from passes.priced import Priced
from passes.solve.problem import INFINITY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_a_hurry")]

MESH = Mesh(("a", "b", "c"), (2, 2, 2))
RNG = np.random.default_rng(6)


def f32(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def convolution(groups: int, stride: int) -> Callable[..., Any]:
    def run(x: Any, w: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    return run


def convolutions() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    out: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    for name, groups, stride in (
        ("plain", 1, 1), ("strided", 1, 2), ("grouped", 4, 1), ("depthwise", 16, 1),
    ):  # fmt: skip
        run = convolution(groups, stride)
        x, w = f32(8, 8, 8, 16), f32(3, 3, 16 // groups, 16)
        out[f"{name} convolution"] = run, (x, w)

        def to_weights(x: Any, g: Any, run: Any = run, w: Any = w) -> Any:
            return jax.vjp(lambda w: run(x, w), w)[1](g)[0]

        def to_picture(w: Any, g: Any, run: Any = run, x: Any = x) -> Any:
            return jax.vjp(lambda x: run(x, w), x)[1](g)[0]

        g = f32(8, 8 // stride, 8 // stride, 16)
        out[f"{name} convolution, to the weights"] = to_weights, (x, g)
        out[f"{name} convolution, to the picture"] = to_picture, (w, g)
    return out


def single_scatters() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    x, row = f32(8, 8, 4), f32(8, 4)
    out: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        f"one row, {op}": (lambda x, u, i, op=op: getattr(x.at[i], op)(u), (x, row, np.int32(3)))
        for op in ("set", "add", "subtract", "multiply", "min", "max")
    }
    for mode in ("clip", "drop"):
        for i in (-1, 7, 100):
            out[f"row {i}, {mode}"] = (
                lambda x, u, i, mode=mode: x.at[i].set(u, mode=mode),
                (x, row, np.int32(i)),
            )
    out["one column"] = lambda x, u, i: x.at[:, i].add(u), (x, f32(8, 4), np.uint8(5))
    out["one line"] = lambda x, u, i: x.at[i, :, i % 4].set(u), (x, f32(8), np.int32(6))
    return out


ROWS = np.array([3, 1, 7, 0], np.int32)
CASES = {
    **convolutions(),
    **single_scatters(),
    "Fourier transform": (lambda x: jnp.fft.fft(x.swapaxes(0, 1)).real, (f32(8, 8, 8),)),
    "product": (lambda x, w: jnp.einsum("bik,bkj->bij", x, w), (f32(8, 8, 8), f32(8, 8, 8))),
    "rows added": (lambda x, u, i: x.at[i].add(u), (f32(8, 8, 4), f32(4, 8, 4), ROWS)),
    "rows found": (lambda x, i: x[i], (f32(8, 8, 4), ROWS)),
    "running sum": (lambda x: jnp.cumsum(x, 1), (f32(8, 8, 4),)),
    "sort": (lambda x: jnp.sort(x, 1), (f32(8, 8, 4),)),
    "no elements": (lambda x: x.reshape(4, 0) + 1, (np.zeros((0, 4), np.float32),)),
    "xor": (lambda x: lax.reduce_xor(x, (1,)), (RNG.integers(0, 99, (8, 8)).astype(np.int32),)),
    "maximum's place": (lambda x: jnp.argmax(x, 1), (f32(8, 8, 4),)),
}


def some_choice(priced: Priced, rng: random.Random) -> list[int]:
    """Each node in turn takes any choice that its neighbours allow, the operation's own first."""
    nodes, edges = priced.problem.nodes, priced.problem.edges
    around: list[list[tuple[int, Any]]] = [[] for _ in nodes]
    for edge in edges:
        around[edge.u].append((edge.v, edge.costs))
        around[edge.v].append((edge.u, edge.costs.T))
    choice = [int(n.costs.argmin()) for n in nodes]
    own = [k for k, m in enumerate(priced.meanings) if m.kind == "op"]
    for node in own:
        choice[node] = rng.randrange(len(nodes[node].costs))
    others = [k for k in range(len(nodes)) if k not in own] * 2
    rng.shuffle(others)
    for node in others:
        total = nodes[node].costs + sum(c[:, choice[o]] for o, c in around[node])
        allowed = np.flatnonzero(total < INFINITY)
        if len(allowed):
            choice[node] = int(rng.choice(list(allowed)))
    return choice


def price_all(graph: Graph) -> Priced:
    fusion = fuse(graph, "cpu")
    live = liveness(graph, fusion.stored)
    return price(graph, MESH, cluster("cpu:8"), decide(graph), live, fusion, None)


@pytest.mark.parametrize("name", CASES)
def test_same_numbers(name: str) -> None:
    fn, args = CASES[name]
    traced = traced_for(fn, args, {}, {})
    graph = traced.graph
    priced = price_all(graph)
    expected = np.asarray(jax.jit(fn)(*args))
    rng, tried = random.Random(name), 0
    while tried < (5 if "convolution" in name or "row" in name else 3):
        choice = some_choice(priced, rng)
        if priced.problem.cost(choice) >= INFINITY:
            continue
        tried += 1
        data = assemble(priced, fixed(priced.problem, choice), "random", math.inf)
        got = np.asarray(Plan(data, traced).compile()(*args))
        assert difference(got, expected) < 1e-4, data.ops
