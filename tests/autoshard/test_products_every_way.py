"""A product's numbers are right in whichever way it is split and whichever sharding it is kept in.

XLA's partitioner is wrong for some of them when asked for all at once (`passes.constraints` tells
which), so those are all tried here, and some of the others.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoshard.bound_plan import Plan, traced_for
from autoshard.trace import Traced
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

pytestmark = pytest.mark.usefixtures("in_a_hurry")

MESH = Mesh(("a", "b", "c"), (2, 2, 2))
RNG = np.random.default_rng(5)
X, W = (RNG.integers(0, 7, (8, 8, 8)).astype(np.float32) for _ in range(2))
BATCH, ROWS, COLUMNS, NOWHERE = 0, 1, 2, -1  # dims of the result
SUM = "k"


def product(x: Any, w: Any) -> Any:
    return jnp.einsum("bik,bkj->bij", x, w)


EXPECTED = np.einsum("bik,bkj->bij", X, W)


def price_all(graph: Graph) -> Priced:
    fusion = fuse(graph, "cpu")
    live = liveness(graph, fusion.stored)
    return price(graph, MESH, cluster("cpu:8"), decide(graph), live, fusion, None)


@pytest.fixture(scope="module")
def priced() -> tuple[Traced, Priced]:
    traced = traced_for(product, (X, W), {}, {})
    graph = traced.graph
    return traced, price_all(graph)


def choice_of(priced: Priced, made: tuple[Any, ...], kept: tuple[int, ...]) -> list[int]:
    """The product split as `made` (dims of the result, or SUM), its result kept as `kept`."""
    (op,) = [op for op in priced.graph.ops if op.name == "dot_general"]
    factor_of = {d: op.rule.results[0][d][0] for d in (BATCH, ROWS, COLUMNS)}
    (summed,) = [i for i, f in enumerate(op.rule.factors) if f.kind == "reduction"]
    strategy = tuple(summed if e == SUM else factor_of.get(e, NOWHERE) for e in made)
    group = priced.decisions.group_of[op.outputs[0]]
    choice = [0] * len(priced.meanings)
    for node, meaning in enumerate(priced.meanings):
        if meaning.kind == "op" and meaning.index == op.id:
            choice[node] = meaning.choices.index(strategy)
        elif meaning.kind == "group" and meaning.index == group:
            choice[node] = meaning.choices.index(kept)
    return choice


def wrong_at_once() -> list[tuple[Any, Any]]:
    """Two sums, one of them scattered over the batch dim, which the third axis splits."""
    out: list[tuple[Any, Any]] = []
    for batch in range(3):
        for scattered, other in itertools.permutations({0, 1, 2} - {batch}):
            for rest in (ROWS, COLUMNS, NOWHERE):
                kept = {batch: BATCH, scattered: BATCH, other: rest}
                made = tuple(BATCH if a == batch else SUM for a in range(3))
                out.append((made, tuple(kept[a] for a in range(3))))
    return out


# A sum and a change from columns to rows.
CASES = [*wrong_at_once(), ((ROWS, SUM, COLUMNS), (ROWS, COLUMNS, ROWS))]


def some_others(count: int = 20) -> list[tuple[Any, Any]]:
    made = itertools.product((BATCH, ROWS, COLUMNS, SUM, NOWHERE), repeat=3)
    kept = itertools.product((BATCH, ROWS, COLUMNS, NOWHERE), repeat=3)
    pairs = [(m, k) for m, k in itertools.product(made, kept) if SUM in m]
    return random.Random(1).sample(pairs, count)


@pytest.mark.parametrize(("made", "kept"), [*CASES, *some_others()], ids=str)
def test_same_numbers(priced: tuple[Traced, Priced], made: Any, kept: Any) -> None:
    traced, problem = priced
    choice = choice_of(problem, made, kept)
    assert problem.problem.cost(choice) < INFINITY
    data = assemble(problem, fixed(problem.problem, choice), "chosen", math.inf)
    assert np.array_equal(Plan(data, traced).compile()(X, W), EXPECTED)


def test_the_partitioner_alone_is_wrong() -> None:
    """Were this no longer so, the lowering could ask for one sharding less."""
    if not jax.__version__.startswith("0.10."):
        pytest.skip("seen with jax 0.10")
    names, (made, kept) = MESH.names, CASES[-1]
    devices = jax.make_mesh((2, 2, 2), names, axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def split(dims: tuple[Any, ...], axes: tuple[Any, ...]) -> jax.NamedSharding:
        entries = [tuple(n for n, e in zip(names, axes, strict=True) if e == d) for d in dims]
        return jax.NamedSharding(devices, jax.P(*(e or None for e in entries)))

    ins = split((BATCH, ROWS, SUM), made), split((BATCH, SUM, COLUMNS), made)
    out = split((BATCH, ROWS, COLUMNS), kept)
    got = jax.jit(product, in_shardings=ins, out_shardings=out)(X, W)
    assert not np.array_equal(got, EXPECTED)
