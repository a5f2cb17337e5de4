"""From a function to one that does the same in steps: `in_steps(traced, loop)`.

The new function computes what is the same for all steps, runs a `lax.scan` over the steps, each on
its part of the batch, and then what only the whole loop tells (`passes.time_loop`). It takes and
gives what the traced one does, and is traced, planned and lowered like any other.

Sums over the steps are carried through the scan, those of short floats as float32. What a step
scatters into zeros, as the gradient of an embedding, it scatters into the sum. Parts that are
needed whole are stacked up and put together again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
from jax import lax

from autoshard.jax_compat import Literal, at_lines_of, bind, open_jaxpr, traced_at
from autoshard.sources import is_at_a_line
from autoshard.step import Step, parts_of, whole_of
from autoshard.trace import BARRIER, INLINED, REMAT, Path, Traced, solve_part
from passes.ir.graph import Op
from passes.time_axis import INSIDE, LATE, PARTIAL, WHOLE, Split, View
from passes.time_loop import TimeLoop


def in_steps(traced: Traced, loop: TimeLoop) -> Callable[..., list[Any]]:
    """The function over flat arguments, in steps. traced: of which `loop` is the loop."""
    program = Program(traced, loop)

    def run(*flat: Any) -> list[Any]:
        return program.run(flat)

    return run


@dataclass(frozen=True)
class Equation:
    """One equation of the outermost level, calls inlined; places number the values of all of them.

    ins: places, or Literals. eqn None: a barrier, which keeps XLA from merging what is computed
    again with what was computed first.
    """

    eqn: Any
    path: Path
    ins: tuple[Any, ...]
    outs: tuple[int, ...]
    phase: str
    caller: Any = None  # the equation, it or one around, that is at a line of the user's


class Program:
    """A traced function as a list of equations, with their phases, and how it runs."""

    def __init__(self, traced: Traced, loop: TimeLoop) -> None:
        self.loop, self.steps = loop, loop.steps
        self.ops: Mapping[Path, Op] = loop.by_path
        self.equations: list[Equation] = []
        self.views: list[View] = []  # by place
        self.avals: list[Any] = []  # of the whole value, by place
        self.consts: dict[int, Any] = {}
        jaxpr, consts = open_jaxpr(traced.jaxpr)
        scope: dict[Any, Any] = {}
        for var, v in zip(jaxpr.invars, loop.graph.inputs, strict=True):
            scope[var] = self.place(loop.views[v], var.aval)
        self.inputs = [scope[var] for var in jaxpr.invars]
        self.add_consts(jaxpr, consts, scope)
        self.flatten(jaxpr, scope, ())
        self.outputs = [_place(v, scope) for v in jaxpr.outvars]

    # equations

    def place(self, view: View, aval: Any) -> int:
        """A new place for a value that is seen so."""
        self.views.append(view)
        self.avals.append(aval)
        return len(self.views) - 1

    def add_consts(self, jaxpr: Any, consts: Sequence[Any], scope: dict[Any, Any]) -> None:
        """Places for the constants of a body."""
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            scope[var] = self.place(WHOLE, var.aval)
            self.consts[scope[var]] = value

    def flatten(self, jaxpr: Any, scope: dict[Any, Any], path: Path, outside: Any = None) -> None:
        """Add the equations of a body. scope: the places of its variables; outside: its caller."""
        for i, eqn in enumerate(jaxpr.eqns):
            here, name = (*path, i), eqn.primitive.name
            caller = eqn if is_at_a_line(eqn.source_info) else outside
            ins = tuple(_place(v, scope) for v in eqn.invars)
            if name in INLINED or name in REMAT or name == "custom_linear_solve":
                body = eqn.params.get(INLINED.get(name, "jaxpr"))
                if name == "custom_linear_solve":
                    body, solved = solve_part(eqn, ins)
                    ins = tuple(solved)
                elif name in REMAT and eqn.params.get("differentiated"):
                    ins = self.barrier(ins, here)
                inner, consts = open_jaxpr(body)
                within: dict[Any, Any] = dict(zip(inner.invars, ins, strict=True))
                self.add_consts(inner, consts, within)
                self.flatten(inner, within, here, caller)
                for var, result in zip(eqn.outvars, inner.outvars, strict=True):
                    scope[var] = _place(result, within)
                continue
            views = self.result_views(eqn, here)
            outs = tuple(self.place(w, v.aval) for w, v in zip(views, eqn.outvars, strict=True))
            scope.update(zip(eqn.outvars, outs, strict=True))
            phase = self.loop.phases[here]
            self.equations.append(Equation(eqn, here, ins, outs, phase, caller))

    def barrier(self, ins: tuple[Any, ...], path: Path) -> tuple[Any, ...]:
        """New places for what lives in the loop; what is there before or after it stays."""
        live = [p for p in ins if isinstance(p, int) and self.views[p] not in (WHOLE, LATE)]
        new = {p: len(self.views) + k for k, p in enumerate(dict.fromkeys(live))}
        self.views += [self.views[p] for p in new]
        self.avals += [self.avals[p] for p in new]
        if new:
            self.equations.append(Equation(None, path, tuple(new), tuple(new.values()), "loop"))
        return tuple(new.get(p, p) if isinstance(p, int) else p for p in ins)

    def result_views(self, eqn: Any, path: Path) -> list[View]:
        """How a step sees the results of an equation."""
        op = self.ops.get(path)
        if op is not None:
            return [self.loop.views[v] for v in op.outputs]
        links = [self.ops[(*path, "out", k)] for k in range(len(eqn.outvars))]
        return [self.loop.views[link.outputs[0]] for link in links]

    # the run

    def run(self, flat: Sequence[Any]) -> list[Any]:
        """The function's results, flat."""
        env = self.ahead(flat)
        first = next(e for e in self.equations if e.phase == "loop" and e.eqn is not None)
        with at_lines_of(first.caller or first.eqn):
            self.in_steps(env)
        return self.results(env)

    def ahead(self, flat: Sequence[Any]) -> dict[int, Any]:
        """Values by place, before the loop."""
        env: dict[int, Any] = {**self.consts, **dict(zip(self.inputs, flat, strict=True))}
        self.outside(env, "before")
        return env

    def results(self, env: dict[int, Any]) -> list[Any]:
        """The results, once all is there that the loop makes."""
        self.outside(env, "after")
        return [p.val if isinstance(p, Literal) else env[p] for p in self.outputs]

    def outputs_placed(self) -> list[int]:
        """The places of the results; literals have none."""
        return [p for p in self.outputs if isinstance(p, int)]

    def outside(self, env: dict[int, Any], phase: str) -> None:
        """The equations before the loop, or after it, on whole values."""
        self.compute(env, [e for e in self.equations if e.phase == phase])

    def compute(self, env: dict[int, Any], equations: Sequence[Equation]) -> None:
        """Equations on whole values, in order."""
        for e in equations:
            operands = [p.val if isinstance(p, Literal) else env[p] for p in e.ins]
            with traced_at(e.eqn, e.caller):
                env.update(zip(e.outs, bind(e.eqn, operands), strict=True))

    def in_steps(self, env: dict[int, Any]) -> None:
        """The loop: what it takes apart, what it adds up, and what it puts together."""
        inside = [e for e in self.equations if e.phase == "loop"]
        parts = self.parts(inside)
        made = {p for e in inside for p in e.outs}
        kept = [p for p in self.needed_after() if p in made]
        sums = [p for p in kept if not isinstance(self.views[p], Split)]
        stacks = [p for p in kept if isinstance(self.views[p], Split)]
        into = {p: self.scatters[p] for p in sums if p in self.scatters}
        run = [into[e.outs[0]] if e.outs and e.outs[0] in into else e for e in inside]

        def body(carry: Any, sliced: Any) -> Any:
            time, *held = carry
            begun = {into[p].ins[0]: x for p, x in zip(sums, held, strict=True) if p in into}
            local = self.one_step(run, env, dict(zip(parts, sliced, strict=True)), time, begun)
            summed = [
                x + local[p].astype(x.dtype) if added[p] else local[p]
                for p, x in zip(sums, held, strict=True)
            ]
            return (time + 1, *summed), [local[p] for p in stacks]

        added = {p: self.views[p] is PARTIAL and p not in into for p in sums}
        xs = [parts_of(env[p], part, self.steps) for p, part in parts]
        start = [jnp.zeros(self.avals[p].shape, wide(self.avals[p].dtype)) for p in sums]
        held, stacked = lax.scan(body, (jnp.int32(0), *start), xs, length=self.steps)
        for p, x in zip(sums, held[1:], strict=True):
            env[p] = x.astype(self.avals[p].dtype)
        for p, x in zip(stacks, stacked, strict=True):
            view = self.views[p]
            assert isinstance(view, Split)
            env[p] = whole_of(x, view, self.avals[p].shape)

    @cached_property
    def scatters(self) -> Mapping[int, Equation]:
        """Scatters that can add to a sum where it lies, by its place. They read it at another."""
        inside = [e for e in self.equations if e.phase == "loop"]
        read = {p for e in inside for p in e.ins if isinstance(p, int)}
        out = {}
        for e in inside:
            op = self.ops.get(e.path)
            if op is None or op.name != "scatter-add" or isinstance(e.ins[0], Literal):
                continue
            made, aval = e.outs[0], self.avals[e.outs[0]]
            zeros = self.views[e.ins[0]] in (WHOLE, INSIDE) and (op.id, 0) not in self.loop.once
            summed = self.views[made] is PARTIAL and wide(aval.dtype) == aval.dtype
            if zeros and summed and made not in read:
                out[made] = replace(e, ins=(self.place(PARTIAL, aval), *e.ins[1:]))
        return out

    def parts(self, inside: Sequence[Equation]) -> list[tuple[int, Split]]:
        """What of the values outside the loop each step takes a part of."""
        made = {p for e in inside for p in e.outs}
        out: dict[tuple[int, Split], None] = {}
        for e in inside:
            for k, p in enumerate(e.ins):
                part = self.part(e, k)
                if isinstance(p, int) and p not in made and part is not None:
                    out[p, part] = None
        return list(out)

    def part(self, e: Equation, k: int) -> Split | None:
        """The part that an equation takes of an operand; None for all of it."""
        p = e.ins[k]
        if isinstance(p, int) and isinstance(view := self.views[p], Split):
            return view
        op = self.ops.get(e.path)
        if op is not None:
            return self.loop.cut.get((op.id, k))
        way = "out" if e.eqn is not None and e.eqn.primitive.name == BARRIER else "in"
        link = self.ops.get((*e.path, way, k))
        return None if link is None else self.loop.cut.get((link.id, 0))

    def one_step(
        self,
        inside: Sequence[Equation],
        env: Mapping[int, Any],
        parts: Mapping[tuple[int, Split], Any],
        time: Any,
        known: Mapping[int, Any],
    ) -> dict[int, Any]:
        """All values that these equations make in a step. known: what others made of it."""
        step, local = Step(self.loop, time), dict(known)
        for e in inside:
            operands = [self.operand(e, k, env, parts, local) for k in range(len(e.ins))]
            if e.eqn is None:
                outs = list(lax.optimization_barrier(tuple(operands)))
            else:
                step.caller = e.caller
                with traced_at(e.eqn, e.caller):
                    outs = step.equation(e.eqn, operands, e.path)
            local.update(zip(e.outs, outs, strict=True))
        return local

    def operand(
        self,
        e: Equation,
        k: int,
        env: Mapping[int, Any],
        parts: Mapping[tuple[int, Split], Any],
        local: Mapping[int, Any],
    ) -> Any:
        """An operand of an equation, as this step has it."""
        p = e.ins[k]
        if isinstance(p, Literal):
            return p.val
        if p in local:
            return local[p]
        part = self.part(e, k)
        return env[p] if part is None else parts[p, part]

    def needed_after(self) -> list[int]:
        """Places that equations after the loop read, or that are results."""
        out = [p for e in self.equations if e.phase == "after" for p in e.ins]
        return list(dict.fromkeys(p for p in (*out, *self.outputs) if isinstance(p, int)))


def _place(atom: Any, scope: Mapping[Any, Any]) -> Any:
    return atom if isinstance(atom, Literal) else scope[atom]


def wide(dtype: Any) -> Any:
    """The type in which to add up: float32 for shorter floats."""
    short = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.float32 if short else dtype
