"""The same sharded program, for other devices: every mesh in it is replaced by one of like axes.

A jitted function names the devices that it was written on, in its shardings. To ask another
cluster's compiler about it, its jaxpr is taken, and each mesh in it laid on the other devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import Mesh as DeviceMesh

from autoshard.jax_compat import is_jaxpr, open_jaxpr
from autoshard.mesh import device_mesh, lowering_platform
from passes.ir.mesh import Mesh


class NotSharded(ValueError):
    """A function that names no mesh, or meshes of several sizes."""


def lowered_for(
    fn: Callable[..., Any], args: Sequence[Any], devices: Sequence[Any]
) -> tuple[jax.stages.Lowered, tuple[tuple[str, int], ...]]:
    """The program of a sharded function for these devices, and the axes of its largest mesh.

    Shardings are those of its own `in_shardings` and `out_shardings`, of its arguments, and of the
    constraints inside. Raises NotSharded.
    """
    whole = traced_as_it_is(fn, args)
    outer, _ = open_jaxpr(whole)
    given = [getattr(x, "sharding", None) for x in jax.tree.leaves(args)]
    meshes = {m: None for m in _meshes(outer, given)}
    largest = max(meshes, key=lambda m: m.size, default=None)
    if largest is None or largest.size == 1:
        raise NotSharded(
            "this function names no mesh: give it in_shardings, arguments with a NamedSharding, "
            "or constraints inside; or let autoshard plan it"
        )
    if any(m.size not in (1, len(devices)) for m in meshes):
        sizes = ", ".join(sorted(str(dict(m.shape)) for m in meshes))
        raise NotSharded(
            f"the meshes {sizes} do not each have the cluster's {len(devices)} devices"
        )
    moved = _Moved(devices)
    eqn = outer.eqns[-1]
    jitted = len(outer.eqns) == 1 and "in_shardings" in eqn.params
    own = dict(zip(eqn.invars, eqn.params["in_shardings"], strict=True)) if jitted else {}
    ins = [_named(own.get(v)) or _named(g) for v, g in zip(outer.invars, given, strict=True)]
    outs = [_named(o) for o in eqn.params["out_shardings"]] if jitted else None
    gone = zip(eqn.invars, eqn.params["donated_invars"], strict=True) if jitted else ()
    donated = {v for v, given_away in gone if given_away}
    staged = jax.jit(
        jaxpr_as_fun(_changed(whole, moved.anything)),
        in_shardings=tuple(moved.sharding(s) for s in ins),
        out_shardings=None if outs is None else [moved.sharding(s) for s in outs],
        donate_argnums=tuple(k for k, v in enumerate(outer.invars) if v in donated),
    ).trace(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in outer.invars))
    lowered: jax.stages.Lowered = staged.lower(lowering_platforms=(lowering_platform(devices[0]),))
    return lowered, tuple(largest.shape.items())


def traced_as_it_is(fn: Callable[..., Any], args: Sequence[Any]) -> Any:
    """The jaxpr of a jitted function, its shardings on the one equation that it has."""
    return jax.make_jaxpr(fn if hasattr(fn, "lower") else jax.jit(fn))(*args)


def _named(x: Any) -> NamedSharding | None:
    return x if isinstance(x, NamedSharding) else None


def _meshes(jaxpr: Any, given: Sequence[Any]) -> list[Any]:
    """All meshes that a jaxpr and these shardings name."""
    out: list[Any] = []

    def look(x: Any) -> Any:
        if isinstance(x, NamedSharding):
            x = x.mesh
        if isinstance(x, DeviceMesh | AbstractMesh) and x.axis_names:
            out.append(x)
        return x

    for g in given:
        look(g)
    _changed(jaxpr, look)
    return out


def _changed(x: Any, change: Callable[[Any], Any]) -> Any:
    """A jaxpr, or a parameter of an equation, with all shardings and meshes in it changed."""
    if isinstance(x, NamedSharding | DeviceMesh | AbstractMesh):
        return change(x)
    if isinstance(x, tuple | list):
        return type(x)(_changed(y, change) for y in x) if type(x) in (tuple, list) else x
    if not is_jaxpr(x):
        return x
    inner, _ = open_jaxpr(x)
    eqns = [
        e.replace(params={k: _changed(v, change) for k, v in e.params.items()}) for e in inner.eqns
    ]
    if inner is x:
        return x.replace(eqns=eqns)
    return x.replace(jaxpr=inner.replace(eqns=eqns))


class _Moved:
    """Meshes and shardings on other devices."""

    def __init__(self, devices: Sequence[Any]) -> None:
        self.devices = devices
        self.known: dict[Any, DeviceMesh] = {}

    def mesh(self, old: DeviceMesh | AbstractMesh) -> DeviceMesh:
        key = old.axis_names, tuple(old.shape.values()), tuple(old.axis_types)
        if key not in self.known:
            names = tuple(map(str, old.axis_names))
            laid = device_mesh(Mesh(names, key[1]), self.devices)
            self.known[key] = DeviceMesh(laid.devices, old.axis_names, axis_types=old.axis_types)
        return self.known[key]

    def sharding(self, old: NamedSharding | None) -> NamedSharding | None:
        return None if old is None else NamedSharding(self.mesh(old.mesh), old.spec)

    def anything(self, x: Any) -> Any:
        if isinstance(x, NamedSharding):
            return self.sharding(x)
        if not isinstance(x, DeviceMesh | AbstractMesh) or not x.axis_names:
            return x
        return self.mesh(x) if isinstance(x, DeviceMesh) else self.mesh(x).abstract_mesh
