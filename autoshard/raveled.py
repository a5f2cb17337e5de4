"""Which products read arrays that were only flattened for them?

`vdot(a, a)`, the usual norm of a gradient, flattens its operands first. A dim that is split inside
an array can not be split in the flat one, so that a plan would gather every gradient to take its
norm; XLA's partitioner never sees the flat array, as XLA multiplies element by element there and
drops the reshape (a stack split along any of its dims: one scalar is summed, for v5e; jax 0.10.2).
So the product reads the arrays as they are, and sums over all of their dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoshard.jax_compat import Literal, is_jaxpr, open_jaxpr


def as_they_are(jaxpr: Any) -> Any:
    """The same jaxpr, with such products of arrays that were not flattened; equations keep places.

    jaxpr: open or closed; all that lies inside its equations is looked through.
    """
    return _Rewritten().inside(jaxpr)


class _Rewritten:
    """Jaxprs that have been looked through, by their ids; one that stands twice stays one."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}

    def inside(self, x: Any) -> Any:
        """A jaxpr, or a parameter of an equation, with such products as they are."""
        if type(x) in (tuple, list):
            new = [self.inside(y) for y in x]
            return x if all(a is b for a, b in zip(new, x, strict=True)) else type(x)(new)
        if not is_jaxpr(x):
            return x
        if id(x) not in self.known:
            self.known[id(x)] = self.jaxpr(x)
        return self.known[id(x)]

    def jaxpr(self, x: Any) -> Any:
        """A jaxpr as it is, or the same object where nothing in it changes."""
        inner, _ = open_jaxpr(x)
        flat: dict[Any, Any] = {}  # what was flattened, by the flat one
        eqns = []
        for eqn in inner.eqns:
            if eqn.primitive.name == "reshape" and eqn.params["dimensions"] is None:
                flat[eqn.outvars[0]] = eqn.invars[0]
            eqns.append(self.equation(eqn, flat))
        if all(a is b for a, b in zip(eqns, inner.eqns, strict=True)):
            return x
        if inner is x:
            return x.replace(eqns=eqns)
        return x.replace(jaxpr=inner.replace(eqns=eqns))

    def equation(self, eqn: Any, flat: Mapping[Any, Any]) -> Any:
        """An equation, the same object where nothing in it changes."""
        if eqn.primitive.name != "dot_general":
            params = {k: self.inside(p) for k, p in eqn.params.items()}
            same = all(p is eqn.params[k] for k, p in params.items())
            return eqn if same else eqn.replace(params=params)
        given = [flat[v] for v in eqn.invars if not isinstance(v, Literal) and v in flat]
        if len(given) < 2 or any(isinstance(v, Literal) for v in given):
            return eqn
        (summed, _), _ = eqn.params["dimension_numbers"]
        shapes = {v.aval.shape for v in given}
        if len(shapes) > 1 or any(v.aval.ndim > 1 for v in eqn.invars) or len(summed) != 1:
            return eqn
        dims = tuple(range(given[0].aval.ndim))
        params = {**eqn.params, "dimension_numbers": ((dims, dims), ((), ()))}
        return eqn.replace(invars=given, params=params)
