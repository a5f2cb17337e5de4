"""Which operations does XLA's partitioner get wrong, and how are they split without it?

Seen with jax 0.10.2: a convolution whose space is split, or that has batch groups (the gradient of
a grouped one's weights), comes out too large by the number of devices along any other mesh axis:
the partitioner adds up what all of them have. And a Fourier transform of what was resharded has a
layout that XLA's CPU backend refuses. Such an operation is emitted as a `shard_map` over these
other axes, in which each device works on its own piece, as the rule says. Axes that split space
stay with the partitioner, which sees no others then, and exchanges the halos.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import jax
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
    return eqn.primitive.name in ("fft", "conv_general_dilated")


def island(
    eqn: Any,
    op: Op,
    planned: Sequence[tuple[str, str]],
    operands: Sequence[Any],
    mesh: PlannedMesh,
    devices: jax.sharding.Mesh,
) -> list[Any]:
    """The equation's results. planned: mesh axis to factor name."""
    strategy = _strategy_of(op.rule, planned, mesh)
    space = _spatial_factors(eqn, op.rule)
    auto = frozenset(n for n, f in zip(mesh.names, strategy, strict=True) if f in space)
    manual = frozenset(mesh.names) - auto
    groups = int(eqn.params.get("batch_group_count", 1)) > 1
    if not manual or not planned or (op.name != "fft" and not auto and not groups):
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
    numbers = eqn.params.get("dimension_numbers")
    if eqn.primitive.name != "conv_general_dilated":
        return frozenset()
    sides = (
        (rule.operands[0], numbers.lhs_spec),
        (rule.operands[1], numbers.rhs_spec),
        (rule.results[0], numbers.out_spec),
    )
    return frozenset(f for dims, places in sides for d in places[2:] for f in dims[d])


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
