"""Which arrays lie on the stages in pieces?  Those of stacked layers: each stage has its own.

Where scans over layers are cut (`autoshard.scan_pieces`), a stage takes a slice of a stacked
argument, and a stacked result is put together of what the stages have updated. Neither is computed:
a slice goes to the stage that needs it, and a result stays where its pieces are (`put_together`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from autoshard.stacked_array import StackedArray
from autoshard.time_loop import Equation, Program

STAGE = "stage"  # the mesh axis over all stages


@dataclass(frozen=True)
class Cut:
    """Some of the leading dim of an argument, which is at this place."""

    argument: int
    begin: int
    end: int


@dataclass(frozen=True)
class Stacked:
    """cuts: by place, slices of arguments. joins: by place, what a result is put together of."""

    cuts: Mapping[int, Cut]
    joins: Mapping[int, tuple[int, ...]]

    def skips(self, e: Equation) -> bool:
        """Whether an equation is one of these."""
        return e.outs[0] in self.cuts or e.outs[0] in self.joins


def stacked(program: Program) -> Stacked:
    """The slices of arguments and the results in pieces of a program."""
    arguments, results = set(program.inputs), set(program.outputs_placed())
    cuts: dict[int, Cut] = {}
    joins: dict[int, tuple[int, ...]] = {}
    read = {p for e in program.equations for p in e.ins if isinstance(p, int)}
    for e in program.equations:
        if e.eqn is None or e.phase == "loop":
            continue
        name, params = e.eqn.primitive.name, e.eqn.params
        if name == "slice" and e.ins[0] in arguments and not _strided(params):
            whole = program.avals[e.ins[0]].shape
            first, last = params["start_indices"], params["limit_indices"]
            if not any(first[1:]) and tuple(last[1:]) == tuple(whole[1:]):
                cuts[e.outs[0]] = Cut(e.ins[0], first[0], last[0])
        stacks = name == "concatenate" and params["dimension"] == 0
        if stacks and e.outs[0] in results - read and all(isinstance(p, int) for p in e.ins):
            joins[e.outs[0]] = e.ins
    return Stacked(cuts, joins)


def donated_places(program: Program, donated: Sequence[bool], found: Stacked) -> frozenset[int]:
    """Places of donated arguments, and of slices of these. donated: by argument."""
    given = {p for p, flag in zip(program.inputs, donated, strict=True) if flag}
    return frozenset(given | {p for p, cut in found.cuts.items() if cut.argument in given})


def piece(x: Any, cut: Cut, sharding: jax.NamedSharding) -> Any:
    """A slice of an argument, where it is needed; as it is where it lies there already."""
    if isinstance(x, StackedArray):
        return jax.device_put(x.part(cut.begin, cut.end), sharding)
    if isinstance(x, jax.Array) and isinstance(x.sharding, jax.NamedSharding):
        wanted = sharding.addressable_devices
        lying = {s.device: s for s in x.addressable_shards if s.device in wanted}
        fits = len(lying) == len(wanted) and all(
            s.index[0] == slice(cut.begin, cut.end) for s in lying.values()
        )
        shape = (cut.end - cut.begin, *x.shape[1:])
        if fits and all(lying[d].data.shape == sharding.shard_shape(shape) for d in wanted):
            index = sharding.devices_indices_map(shape)
            if all(lying[d].index[1:] == index[d][1:] for d in wanted):
                parts = [lying[d].data for d in sharding.mesh.devices.flat]
                return jax.make_array_from_single_device_arrays(shape, sharding, parts)
    return jax.device_put(x[cut.begin : cut.end], sharding)


def put_together(parts: Sequence[jax.Array]) -> jax.Array | StackedArray:
    """Pieces, each on the devices of its stage, as one array; nothing is moved.

    One over the devices of all stages, where each stage has one piece, and these are as long as one
    another and split alike; else a StackedArray.
    """
    shardings = [x.sharding for x in parts if isinstance(x.sharding, jax.NamedSharding)]
    devices = [d for s in shardings for d in s.mesh.devices.flat]
    forms = {(x.shape, s.spec, s.mesh.devices.shape) for x, s in zip(parts, shardings, strict=True)}
    spec = tuple(shardings[0].spec)
    if len(set(devices)) < len(devices) or len(forms) > 1 or (spec and spec[0] is not None):
        return StackedArray(tuple(parts))
    meshes = np.stack([s.mesh.devices for s in shardings])
    mesh = jax.sharding.Mesh(meshes, (STAGE, *shardings[0].mesh.axis_names))
    whole = jax.NamedSharding(mesh, jax.P(STAGE, *spec[1:]))
    shape = (sum(x.shape[0] for x in parts), *parts[0].shape[1:])
    lying = {s.device: s.data for x in parts for s in x.addressable_shards}
    parts_of_all = [lying[d] for d in mesh.devices.flat]
    return jax.make_array_from_single_device_arrays(shape, whole, parts_of_all)


def _strided(params: Mapping[str, Any]) -> bool:
    return any(s != 1 for s in params["strides"] or ())
