"""Which look-ups take of each row something of its own?  `logits[jnp.arange(n), labels]`.

Such a gather names each row by its number, and would have to be given all rows: no part of it can
run by itself. Here the rows become *batching* dims, as `jnp.take_along_axis` has them: row by row,
the same numbers. Its gradient, a scatter, likewise.

An array *counts* along a dim where it holds that dim's places: an iota, spread, reshaped, or with
places below zero wrapped round, of which there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax

from autoshard.flat import Flat
from autoshard.jax_compat import Literal, bind, open_jaxpr, traced_at
from autoshard.rewalk import read
from autoshard.sources import is_at_a_line
from autoshard.trace import Path, Traced


def own_rows(traced: Traced) -> Callable[..., list[Any]]:
    """The function over flat arguments. traced: a flat one."""
    jaxpr, consts = open_jaxpr(traced.jaxpr)

    def run(*args: Any) -> list[Any]:
        return _OwnRows().walk(jaxpr, consts, list(args))

    return run


class _OwnRows(Flat):
    """Computes a jaxpr; look-ups by number become batched ones."""

    def walk(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], path: Path = ()
    ) -> list[Any]:
        """The results of a body."""
        found = _batched(jaxpr)
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for i, eqn in enumerate(jaxpr.eqns):
            outside = self.caller
            self.caller = eqn if is_at_a_line(eqn.source_info) else outside
            operands = [read(v, env) for v in eqn.invars]
            with traced_at(eqn, self.caller):
                if i in found:
                    params, pieces = found[i]
                    operands[1] = lax.concatenate([read(p, env) for p in pieces], _last(eqn))
                    outs = bind(eqn, operands, params)
                else:
                    outs = self.equation(eqn, operands, (*path, i))
            self.caller = outside
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v, env) for v in jaxpr.outvars]


def _last(eqn: Any) -> int:
    return len(eqn.invars[1].aval.shape) - 1


def _batched(jaxpr: Any) -> dict[int, tuple[dict[str, Any], list[Any]]]:
    """By the number of an equation its new parameters, and the pieces of its indices left over."""
    counts: dict[Any, int] = {}
    makers: dict[Any, Any] = {}
    out = {}
    for i, eqn in enumerate(jaxpr.eqns):
        makers.update((v, eqn) for v in eqn.outvars)
        dim = _counts_along(eqn, counts, makers)
        if dim is not None:
            counts[eqn.outvars[0]] = dim
        if eqn.primitive.name == "gather" or eqn.primitive.name.startswith("scatter"):
            indices = eqn.invars[1]
            maker = None if isinstance(indices, Literal) else makers.get(indices)
            if maker is not None and maker.primitive.name == "concatenate":
                new = _with_batching(eqn, maker, counts)
                if new is not None:
                    out[i] = new
    return out


def _counts_along(eqn: Any, counts: Mapping[Any, int], makers: Mapping[Any, Any]) -> int | None:
    """The dim whose places the result of an equation holds."""
    name, params = eqn.primitive.name, eqn.params
    if name == "iota":
        return int(params["dimension"])
    first = eqn.invars[1 if name == "select_n" else 0] if eqn.invars else None
    if first is None or isinstance(first, Literal) or first not in counts:
        return None
    dim = counts[first]
    if name == "select_n":
        return dim if _is_below_zero(eqn.invars[0], counts, makers) else None
    if name == "convert_element_type":
        return dim if eqn.outvars[0].aval.dtype.kind in "iu" else None
    if name == "broadcast_in_dim":
        return int(params["broadcast_dimensions"][dim])
    if name == "reshape":
        return _reshaped(first.aval.shape, eqn.outvars[0].aval.shape, dim)
    return None


def _is_below_zero(test: Any, counts: Mapping[Any, int], makers: Mapping[Any, Any]) -> bool:
    """Whether a test is `places < 0`, which is false."""
    if isinstance(test, Literal):
        return False
    less = makers.get(test)
    if less is None or less.primitive.name != "lt" or less.invars[0] not in counts:
        return False
    bound = less.invars[1]
    return isinstance(bound, Literal) and bool(np.all(np.asarray(bound.val) <= 0))


def _reshaped(before: Sequence[int], after: Sequence[int], dim: int) -> int | None:
    """Where a dim is after a reshape that leaves it one dim."""
    passed = 1
    for d, n in enumerate(after):
        if passed == math.prod(before[:dim]) and n == before[dim] and n > 1:
            return d
        passed *= n
    return None


def _with_batching(
    eqn: Any, joined: Any, counts: Mapping[Any, int]
) -> tuple[dict[str, Any], list[Any]] | None:
    """Parameters with rows as batching dims, and the indices that are left; None where none are."""
    gather = eqn.primitive.name == "gather"
    numbers, last = eqn.params["dimension_numbers"], _last(eqn)
    named = numbers.start_index_map if gather else numbers.scatter_dims_to_operand_dims
    gone = numbers.collapsed_slice_dims if gather else numbers.inserted_window_dims
    pieces = list(joined.invars)
    single = all(p.aval.shape[last] == 1 for p in pieces)
    if joined.params["dimension"] != last or not single or len(pieces) != len(named):
        return None
    rows: dict[int, int] = {}  # dim of the operand: dim of the indices
    for dim, piece in zip(named, pieces, strict=True):
        at = None if isinstance(piece, Literal) else counts.get(piece)
        if at is None or at >= last or at in rows.values() or dim not in gone:
            continue
        if piece.aval.shape[at] == eqn.invars[0].aval.shape[dim]:
            rows[dim] = at
    left = [(d, p) for d, p in zip(named, pieces, strict=True) if d not in rows]
    places_before = (
        numbers.start_indices_batching_dims if gather else numbers.scatter_indices_batching_dims
    )
    old = dict(zip(numbers.operand_batching_dims, places_before, strict=True))
    if not rows or not left or set(rows.values()) & set(old.values()):
        return None
    both = sorted({**old, **rows}.items())
    where, places = tuple(d for d, _ in both), tuple(p for _, p in both)
    still = tuple(d for d in gone if d not in rows)
    names = tuple(d for d, _ in left)
    if gather:
        new = numbers._replace(
            collapsed_slice_dims=still,
            start_index_map=names,
            operand_batching_dims=where,
            start_indices_batching_dims=places,
        )
    else:
        new = numbers._replace(
            inserted_window_dims=still,
            scatter_dims_to_operand_dims=names,
            operand_batching_dims=where,
            scatter_indices_batching_dims=places,
        )
    params = {**eqn.params, "dimension_numbers": new, "indices_are_sorted": False}
    return params, [p for _, p in left]
