"""Who fills the zeros that a table's gradient is added to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from autoshard.hlo import read
from autoshard.targets import target_devices
from autoshard.trace import trace
from cost_models.cluster import cluster
from passes.op_seconds import op_seconds
from passes.zeros import added_to, filled_inside

WIDTH = 128


def step(table: Any, ids: Any, w: Any) -> Any:
    """One of gradient descent on a table."""
    return table - 0.1 * jax.grad(lambda t: jnp.sum(jnp.tanh(t[ids]) * w))(table)


def arguments(rows: int, added: int) -> tuple[Any, Any, Any]:
    return (
        jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((added,), jnp.int32),
        jax.ShapeDtypeStruct((added, WIDTH), jnp.float32),
    )


def priced(rows: int, added: int) -> dict[str, float]:
    graph = trace(step, *arguments(rows, added)).graph
    seconds = op_seconds(graph, cluster("tpu-v6e:1x1"))
    names = ("gather", "scatter-add", "broadcast_in_dim")
    return {
        name: sum(s for s, op in zip(seconds, graph.ops, strict=True) if op.name == name)
        for name in names
    }


def test_zeros_are_found_by_the_scatter_that_adds_to_them() -> None:
    graph = trace(step, *arguments(4096, 256)).graph
    ((fill, add),) = added_to(graph).items()
    assert (graph.ops[fill].name, graph.ops[add].name) == ("broadcast_in_dim", "scatter-add")
    assert not added_to(trace(lambda t, i: t.at[i].add(1.0), *arguments(64, 8)[:2]).graph)


def test_picking_rows_takes_the_time_of_the_rows_however_large_their_table_is() -> None:
    small, large = priced(2**17, 8192), priced(2**20, 8192)
    assert small["gather"] == pytest.approx(large["gather"])


def test_a_kernel_of_its_own_fills_what_few_rows_are_added_to() -> None:
    few, many = priced(2**16, 8192), priced(2**16, 10240)
    assert few["scatter-add"] > 2 * many["scatter-add"]
    assert few["broadcast_in_dim"] == pytest.approx(many["broadcast_in_dim"], rel=0.01)


@pytest.mark.parametrize("first", [True, False])
def test_what_is_added_to_zeros_and_what_is_not_are_told_apart(first: bool) -> None:
    def both(table: Any, ids: Any, rows: Any) -> Any:
        targets = (jnp.zeros_like(table), table) if first else (table, jnp.zeros_like(table))
        return [t.at[ids].add(rows) for t in targets]

    graph = trace(both, *arguments(2**16, 8192)).graph
    seconds = op_seconds(graph, cluster("tpu-v6e:1x1"))
    adds = [s for s, op in zip(seconds, graph.ops, strict=True) if op.name == "scatter-add"]
    assert max(adds) > 2 * min(adds)
    assert (adds[0] > adds[1]) == first


@pytest.mark.libtpu
@pytest.mark.parametrize("chip", ["v5e:1x1", "v6e:1x1"])
@pytest.mark.parametrize(
    ("rows", "added"), [(2**16, 2**13), (2**16, 10240), (30000, 256), (40000, 2048)]
)
def test_the_compiler_fills_them_where_we_say(chip: str, rows: int, added: int) -> None:
    (device,) = target_devices(cluster(f"tpu-{chip}"))
    at = jax.sharding.SingleDeviceSharding(device)
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at) for a in arguments(rows, added)]
    compiled = jax.jit(step).lower(*args).compile()
    module = read(compiled.runtime_executable().hlo_modules()[0].to_string())
    apart = [i for i in module.entry.instructions if i.opcode == "broadcast"]
    fitted = cluster(f"tpu-{chip}").chip.fitted
    assert fitted is not None
    assert filled_inside((rows, WIDTH), 32, added, fitted.filled_inside) == (not apart)
