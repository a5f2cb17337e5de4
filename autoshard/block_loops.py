"""From a flat function to one that runs parts of it block by block: `in_loops(traced, bodies)`.

Each loop of `passes.block_loops` becomes one `lax.scan`: what it takes parts of is cut up before,
sums are carried, those of short floats as float32, and parts that others read are put together
again after. Positions (an iota along the dim that is cut) and random bits are those of the block's
own elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autoshard.flat import Flat
from autoshard.jax_compat import Literal, at_lines_of, bind, open_jaxpr, traced_at
from autoshard.ragged import Cutting
from autoshard.random_parts import bits_at
from autoshard.rewalk import read
from autoshard.sources import is_at_a_line
from autoshard.step import Shape, Step
from autoshard.time_loop import wide
from autoshard.trace import Path, Traced
from passes.block_loops import Blocked, BlockLoop
from passes.ir.graph import Graph, Op
from passes.time_axis import PARTIAL, WHOLE, Split, View
from passes.time_loop import TimeLoop


def in_loops(traced: Traced, bodies: Sequence[Blocked]) -> Callable[..., list[Any]]:
    """The function over flat arguments. traced: a flat one, of which these are bodies."""
    jaxpr, consts = open_jaxpr(traced.jaxpr)
    at = {body.body: body for body in bodies}

    def run(*args: Any) -> list[Any]:
        return _InLoops(traced.graph, at).walk(jaxpr, consts, list(args))

    return run


class _InLoops(Flat):
    """Computes a jaxpr, its bodies that have loops in their order."""

    def __init__(self, graph: Graph, bodies: Mapping[Path, Blocked]) -> None:
        self.graph, self.bodies = graph, bodies

    def walk(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], path: Path = ()
    ) -> list[Any]:
        """The results of a body."""
        blocked = self.bodies.get(path)
        if blocked is None:
            return super().walk(jaxpr, consts, args, path)
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for item in blocked.order:
            if isinstance(item, BlockLoop):
                first = jaxpr.eqns[int(self.graph.ops[item.ops[0]].path[-1])]
                lines = first if is_at_a_line(first.source_info) else self.caller or first
                with at_lines_of(lines):
                    env.update(_Blocks(self.graph, item, jaxpr.eqns, env).run())
                continue
            eqn = jaxpr.eqns[int(item[-1])]
            outside = self.caller
            self.caller = eqn if is_at_a_line(eqn.source_info) else outside
            with traced_at(eqn, self.caller):
                outs = self.equation(eqn, [read(v, env) for v in eqn.invars], item)
            self.caller = outside
            env.update(zip(eqn.outvars, outs, strict=True))
        return [_or_zeros(v, env) for v in jaxpr.outvars]


def _or_zeros(atom: Any, env: Mapping[Any, Any]) -> Any:
    """A body's result; nobody reads one that nothing was left of."""
    if not isinstance(atom, Literal) and atom not in env:
        return jnp.zeros(atom.aval.shape, atom.aval.dtype)
    return read(atom, env)


class _Blocks:
    """One loop over blocks. eqns: of its body; env: what is there before it."""

    def __init__(
        self, graph: Graph, loop: BlockLoop, eqns: Sequence[Any], env: Mapping[Any, Any]
    ) -> None:
        self.loop, self.env = loop, env
        self.cutting = Cutting(loop.steps, loop.blocks)
        self.ops = [graph.ops[o] for o in loop.ops]
        self.eqns = [eqns[int(op.path[-1])] for op in self.ops]
        views: list[View] = [WHOLE] * len(graph.values)
        for v, view in loop.views.items():
            views[v] = view
        self.time_loop = TimeLoop(
            graph, loop.steps, {}, tuple(views), {}, loop.cut, frozenset(loop.once), (), ()
        )
        self.variables = {
            v: var
            for op, eqn in zip(self.ops, self.eqns, strict=True)
            for v, var in zip(op.outputs, eqn.outvars, strict=True)
        }

    def run(self) -> dict[Any, Any]:
        """What the loop gives, by variable."""
        loop, parts = self.loop, self.parts()
        sums = [v for v in loop.results if loop.views[v] is PARTIAL]
        stacks = [v for v in loop.results if isinstance(loop.views[v], Split)]
        avals = {v: self.variables[v].aval for v in loop.results}

        def body(carry: Any, sliced: Any) -> Any:
            time, *held = carry
            local = self.one(dict(zip(parts, sliced, strict=True)), time)
            made = [local[self.variables[v]] for v in sums]
            summed = [x + y.astype(x.dtype) for x, y in zip(held, made, strict=True)]
            return (time + 1, *summed), [local[self.variables[v]] for v in stacks]

        xs = [self.cutting.apart(self.env[var], part) for var, part in parts]
        start = [jnp.zeros(avals[v].shape, wide(avals[v].dtype)) for v in sums]
        held, stacked = lax.scan(body, (jnp.int32(0), *start), xs, length=loop.blocks)
        out = {}
        for v, x in zip(sums, held[1:], strict=True):
            out[self.variables[v]] = x.astype(avals[v].dtype)
        for v, x in zip(stacks, stacked, strict=True):
            view = loop.views[v]
            assert isinstance(view, Split)
            out[self.variables[v]] = self.cutting.joined(x, view, avals[v].shape)
        return out

    def parts(self) -> list[tuple[Any, Split]]:
        """What the loop takes a part of in each step."""
        out: dict[tuple[Any, Split], None] = {}
        for op, eqn in zip(self.ops, self.eqns, strict=True):
            for k, atom in enumerate(eqn.invars):
                part = self.loop.cut.get((op.id, k))
                if part is not None and not isinstance(atom, Literal):
                    out[atom, part] = None
        return list(out)

    def one(self, parts: Mapping[tuple[Any, Split], Any], time: Any) -> dict[Any, Any]:
        """All that one step makes, by variable."""
        step, local = _Step(self.time_loop, time, self.cutting), dict[Any, Any]()
        for op, eqn in zip(self.ops, self.eqns, strict=True):
            operands = []
            for k, atom in enumerate(eqn.invars):
                part = self.loop.cut.get((op.id, k))
                if isinstance(atom, Literal):
                    operands.append(atom.val)
                elif (op.id, k) in self.loop.local:
                    operands.append(local[atom])
                else:
                    operands.append(self.env[atom] if part is None else parts[atom, part])
            with traced_at(eqn):
                local.update(zip(eqn.outvars, step.plain(eqn, operands, op.path), strict=True))
        return local


class _Step(Step):
    """A step that tells its own elements' positions, and what is past the end."""

    def __init__(self, loop: TimeLoop, time: Any, cutting: Cutting) -> None:
        super().__init__(loop, time)
        self.cutting = cutting

    def local(self, shape: Sequence[int], view: View) -> Shape:
        """The shape of what this step has of a value."""
        return self.cutting.local(shape, view)

    def piece(self, x: Any, part: Split) -> Any:
        """This step's part of a whole value."""
        return lax.dynamic_index_in_dim(self.cutting.apart(x, part), self.time, 0, keepdims=False)

    def plain(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """An equation without a body."""
        op = self.ops[path]
        part = self.loop.views[op.outputs[0]]
        if isinstance(part, Split) and _counts_along(eqn, part.dim):
            return [self.positions(eqn.outvars[0].aval, part)]
        if isinstance(part, Split) and eqn.primitive.name == "random_bits":
            return [self.random_bits(eqn, operands, part)]
        if part is PARTIAL:
            views = [self.seen(op, k) for k in range(len(operands))]
            operands = [
                self.cutting.within(x, view, self.time) if isinstance(view, Split) else x
                for x, view in zip(operands, views, strict=True)
            ]
        return super().plain(eqn, operands, path)

    def seen(self, op: Op, k: int) -> View:
        """How a step sees an operand."""
        return self.loop.cut.get((op.id, k)) or self.loop.views[op.inputs[k]]

    def random_bits(self, eqn: Any, operands: Sequence[Any], part: Split) -> Any:
        """Those of a block's own elements."""
        (key,), whole = operands, eqn.outvars[0].aval
        if part.dim < key.ndim:
            return bind(eqn, operands)[0]
        if not getattr(jax.config, "jax_threefry_partitionable", True):
            return self.piece(bind(eqn, operands)[0], part)
        shape = whole.shape[key.ndim :]
        places = [
            self.cutting.places(n, part, self.time)
            if d == part.dim - key.ndim
            else lax.iota(jnp.int32, n)
            for d, n in enumerate(shape)
        ]
        return bits_at(key, places, shape, eqn.params["bit_width"])

    def positions(self, aval: Any, part: Split) -> Any:
        """An iota along the dim that is cut."""
        at = self.cutting.places(aval.shape[part.dim], part, self.time).astype(aval.dtype)
        return lax.broadcast_in_dim(at, self.local(aval.shape, part), (part.dim,))


def _counts_along(eqn: Any, dim: int) -> bool:
    return bool(eqn.primitive.name == "iota" and eqn.params["dimension"] == dim)
