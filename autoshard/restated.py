"""Which equations say in a roundabout way what can be said plainly?

`vdot(a, a)`, the usual norm of a gradient, flattens its operands first. A dim that is split inside
an array can not be split in the flat one, so that a plan would gather every gradient to take its
norm; XLA's partitioner never sees the flat array, as XLA multiplies element by element there and
drops the reshape (a stack split along any of its dims: one scalar is summed, for v5e; jax 0.10.2).
So the product reads the arrays as they are, and sums over all of their dims.

`vmap(lambda i: table[i])`, an embedding that is written for one token, picks rows by two
coordinates, the second of which says where in the row to begin: at 0, as all of it is taken. Its
gradient adds rows that have one more dim, of one element. XLA:TPU has no kernel for either: it adds
row after row in a loop (also on one v5e; 400 ms of a small RetNet's step for v5e:4x4, that takes 30
without; jax 0.10.2, libtpu 0.0.42.1). Where such a coordinate is clipped to fit it is left out, and
so is the dim, wherever what was there before is at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.lax import GatherScatterMode

from autoshard.jax_compat import Literal, is_jaxpr, open_jaxpr


def restated(jaxpr: Any) -> Any:
    """The same jaxpr with such equations said plainly, each at its place.

    jaxpr: open or closed; all that lies inside its equations is looked through.
    """
    return _Restated().inside(jaxpr)


class _Restated:
    """Jaxprs that have been looked through, by their ids; one that stands twice stays one."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}

    def inside(self, x: Any) -> Any:
        """A jaxpr, or a parameter of an equation, with the equations in it said plainly."""
        if type(x) in (tuple, list):
            new = [self.inside(y) for y in x]
            return x if all(a is b for a, b in zip(new, x, strict=True)) else type(x)(new)
        if not is_jaxpr(x):
            return x
        if id(x) not in self.known:
            self.known[id(x)] = self.jaxpr(x)
        return self.known[id(x)]

    def jaxpr(self, x: Any) -> Any:
        """A jaxpr said plainly, or the same object where nothing in it changes."""
        inner, _ = open_jaxpr(x)
        makers: dict[Any, Any] = {}
        eqns = []
        for eqn in inner.eqns:
            makers.update((v, eqn) for v in eqn.outvars)
            eqns.append(self.equation(eqn, makers))
        if all(a is b for a, b in zip(eqns, inner.eqns, strict=True)):
            return x
        if inner is x:
            return x.replace(eqns=eqns)
        return x.replace(jaxpr=inner.replace(eqns=eqns))

    def equation(self, eqn: Any, makers: Mapping[Any, Any]) -> Any:
        """An equation said plainly, or the same object where it is."""
        name = eqn.primitive.name
        if name == "dot_general":
            return _unflattened(eqn, makers)
        if name == "gather":
            return _without_whole_dims(eqn, makers)
        if name.startswith("scatter"):
            return _without_ones(_without_whole_dims(eqn, makers), makers)
        params = {k: self.inside(p) for k, p in eqn.params.items()}
        same = all(p is eqn.params[k] for k, p in params.items())
        return eqn if same else eqn.replace(params=params)


def _maker(atom: Any, makers: Mapping[Any, Any], name: str) -> Any:
    """The equation of this name that makes a value, or None."""
    eqn = None if isinstance(atom, Literal) else makers.get(atom)
    return eqn if eqn is not None and eqn.primitive.name == name else None


def _unflattened(eqn: Any, makers: Mapping[Any, Any]) -> Any:
    flat = [_maker(v, makers, "reshape") for v in eqn.invars]
    given = [e.invars[0] for e in flat if e is not None and e.params["dimensions"] is None]
    if len(given) < 2 or any(isinstance(v, Literal) for v in given):
        return eqn
    (summed, _), _ = eqn.params["dimension_numbers"]
    shapes = {v.aval.shape for v in given}
    if len(shapes) > 1 or any(v.aval.ndim > 1 for v in eqn.invars) or len(summed) != 1:
        return eqn
    dims = tuple(range(given[0].aval.ndim))
    params = {**eqn.params, "dimension_numbers": ((dims, dims), ((), ()))}
    return eqn.replace(invars=given, params=params)


def _without_whole_dims(eqn: Any, makers: Mapping[Any, Any]) -> Any:
    """A gather or scatter without coordinates along dims that it takes whole.

    Only where the coordinates have been put together one by one, so that the others are there.
    """
    numbers, scatters = eqn.params["dimension_numbers"], eqn.primitive.name != "gather"
    name = "scatter_dims_to_operand_dims" if scatters else "start_index_map"
    dims = getattr(numbers, name)
    joined = _maker(eqn.invars[1], makers, "concatenate")
    last = eqn.invars[1].aval.ndim - 1
    if joined is None or joined.params["dimension"] != last:
        return eqn
    if len(dims) == 1 or any(v.aval.shape[last] != 1 for v in joined.invars):
        return eqn
    window = _window(eqn) if scatters else eqn.params["slice_sizes"]
    moves = [k for k, d in enumerate(dims) if window[d] != eqn.invars[0].aval.shape[d]]
    if len(moves) != 1 or eqn.params["mode"] != GatherScatterMode.CLIP:
        return eqn
    where = joined.invars[moves[0]]
    if isinstance(where, Literal):
        return eqn
    params = {**eqn.params, "dimension_numbers": numbers._replace(**{name: (dims[moves[0]],)})}
    return eqn.replace(invars=[eqn.invars[0], where, *eqn.invars[2:]], params=params)


def _without_ones(scatter: Any, makers: Mapping[Any, Any]) -> Any:
    """A scatter of slices that have no dim of one element along its one coordinate."""
    numbers, updates = scatter.params["dimension_numbers"], scatter.invars[2]
    along = numbers.scatter_dims_to_operand_dims
    fixed = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = _window(scatter)
    if len(along) != 1 or along[0] in fixed or window[along[0]] != 1:
        return scatter
    free = [d for d in range(len(window)) if d not in fixed]
    one = numbers.update_window_dims[free.index(along[0])]
    wider = _maker(updates, makers, "broadcast_in_dim") or _maker(updates, makers, "reshape")
    given = wider.invars[0] if wider is not None else updates
    if given.aval.shape != (*updates.aval.shape[:one], *updates.aval.shape[one + 1 :]):
        return scatter
    kept = tuple(d for d in range(updates.aval.ndim) if d != one)
    if tuple(wider.params.get("broadcast_dimensions", kept)) != kept:
        return scatter
    windows = tuple(d - (d > one) for d in numbers.update_window_dims if d != one)
    numbers = numbers._replace(
        update_window_dims=windows,
        inserted_window_dims=tuple(sorted((*numbers.inserted_window_dims, along[0]))),
    )
    return scatter.replace(
        invars=[*scatter.invars[:2], given], params={**scatter.params, "dimension_numbers": numbers}
    )


def _window(scatter: Any) -> list[int]:
    """How much of each dim of its operand a scatter changes at each place."""
    numbers, updates = scatter.params["dimension_numbers"], scatter.invars[2].aval.shape
    fixed = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    sizes = iter(updates[d] for d in numbers.update_window_dims)
    return [1 if d in fixed else next(sizes) for d in range(scatter.invars[0].aval.ndim)]
