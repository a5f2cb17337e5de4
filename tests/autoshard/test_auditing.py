"""A function that the user has sharded is compiled as it is, for other devices than it names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from autoshard.auditing import audit
from autoshard.retarget import NotSharded

MESH = Mesh(
    np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2
)


def named(*spec: Any) -> NamedSharding:
    return NamedSharding(MESH, P(*spec))


def f32(*shape: int, at: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


def test_shardings_of_the_arguments() -> None:
    args = f32(16, 64, at=named("data", "model")), f32(64, 32, at=named("model"))
    found = audit(jax.jit(product), *args, cluster="cpu:8")
    assert found.mesh == (("data", 2), ("model", 4))
    assert found.compiled is not None
    assert {(c.kind, c.axes) for c in found.compiled.collectives} == {("all_reduce", (1,))}
    assert "(product)" in found.compiled.collectives[0].source
    assert "test_auditing.py" in str(found)
    assert found.fits


def test_shardings_of_jit_and_constraints_inside_a_scan() -> None:
    def loop(x: jax.Array, ws: jax.Array) -> jax.Array:
        def body(c: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            h = jax.lax.with_sharding_constraint(jnp.tanh(c @ w), named("data", "model"))
            return jax.lax.with_sharding_constraint(h, named("data", None)), None

        return jax.lax.scan(body, x, ws)[0]

    jitted = jax.jit(
        loop,
        in_shardings=(named("data"), named(None, None, "model")),
        out_shardings=named("data"),
        donate_argnums=0,
    )
    found = audit(jitted, f32(16, 64), f32(5, 64, 64), cluster="cpu:8")
    assert found.compiled is not None
    gathers = [c for c in found.compiled.collectives if c.kind == "all_gather" and c.axes == (1,)]
    assert sum(c.trips for c in gathers) == 5
    assert found.compiled.memory is not None
    assert found.compiled.memory.aliased > 0


def test_what_stands_in_a_shard_map() -> None:
    def local(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "model")

    mapped = jax.shard_map(local, mesh=MESH, in_specs=P("data", "model"), out_specs=P("data"))
    found = audit(mapped, f32(16, 64), cluster="cpu:8")
    assert found.compiled is not None
    assert [(c.kind, c.size) for c in found.compiled.collectives] == [("all_reduce", 4)]


def test_a_function_that_names_no_mesh_is_refused() -> None:
    with pytest.raises(NotSharded, match="names no mesh"):
        audit(jax.jit(product), f32(16, 64), f32(64, 32), cluster="cpu:8")


def test_shardings_of_jit_hold_beside_a_constant_that_it_closes_over() -> None:
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)

    def fn(x: jax.Array) -> jax.Array:
        return (x @ weights).sum(0)

    found = audit(jax.jit(fn, in_shardings=named("data")), f32(16, 64), cluster="cpu:8")
    assert found.compiled is not None
    assert [(c.kind, c.axes) for c in found.compiled.collectives] == [("all_reduce", (0,))]


def test_a_mesh_of_another_size_is_refused() -> None:
    args = f32(16, 64, at=named("data", "model")), f32(64, 32)
    with pytest.raises(NotSharded, match="do not each have the cluster's 4 devices"):
        audit(product, *args, cluster="cpu:4")


@pytest.mark.libtpu
def test_a_program_written_on_cpu_devices_is_asked_of_the_tpu_compiler() -> None:
    args = f32(512, 2048, at=named("data", "model")), f32(2048, 512, at=named("model"))
    found = audit(jax.jit(product), *args, cluster="tpu-v5e:2x4")
    assert found.compiled is not None
    assert found.compiled.compute is not None
    assert found.compiled.compute > 0
    assert found.compiled.step is not None
    assert found.compiled.step > found.compiled.compute
    assert "all_reduce" in str(found) or "reduce_scatter" in str(found)
