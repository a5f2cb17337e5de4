"""Compiled programs are read back as they are: held against jax's own programs on eight devices."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from autoshard import hlo
from autoshard.compiled import KINDS, profile_of
from autoshard.hlo_groups import axes_of, groups
from autoshard.hlo_trips import Scalars, trip_count
from cost_models.cluster import cluster

SIZES = (2, 2, 2)
MESH = Mesh(
    np.array(jax.devices()[:8]).reshape(SIZES), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3
)
CPU = cluster("cpu:8")


def text_of(fn: Callable[..., Any], *args: Any, specs: tuple[P, ...], out: Any = None) -> str:
    shardings = tuple(NamedSharding(MESH, s) for s in specs)
    ends = None if out is None else NamedSharding(MESH, out)
    compiled = jax.jit(fn, in_shardings=shardings, out_shardings=ends).lower(*args).compile()
    return str(compiled.runtime_executable().hlo_modules()[0].to_string())


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("axes", "size"), [(("a",), 2), (("b",), 2), (("a", "c"), 4), (("a", "b", "c"), 8)]
)
def test_a_sum_over_mesh_axes_is_one_all_reduce_along_them(
    axes: tuple[str, ...], size: int
) -> None:
    def total(x: jax.Array) -> jax.Array:
        return x.sum(0)

    found = profile_of(
        hlo.read(text_of(total, f32(16, 64), specs=(P(axes),), out=P())), CPU, SIZES
    ).collectives
    assert [(c.kind, c.nbytes, c.size) for c in found] == [("all_reduce", 256, size)]
    assert found[0].axes == tuple("abc".index(a) for a in axes)
    assert found[0].source.startswith("test_hlo.py:")
    assert "(total)" in found[0].source
    assert found[0].sent == 2 * 256 * (size - 1) / size


@pytest.mark.parametrize("length", [1, 2, 7, 13])
def test_a_collective_in_a_loop_counts_as_often_as_the_loop_runs(length: int) -> None:
    def loop(x: jax.Array, w: jax.Array) -> jax.Array:
        def body(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            y = jax.lax.with_sharding_constraint(c @ w, NamedSharding(MESH, P("a")))
            return jnp.tanh(y), None

        return jax.lax.scan(body, x, None, length=length)[0]

    text = text_of(loop, f32(8, 16), f32(16, 16), specs=(P("a"), P("b")), out=P("a"))
    found = [c for c in profile_of(hlo.read(text), CPU, SIZES).collectives if c.axes == (1,)]
    assert found
    # hoisted out of the loop, or in it each time
    assert {c.trips for c in found} <= {1, length}


# As XLA:TPU writes it: one gather, in a piece that starts it, one in a loop and one that ends it.
ASYNC = """HloModule spread, num_partitions=8

%first (p: f32[8]) -> f32[64] {
  %p = f32[8] parameter(0)
  ROOT %g = f32[64] all-gather(%p), channel_id=15, replica_groups=[1,8]<=[8], dimensions={0}
}

%piece (p: f32[8]) -> f32[64] {
  %p = f32[8] parameter(0)
  ROOT %g = f32[64] all-gather(%p), channel_id=15, replica_groups=[1,8]<=[8], dimensions={0}
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8] get-tuple-element(%t), index=1
  %beside = f32[64] fusion(%x), kind=kLoop, calls=%piece
  ROOT %out = (s32[], f32[8]) tuple(%i, %x)
}

%more (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%last (p: f32[8]) -> f32[64] {
  %p = f32[8] parameter(0)
  ROOT %g = f32[64] all-gather(%p), channel_id=15, replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[64] {
  %x = f32[8] parameter(0)
  %start = f32[64] fusion(%x), kind=kCustom, calls=%first
  %zero = s32[] constant(0)
  %init = (s32[], f32[8]) tuple(%zero, %x)
  %loop = (s32[], f32[8]) while(%init), condition=%more, body=%body, \
backend_config={"known_trip_count":{"n":"12"}}
  %y = f32[8] get-tuple-element(%loop), index=1
  ROOT %done = f32[64] fusion(%y), kind=kCustom, calls=%last
}
"""


def test_a_collective_that_goes_on_beside_a_loop_is_one() -> None:
    found = profile_of(hlo.read(ASYNC), CPU, SIZES).collectives
    assert [(c.kind, c.nbytes, c.trips, c.hidden) for c in found] == [("all_gather", 256, 1, True)]
    nothing = "\n%nothing (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8] parameter(0)\n}\n"
    started_inside = ASYNC.replace("calls=%first", "calls=%nothing") + nothing
    trips = [c.trips for c in profile_of(hlo.read(started_inside), CPU, SIZES).collectives]
    assert trips == [12, 1]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 5), st.integers(0, 30), st.integers(1, 4))
def test_trips_are_computed_as_xla_counts_them(begin: int, length: int, step: int) -> None:
    def loop(x: jax.Array) -> jax.Array:
        def more(c: tuple[jax.Array, jax.Array]) -> jax.Array:
            return c[0] < begin + length

        def body(c: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return c[0] + step, jnp.sin(c[1]) * 2

        return jax.lax.while_loop(more, body, (jnp.int32(begin), x))[1]

    text = jax.jit(loop).lower(f32(8)).compile().as_text() or ""
    module = hlo.read(re.sub(r'"known_trip_count":\{[^}]*\}', '"x":{}', text))
    told = [int(n) for n in re.findall(r'"known_trip_count":\{"n":"(\d+)"', text)]
    if told:  # a loop of one trip or none is no loop any more
        assert told == [-(-length // step)]
        assert trips_in(Scalars(module, module.entry, {})) == told


def trips_in(scalars: Scalars) -> list[int | None]:
    out: list[int | None] = []
    for i in scalars.home.instructions:
        if i.opcode == "while":
            out.append(trip_count(i, scalars))
        elif i.opcode == "call":
            out += trips_in(scalars.inside(i))
    return out


def test_scans_in_scans_multiply() -> None:
    def nested(x: jax.Array, w: jax.Array) -> jax.Array:
        def inner(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            s = jax.lax.with_sharding_constraint(c @ w, NamedSharding(MESH, P()))
            return jax.lax.with_sharding_constraint(
                jnp.tanh(s), NamedSharding(MESH, P(None, "c"))
            ), None

        def outer(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.scan(inner, c, None, length=5)[0] + 1, None

        return jax.lax.scan(outer, x, None, length=3)[0]

    text = text_of(nested, f32(8, 16), f32(16, 16), specs=(P(None, "c"), P("c")))
    for kept in (text, re.sub(r'"known_trip_count":\{[^}]*\}', '"x":{}', text)):
        found = profile_of(hlo.read(kept), CPU, SIZES)
        assert found.unknown_trips == 0
        assert max(c.trips for c in found.collectives) == 15


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("replica_groups={{0,1},{2,3}}, x={}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['x'=2,'y'=2] {'x','y'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['x'=4] {'x':(1)2}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['x'=4] {'x':(2)2}", ((0, 1), (2, 3))),
        ("replica_groups={}", ((0, 1, 2, 3),)),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", ((0, 2), (1, 3))),
    ],
)
def test_groups(text: str, wanted: tuple[tuple[int, ...], ...]) -> None:
    assert groups(text, 4) == wanted


def test_groups_that_are_no_whole_axes_have_none() -> None:
    assert axes_of(((0, 1), (2, 3), (4, 5), (6, 7)), (2, 4)) is None
    assert axes_of(((0, 1, 2, 3), (4, 5, 6, 7)), (2, 4)) == (1,)


def test_a_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.read("nothing of the kind")


def test_every_instruction_of_a_real_program_is_read() -> None:
    def fn(x: jax.Array, w: jax.Array) -> Any:
        return jax.value_and_grad(lambda w: jnp.sum(jax.nn.softmax(x @ w) ** 2))(w)

    text = text_of(fn, f32(16, 32), f32(32, 64), specs=(P("a"), P("b", "c")))
    module = hlo.read(text)
    read = [i for c in module.computations.values() for i in c.instructions]
    lines = [line for line in text.splitlines() if re.match(r"^  (ROOT )?%?[\w.-]+ = ", line)]
    assert len(read) == len(lines)
    wanted = sum(bool(re.search(rf" ({'|'.join(KINDS)})(-start)?\(", line)) for line in lines)
    assert sum(i.opcode.removesuffix("-start") in KINDS for i in read) == wanted > 0
    for i in module.entry.instructions:
        assert f"%{i.name} = {i.type} {i.opcode}(" in text
