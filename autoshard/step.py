"""One step of a time axis: an equation on the parts of its operands that this step has.

Loops and branches are rebuilt with their bodies on parts; any other equation runs on parts as they
are, with the parameters that these parts have (`autoshard.localize`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from autoshard.flat import Flat
from autoshard.jax_compat import bind, open_jaxpr, scan_counts
from autoshard.localize import local_params
from autoshard.trace import BARRIER, Path
from passes.ir.graph import Op
from passes.time_axis import Split, View
from passes.time_loop import TimeLoop

Shape = tuple[int, ...]


def local_shape(shape: Sequence[int], view: View, steps: int) -> Shape:
    """The shape of what one step has of a value."""
    if not isinstance(view, Split):
        return tuple(shape)
    return tuple(n // steps if d == view.dim else n for d, n in enumerate(shape))


def _apart(x: Any, part: Split, steps: int) -> tuple[Any, int]:
    """x with the steps as a dim of their own, and which one that is."""
    d, shape = part.dim, jnp.shape(x)
    high = shape[d] // (steps * part.low)
    return jnp.reshape(x, (*shape[:d], high, steps, part.low, *shape[d + 1 :])), d + 1


def parts_of(x: Any, part: Split, steps: int) -> Any:
    """All parts of x, one after the other along a new first dim."""
    apart, axis = _apart(x, part, steps)
    local = local_shape(jnp.shape(x), part, steps)
    return jnp.reshape(jnp.moveaxis(apart, axis, 0), (steps, *local))


def whole_of(stacked: Any, part: Split, shape: Shape) -> Any:
    """The value of this shape whose parts are stacked up."""
    steps, d = stacked.shape[0], part.dim
    high = shape[d] // (steps * part.low)
    apart = jnp.reshape(stacked, (steps, *shape[:d], high, part.low, *shape[d + 1 :]))
    return jnp.reshape(jnp.moveaxis(apart, 0, d + 1), shape)


class Step(Flat):
    """What one step makes. time: which one it is, counted from 0."""

    def __init__(self, loop: TimeLoop, time: Any) -> None:
        self.loop, self.steps, self.time = loop, loop.steps, time
        self.ops: Mapping[Path, Op] = loop.by_path

    def plain(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """An equation without a body."""
        if eqn.primitive.name == BARRIER:
            links = [
                self.ops.get((*path, "out", k), self.ops.get(path)) for k in range(len(operands))
            ]
            return bind(eqn, [self.taken(op, 0, x) for op, x in zip(links, operands, strict=True)])
        op = self.ops[path]
        taken = [self.taken(op, k, x) for k, x in enumerate(operands)]
        views = [self.loop.views[v] for v in op.outputs]
        made = [self.local(v.aval.shape, view) for v, view in zip(eqn.outvars, views, strict=True)]
        before = [v.aval.shape for v in eqn.invars]
        local = [jnp.shape(x) for x in taken]
        if local == before and made == [v.aval.shape for v in eqn.outvars]:
            return bind(eqn, taken)
        params = local_params(eqn.primitive.name, eqn.params, before, local, made)
        return bind(eqn, taken, dict(params))

    def local(self, shape: Sequence[int], view: View) -> Shape:
        """The shape of what this step has of a value."""
        return local_shape(shape, view, self.steps)

    def taken(self, op: Op | None, k: int, x: Any) -> Any:
        """An operand as an operation takes it: a part of it, or zeros after the first step."""
        if op is None:
            return x
        part = self.loop.cut.get((op.id, k))
        whole = self.loop.graph.values[op.inputs[k]].shape
        if part is not None and jnp.shape(x) == whole:
            x = self.piece(x, part)
        if (op.id, k) in self.loop.once:
            x = lax.select(jnp.broadcast_to(self.time == 0, x.shape), x, jnp.zeros_like(x))
        return x

    def piece(self, x: Any, part: Split) -> Any:
        """This step's part of a whole value."""
        apart, axis = _apart(x, part, self.steps)
        piece = lax.dynamic_index_in_dim(apart, self.time, axis, keepdims=False)
        return jnp.reshape(piece, local_shape(jnp.shape(x), part, self.steps))

    def scan(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """A scan whose body works on parts."""
        inner, body_consts = open_jaxpr(eqn.params["jaxpr"])
        n_consts, n_carry = scan_counts(eqn.params)
        entered = self.entered(operands, path)
        consts, rest = entered[:n_consts], entered[n_consts:]

        def body(carry: Any, sliced: Any) -> Any:
            outs = self.walk(inner, body_consts, [*consts, *carry, *sliced], (*path, "body"))
            outs = self.left(outs, path)
            return outs[:n_carry], outs[n_carry:]

        params, init, xs = eqn.params, rest[:n_carry], rest[n_carry:]
        carry, ys = lax.scan(body, init, xs, params["length"], params["reverse"], params["unroll"])
        return [*carry, *ys]

    def while_loop(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """A while loop whose body works on parts; what decides on its end is the same for all."""
        cond, cond_consts = open_jaxpr(eqn.params["cond_jaxpr"])
        body, body_consts = open_jaxpr(eqn.params["body_jaxpr"])
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        entered = self.entered(operands, path)
        first, second = entered[:n_cond], entered[n_cond : n_cond + n_body]

        def test(carry: Any) -> Any:
            return self.walk(cond, cond_consts, [*first, *carry], (*path, "cond"))[0]

        def round_(carry: Any) -> Any:
            outs = self.walk(body, body_consts, [*second, *carry], (*path, "body"))
            return self.left(outs, path)

        return list(lax.while_loop(test, round_, entered[n_cond + n_body :]))

    def cond(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """Branches on parts."""
        index, *rest = operands

        def branch(b: int, jaxpr: Any) -> Any:
            inner, consts = open_jaxpr(jaxpr)

            def run(*args: Any) -> list[Any]:
                outs = self.walk(inner, consts, list(args), (*path, "branch", b))
                joins = [self.ops.get((*path, "out", k)) for k in range(len(outs))]
                return [self.taken(op, b, x) for op, x in zip(joins, outs, strict=True)]

            return run

        branches = [branch(b, j) for b, j in enumerate(eqn.params["branches"])]
        return list(lax.switch(jnp.asarray(index, jnp.int32), branches, *rest))

    def entered(self, operands: Sequence[Any], path: Path) -> list[Any]:
        """What a loop takes from outside."""
        links = [self.ops.get((*path, "in", k)) for k in range(len(operands))]
        return [self.taken(op, 0, x) for op, x in zip(links, operands, strict=True)]

    def left(self, outs: Sequence[Any], path: Path) -> list[Any]:
        """What a round of a loop hands on, and stacks up."""
        links = [self.ops.get((*path, "out", k)) for k in range(len(outs))]
        return [self.taken(op, 0, x) for op, x in zip(links, outs, strict=True)]
