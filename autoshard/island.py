"""Which operations does XLA's partitioner get wrong, and how are they split without it?

Seen with jax 0.10.2:
* a convolution whose space is split, or that has batch groups (the gradient of a grouped one's
  weights), comes out too large by the number of devices along any other mesh axis: the partitioner
  adds up what all of them have;
* a scatter of a single update to an array split there writes to wrong places: a device that does
  not hold the place writes back what it holds, and reads that from the array before it was split;
* a convolution that one axis splits along one of its dims and another along another (the batch and
  the features) is computed from whole operands, which all devices gather;
* a Fourier transform of what was resharded has a layout that XLA's CPU backend refuses.
Such an operation is emitted as a `shard_map` over these other axes, in which each device works on
its own piece, as the rule says. Axes that split space stay with the partitioner, which sees no
others then.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autoshard.jax_compat import bind
from autoshard.localize import local_params
from autoshard.mesh import partition_spec
from passes.ir.graph import Op
from passes.ir.mesh import Mesh as PlannedMesh
from passes.ir.rule import Rule
from passes.ir.sharding import BROADCAST, PARTIAL, Sharding
from passes.strategies import NOWHERE, Axes, Strategy, operand_axes, result_axes

__all__ = ["island", "needs_island"]


def needs_island(eqn: Any) -> bool:
    """Whether the partitioner is not to be trusted with this equation."""
    name = eqn.primitive.name
    return name in ("fft", "conv_general_dilated") or _is_single_scatter(eqn)


def _is_single_scatter(eqn: Any) -> bool:
    """Whether one update is scattered, to one place: no dim of it counts updates."""
    if eqn.primitive.name not in _COMBINED:
        return False
    numbers = eqn.params["dimension_numbers"]
    return len(numbers.update_window_dims) == len(eqn.invars[2].aval.shape)


def island(
    eqn: Any,
    op: Op,
    planned: Sequence[tuple[str, str]],
    operands: Sequence[Any],
    mesh: PlannedMesh,
    devices: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> list[Any]:
    """The equation's results. planned: mesh axis to factor name."""
    strategy = _strategy_of(op.rule, planned, mesh)
    space = _spatial_factors(eqn, op.rule)
    auto = frozenset(n for n, f in zip(mesh.names, strategy, strict=True) if f in space)
    manual = frozenset(mesh.names) - auto
    plain = op.name == "conv_general_dilated" and eqn.params["batch_group_count"] == 1
    along_one = len({f for f in strategy if f != NOWHERE}) == 1
    if not planned or not manual or (plain and not auto and along_one):
        return bind(eqn, operands)
    ins = [operand_axes(op.rule, k, strategy, mesh.sizes) for k in range(len(operands))]
    outs = [result_axes(op.rule, k, strategy, mesh.sizes) for k in range(len(eqn.outvars))]
    shapes = [v.aval.shape for v in eqn.invars]
    results = [v.aval.shape for v in eqn.outvars]
    made = [_piece(s, a, mesh, manual) for s, a in zip(results, outs, strict=True)]

    def specs(tensors: Sequence[Axes], of: Sequence[tuple[int, ...]], axes: Set[str]) -> list[Any]:
        return [_spec(a, len(s), mesh, axes) for a, s in zip(tensors, of, strict=True)]

    def kept(xs: Sequence[Any], tensors: Sequence[Axes]) -> list[Any]:
        """As the axes that stay with the partitioner split them."""
        if not auto:
            return list(xs)
        split = specs(tensors, [x.shape for x in xs], auto)
        return [lax.with_sharding_constraint(x, p) for x, p in zip(xs, split, strict=True)]

    def one_device(*pieces: Any) -> list[Any]:
        local = [x.shape for x in pieces]
        params = local_params(eqn.primitive.name, eqn.params, shapes, local, made)
        if op.name in _COMBINED:
            return _written(eqn, pieces, params, ins[0], mesh)
        found = kept(bind(eqn, kept(pieces, ins), dict(params)), outs)
        return [
            lax.psum(x, summed) if (summed := _sums(axes, mesh, manual)) else x
            for x, axes in zip(found, outs, strict=True)
        ]

    return list(
        jax.shard_map(
            one_device,
            mesh=devices,
            in_specs=tuple(specs(ins, shapes, manual)),
            out_specs=specs(outs, results, manual),
            axis_names=manual,
            check_vma=False,
        )(*operands)
    )


def _spatial_factors(eqn: Any, rule: Rule) -> frozenset[int]:
    """The factors of a convolution's spatial dims."""
    if eqn.primitive.name != "conv_general_dilated":
        return frozenset()
    numbers = eqn.params["dimension_numbers"]
    sides = (
        (rule.operands[0], numbers.lhs_spec),
        (rule.operands[1], numbers.rhs_spec),
        (rule.results[0], numbers.out_spec),
    )
    return frozenset(f for dims, places in sides for d in places[2:] for f in dims[d])


def _written(
    eqn: Any, pieces: Sequence[Any], params: Any, axes: Axes, mesh: PlannedMesh
) -> list[Any]:
    """A single update, written where this device holds its place, and nothing otherwise.

    axes: how the array that is written to is split. All indices used are in range.
    """
    array, indices, update = pieces
    numbers = params["dimension_numbers"]
    window = iter(update.shape)
    sizes = [1 if d in numbers.inserted_window_dims else next(window) for d in range(array.ndim)]
    starts: list[Any] = [jnp.int32(0)] * array.ndim
    here: Any = True
    for d, index in zip(numbers.scatter_dims_to_operand_dims, indices, strict=True):
        index = index.astype(jnp.promote_types(index.dtype, jnp.int32))
        if params["mode"] == lax.GatherScatterMode.CLIP:
            index = jnp.clip(index, 0, eqn.invars[0].aval.shape[d] - sizes[d])
        local = index - _first_held(d, eqn.invars[0].aval.shape[d], axes, mesh)
        starts[d] = jnp.clip(local, 0, array.shape[d] - sizes[d]).astype(jnp.int32)
        here &= local == starts[d]
    held = lax.dynamic_slice(array, starts, sizes)
    combined = _COMBINED[eqn.primitive.name](held, update.reshape(sizes))
    return [lax.dynamic_update_slice(array, jnp.where(here, combined, held), starts)]


_COMBINED = {
    "scatter": lambda held, update: update,
    "scatter-add": lax.add,
    "scatter-sub": lax.sub,
    "scatter-mul": lax.mul,
    "scatter-min": lax.min,
    "scatter-max": lax.max,
}


def _first_held(dim: int, length: int, axes: Axes, mesh: PlannedMesh) -> Any:
    """The first index along a dim that this device holds; earlier axes of a mesh are the outer."""
    out: Any = 0
    for name, e, n in zip(mesh.names, axes, mesh.sizes, strict=True):
        if e == dim:
            length //= n
            out += lax.axis_index(name) * length
    return out


def _strategy_of(rule: Rule, planned: Sequence[tuple[str, str]], mesh: PlannedMesh) -> Strategy:
    """The strategy that a plan writes down by names."""
    factor = {f.name: k for k, f in enumerate(rule.factors)}
    chosen = {axis: factor[name] for axis, name in planned}
    return tuple(chosen.get(name, NOWHERE) for name in mesh.names)


def _spec(axes: Axes, rank: int, mesh: PlannedMesh, named: Set[str]) -> jax.P:
    """How these mesh axes split a tensor; a partial axis splits nothing."""
    split = tuple(
        e if n in named and e != PARTIAL else BROADCAST
        for n, e in zip(mesh.names, axes, strict=True)
    )
    return partition_spec(Sharding(split).spec(rank, mesh))


def _piece(shape: Sequence[int], axes: Axes, mesh: PlannedMesh, named: Set[str]) -> tuple[int, ...]:
    """The shape of what is left after these mesh axes have split it."""
    out = list(shape)
    for name, e, n in zip(mesh.names, axes, mesh.sizes, strict=True):
        if e >= 0 and name in named:
            out[e] //= n
    return tuple(out)


def _sums(axes: Axes, mesh: PlannedMesh, named: Set[str]) -> tuple[str, ...]:
    """Those of these mesh axes over which a result is still to be added up."""
    return tuple(n for n, e in zip(mesh.names, axes, strict=True) if e == PARTIAL and n in named)
