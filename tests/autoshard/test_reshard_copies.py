"""What XLA:TPU lays anew around an all-to-all, and what we take the copies to cost."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

import autoshard
from autoshard.hlo import read
from autoshard.targets import target_devices
from cost_models.cluster import cluster
from cost_models.topology import lay
from passes.answer import read_back
from passes.ir.graph import Type
from passes.reshard_copies import Moved, copies, copy_seconds, copying_chip, turned_seconds
from passes.reshard_table import PICO, ReshardTable

CHIP = cluster("tpu-v5e:2x2").chip
MIB = 2**20


def test_blocks_are_laid_anew_where_another_dim_is_outermost() -> None:
    all_three = [(0,), (1,), (2,)]
    found = copies(all_three, all_three, Moved((64, 512, 2048)), (4,))
    assert found.number.tolist() == [[0, 1, 1], [1, 0, 2], [1, 2, 0]]
    assert not found.flat.any()
    # A row on each device: it does not matter where its dim is.
    found = copies(all_three, all_three, Moved((4, 512, 2048)), (4,))
    assert found.number.tolist() == [[0, 0, 1], [0, 0, 2], [1, 2, 0]]
    assert found.flat.any(axis=1).tolist() == [True, False, False]


def test_each_axis_that_moves_is_counted_and_copies_what_a_device_has() -> None:
    found = copies([(0, -1), (1, 2), (-1, -1)], [(1, -1), (2, 1)], Moved((64, 512, 2048)), (4, 2))
    assert found.number.tolist() == [[1, 1], [0, 4], [0, 0]]
    assert found.parts[0].tolist() == [4, 8]


def test_in_vmem_only_narrow_tiles_that_move_take_time() -> None:
    def took(mib: float, width: int, flat: bool) -> float:
        return copy_seconds(CHIP, mib * MIB / width, mib * MIB, flat)

    assert took(8, 4, False) == took(8, 2, True) == 0.0
    assert took(8, 2, False) == pytest.approx(61.5e-6, rel=0.1)  # XLA:TPU's cycles
    assert took(128, 4, False) == took(128, 4, True) == pytest.approx(418e-6, rel=0.05)
    assert took(128, 2, False) == pytest.approx(806e-6, rel=0.05)


def test_a_matrix_has_the_copies_of_each_pair_and_of_the_value() -> None:
    three = ((0,), (1,), (2,))
    links = lay(cluster("tpu-v5e:2x2"), (4,))
    value = Type((64, 8192, 1024), "float32", 32)
    asked = three, three, value.nbytes, 2.0, value.nbytes
    plain = ReshardTable((4,), links).matrix(*asked, value=Moved(value.shape))
    found = ReshardTable((4,), links, copying=CHIP).matrix(*asked, value=Moved(value.shape))
    one = 2 * PICO * copy_seconds(CHIP, value.size / 4, value.nbytes / 4, False)
    assert (found - plain) / one == pytest.approx(np.array([[0, 1, 1], [1, 0, 2], [1, 2, 0]]))


def test_no_other_platform_makes_such_copies() -> None:
    assert copying_chip(cluster("tpu-v6e:2x2")) is not None
    assert copying_chip(cluster("h100:4")) is None
    assert copying_chip(cluster("cpu:4")) is None


def test_tiles_of_picked_rows_are_turned_on_the_side_that_splits_their_columns() -> None:
    all_three = [(0,), (1,), (2,)]
    found = copies(all_three, all_three, Moved((8192, 12, 128), 1000), (4,)).tiles
    assert found.tolist() == [[0, 0, 16384], [0, 0, 16384], [16384, 16384, 0]]
    wide = copies(all_three, all_three, Moved((8192, 12, 512), 1000), (4,)).tiles
    assert not wide.any()  # a row of 128 columns fills the lanes


def test_rows_of_a_huge_table_are_laid_into_tiles_besides() -> None:
    small, huge, full = ((8192, 4, 128), 1000), ((8192, 4, 128), 2**20), ((8192, 8, 128), 2**20)
    took = [turned_seconds(CHIP, Moved(*value), 8192) for value in (small, huge, full)]
    assert took[0] == took[2] < took[1]


def two_products(x: Any, w: Any) -> Any:
    y = autoshard.annotate(jnp.einsum("bsm,mn->bsn", x, w), None, "x", None)
    return autoshard.annotate(jnp.einsum("bsn,nm->bsm", jnp.tanh(y), w.T), "x", None, None)


def test_a_plan_counts_them_as_compute_as_the_solver_did() -> None:
    x = jax.ShapeDtypeStruct((64, 8192, 1024), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    hints = {"x": jax.P(None, "x", None)}
    plan = autoshard.plan(two_products, x, w, cluster="v5e:2x2", mesh={"x": 4}, hints=hints)
    found = plan._found
    assert found is not None
    answer = read_back(found.priced, found.solution.choice)
    copied = sum(c.copied * c.trips for c in answer.changes)
    assert copied == pytest.approx(copy_seconds(CHIP, x.size / 4, x.size / 2, False))
    problem = found.priced.problem
    solved = problem.cost(found.solution.choice) / PICO + found.priced.constant
    assert plan.cost.step_time == pytest.approx(solved, rel=1e-3)
    assert plan.cost.compute_time == sum(answer.seconds) > copied


@pytest.mark.libtpu
@pytest.mark.parametrize("chip", ["tpu-v5e:2x2", "tpu-v6e:2x2"])
def test_copies_take_what_the_compiler_says(chip: str) -> None:
    here = cluster(chip)
    mesh = Mesh(np.array(target_devices(here)), ("x",))
    shape, pairs = (64, 16384, 256), [(0, 1), (1, 0), (1, 2)]

    def at(dim: int) -> NamedSharding:
        return NamedSharding(mesh, jax.P(*("x" if d == dim else None for d in range(3))))

    def every(x: Any, w: Any) -> list[Any]:
        """A product on both sides of each all-to-all."""
        out = []
        for k, (d, e) in enumerate(pairs):
            with jax.named_scope(f"from_{d}_to_{e}"):
                y = jax.lax.with_sharding_constraint(jnp.einsum("bsm,mn->bsn", x[k], w), at(d))
                y = jax.lax.with_sharding_constraint(y, at(e))
                out.append(jnp.einsum("bsn,nm->bsm", y, w))
        return out

    xs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=at(d)) for d, _ in pairs]
    w = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, jax.P()))
    entry = read(jax.jit(every).lower(xs, w).compile().as_text()).entry
    rate = float(here.compiler["clock_rate_ghz"]) * 1e9
    for d, e in pairs:
        laid = [i for i in entry.instructions if f"from_{d}_to_{e}/" in i.op_name]
        laid = [i for i in laid if i.op_name.endswith("sharding_constraint")]
        found = copies([(d,)], [(e,)], Moved(shape), (4,))
        one = copy_seconds(here.chip, np.prod(shape) / 4, np.prod(shape) / 2, False)
        wanted = int(found.number[0, 0]) * one
        assert sum(i.cycles or 0 for i in laid) / rate == pytest.approx(wanted, rel=0.25)


@pytest.mark.libtpu
@pytest.mark.parametrize("rows", [100_000, 1_000_000])
def test_tiles_of_picked_rows_take_what_the_compiler_says(rows: int) -> None:
    here = cluster("tpu-v5e:2x2")
    mesh = Mesh(np.array(target_devices(here)), ("x",))

    def asked(x: Any, *parts: str | None) -> Any:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, jax.P(*parts)))

    def bags(table: Any, ids: Any) -> Any:
        """Of a table that is split by columns, for devices that have the cases split."""
        picked = asked(asked(table[ids], None, None, "x"), "x", None, None)
        return jnp.sum(picked.sum(axis=1) ** 2)

    shape, whole = (65536, 4, 128), NamedSharding(mesh, jax.P("x"))
    table = jax.ShapeDtypeStruct(
        (rows, 128), jnp.float32, sharding=NamedSharding(mesh, jax.P(None, "x"))
    )
    ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=whole)
    entry = read(jax.jit(bags).lower(table, ids).compile().as_text()).entry
    laid = [i for i in entry.instructions if i.opcode == "copy" and "65536,4" not in i.type]
    laid = [i for i in laid if i.op_name.endswith(("sharding_constraint", "gather"))]
    value = Moved(shape, rows)
    (tiles,) = copies([(2,)], [(0,)], value, (4,)).tiles[0]
    rate = float(here.compiler["clock_rate_ghz"]) * 1e9
    found = sum(i.cycles or 0 for i in laid) / rate
    assert turned_seconds(here.chip, value, int(tiles)) == pytest.approx(found, rel=0.25)
