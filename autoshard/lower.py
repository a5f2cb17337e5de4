"""From a plan to a program: the same jaxpr, with a sharding constraint on every planned value.

XLA's partitioner does the rest. The walk is the tracer's, equation by equation, so that an
operation's path leads to its plan; loops, branches and rematerialised parts are rebuilt with the
constraints inside their bodies. Collectives are never written by hand here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.island import island, needs_island
from autoshard.jax_compat import Literal, bind, open_jaxpr, scan_counts, traced_at
from autoshard.mesh import named_sharding
from autoshard.trace import BARRIER, INLINED, REMAT, Path, Traced, solve_part
from passes.ir.graph import Op
from passes.ir.plan import Axes, Plan
from passes.ir.sharding import PARTIAL

# The user's own constraints became hints, and may name a mesh that is not the plan's.
_DROPPED = frozenset({"sharding_constraint", "reshard", "mesh_cast"})

# Where a slice would not fit, it starts earlier. XLA's partitioner forgets this when it splits the
# dim that is cut (seen with jax 0.10.2: a wrong slice), so the start is made to fit here.
_CLAMPED = frozenset({"dynamic_slice", "dynamic_update_slice"})


def constrained(traced: Traced, plan: Plan, devices: jax.sharding.Mesh) -> Any:
    """A function over flat arguments that computes what the traced one does, as planned."""
    emitter = Emitter(traced, plan, devices)

    def run(*flat: Any) -> list[Any]:
        jaxpr, consts = open_jaxpr(traced.jaxpr)
        emitter.pinned = {id(x): x for x in flat}  # jit splits its arguments as planned
        return emitter.walk(jaxpr, consts, list(flat), ())

    return run


class Emitter:
    """Computes a traced function as planned. devices: the mesh, or an abstract one inside of it."""

    def __init__(
        self, traced: Traced, plan: Plan, devices: jax.sharding.Mesh | jax.sharding.AbstractMesh
    ) -> None:
        self.traced, self.plan, self.devices = traced, plan, devices
        self.mesh = plan.mesh_axes
        self.ops: Mapping[Path, Op] = {op.path: op for op in traced.graph.ops}
        self.reshards = {(r.op, r.operand): r for r in plan.reshards}
        self.strategies = {op.id: op.strategy for op in plan.ops}
        self.shared: dict[tuple[int, int], Any] = {}
        self.twins = frozenset(traced.same.values())
        self.made_by: dict[Path, list[Any]] = {}  # results of equations that have a twin
        self.pinned: dict[int, Any] = {}  # what has a constraint in this body, by id

    # constraints

    def constrain(self, x: Any, axes: Axes | None) -> Any:
        """x with a sharding constraint; as it is where nothing is planned or can be split."""
        if axes is None or jnp.ndim(x) == 0 or PARTIAL in axes:
            return x
        if jnp.size(x) == 0 or not hasattr(x, "dtype"):
            return x
        x = lax.with_sharding_constraint(
            x, named_sharding(axes, jnp.ndim(x), self.mesh, self.devices)
        )
        self.pinned[id(x)] = x  # x lives with its id
        return x

    def made(self, op: Op, outs: Sequence[Any]) -> list[Any]:
        """An operation's results, each as its strategy makes it and then as planned.

        Between two constraints XLA does not compute the operation in a third way.
        """
        produced = [self.operand(op, k, x) for k, x in enumerate(outs, len(op.inputs))]
        return [
            self.constrain(x, self.plan.values[v])
            for x, v in zip(produced, op.outputs, strict=True)
        ]

    def wanted(self, op: Op, operands: Sequence[Any]) -> list[Any]:
        """An operation's operands, resharded where the plan says so."""
        return [self.operand(op, k, x) for k, x in enumerate(operands)]

    def operand(self, op: Op, k: int, x: Any) -> Any:
        """One operand as the operation wants it.

        What came into a body, or through a barrier, has no constraint there: it gets one first, or
        XLA would have it for all readers as one of them wants it.
        """
        reshard = self.reshards.get((op.id, k))
        if reshard is None:
            return x
        if id(x) not in self.pinned and k < len(op.inputs):
            x = self.constrain(x, self.plan.values[op.inputs[k]])
        if reshard.through:
            key = (reshard.shared, id(x))
            if key not in self.shared:
                self.shared[key] = (x, self.changed(x, reshard.through))  # x lives with its id
            x = self.shared[key][1]
        return self.changed(x, reshard.path)

    def changed(self, x: Any, path: Sequence[Axes]) -> Any:
        """x in one sharding after the other."""
        for axes in path:
            x = self.constrain(x, axes)
        return x

    @contextlib.contextmanager
    def body(self) -> Iterator[None]:
        """In a region's body nothing made outside, or in another tracing of it, is reused."""
        outside = self.shared, self.made_by, self.pinned
        self.shared, self.made_by, self.pinned = {}, {}, {}
        try:
            yield
        finally:
            self.shared, self.made_by, self.pinned = outside

    # the walk

    def walk(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], path: Path) -> list[Any]:
        """The results of a jaxpr, which is the body of the equation at this path."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            operands = [read(v) for v in eqn.invars]
            with traced_at(eqn):
                outs = self.equation(eqn, operands, (*path, i))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Any], path: Path) -> list[Any]:
        """The results of one equation."""
        name = eqn.primitive.name
        if name in INLINED:
            inner, consts = open_jaxpr(eqn.params[INLINED[name]])
            return self.walk(inner, consts, operands, path)
        if name == "custom_linear_solve":
            body, operands = solve_part(eqn, operands)
            inner, consts = open_jaxpr(body)
            return self.walk(inner, consts, operands, path)
        if name in REMAT:
            return self.remat(eqn, operands, path)
        if name == "scan":
            return self.scan(eqn, operands, path)
        if name == "while":
            return self.while_loop(eqn, operands, path)
        if name == "cond":
            return self.cond(eqn, operands, path)
        if name == BARRIER and len(operands) > 1:
            return self.barrier(eqn, operands, path)
        return self.planned(eqn, operands, path)

    def planned(self, eqn: Any, operands: list[Any], path: Path) -> list[Any]:
        """One operation with its operands and results in the shardings of its plan."""
        name, op = eqn.primitive.name, self.ops.get(path)
        if op is None and self.traced.same.get(path) in self.made_by:
            return self.made_by[self.traced.same[path]]
        if op is None:  # dead code: computed as it stands, and dropped by XLA
            return operands if name in _DROPPED else bind(eqn, operands)
        operands = self.wanted(op, operands)
        if name in _CLAMPED:
            operands = _within(eqn, operands)
        if name in _DROPPED:
            outs = operands[:1]
        elif needs_island(eqn):
            outs = island(eqn, op, self.strategies[op.id], operands, self.mesh, self.devices)
        else:
            outs = bind(eqn, operands)
        outs = self.made(op, outs)
        if path in self.twins:
            self.made_by[path] = outs
        return outs

    def barrier(self, eqn: Any, operands: list[Any], path: Path) -> list[Any]:
        """A barrier around several values, each of which has a plan of its own."""
        ops = [self.ops.get((*path, "out", k)) for k in range(len(operands))]
        taken = [
            x if op is None else self.operand(op, 0, x) for op, x in zip(ops, operands, strict=True)
        ]
        outs = bind(eqn, taken)
        return [x if op is None else self.made(op, [x])[0] for op, x in zip(ops, outs, strict=True)]

    def remat(self, eqn: Any, operands: list[Any], path: Path) -> list[Any]:
        """What jax lowers remat to: a barrier that keeps XLA from reusing the first run."""
        inner, consts = open_jaxpr(eqn.params["jaxpr"])
        if eqn.params.get("differentiated") and eqn.params.get("prevent_cse"):
            operands = list(lax.optimization_barrier(tuple(operands)))
        return self.walk(inner, consts, operands, path)

    def link(self, path: Path, operands: Sequence[Any], x: Any) -> Any:
        """A value carried over a region's border, constrained as planned on both sides."""
        op = self.ops.get(path)
        if op is None:
            return x
        del operands
        return self.constrain(self.operand(op, 0, x), self.plan.values[op.outputs[0]])

    def scan(self, eqn: Any, operands: list[Any], path: Path) -> list[Any]:
        """A scan with its body as planned."""
        inner, body_consts = open_jaxpr(eqn.params["jaxpr"])
        n_consts, n_carry = scan_counts(eqn.params)
        entering = n_consts + n_carry
        entered = [self.link((*path, "in", k), (), x) for k, x in enumerate(operands[:entering])]
        consts, init, xs = entered[:n_consts], entered[n_consts:], operands[entering:]

        def body(carry: Any, sliced: Any) -> Any:
            with self.body():
                args = [self.enter((*path, "in", n_consts + k), x) for k, x in enumerate(carry)]
                parts = [self.enter((*path, "in", entering + k), x) for k, x in enumerate(sliced)]
                outs = self.walk(inner, body_consts, [*consts, *args, *parts], (*path, "body"))
                outs = [
                    self.link((*path, "out", k), (), x)
                    if k < n_carry
                    else self.leave((*path, "out", k), x)
                    for k, x in enumerate(outs)
                ]
            return outs[:n_carry], outs[n_carry:]

        params = eqn.params
        carry, ys = lax.scan(body, init, xs, params["length"], params["reverse"], params["unroll"])
        return [
            *(self.enter((*path, "out", k), x) for k, x in enumerate(carry)),
            *(self.enter((*path, "out", n_carry + k), x) for k, x in enumerate(ys)),
        ]

    def enter(self, path: Path, x: Any) -> Any:
        """The result of a link, constrained as planned."""
        op = self.ops.get(path)
        return x if op is None else self.constrain(x, self.plan.values[op.outputs[0]])

    def leave(self, path: Path, x: Any) -> Any:
        """The operand of a link, resharded as planned."""
        op = self.ops.get(path)
        return x if op is None else self.operand(op, 0, x)

    def while_loop(self, eqn: Any, operands: list[Any], path: Path) -> list[Any]:
        """A while loop with its test and its body as planned."""
        cond, cond_consts = open_jaxpr(eqn.params["cond_jaxpr"])
        body, body_consts = open_jaxpr(eqn.params["body_jaxpr"])
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        entered = [self.link((*path, "in", k), (), x) for k, x in enumerate(operands)]
        first, second = entered[:n_cond], entered[n_cond : n_cond + n_body]
        skip = n_cond + n_body

        def test(carry: Any) -> Any:
            with self.body():
                return self.walk(cond, cond_consts, [*first, *carry], (*path, "cond"))[0]

        def step(carry: Any) -> Any:
            with self.body():
                args = [self.enter((*path, "in", skip + k), x) for k, x in enumerate(carry)]
                outs = self.walk(body, body_consts, [*second, *args], (*path, "body"))
                return [self.link((*path, "out", k), (), x) for k, x in enumerate(outs)]

        out = lax.while_loop(test, step, entered[skip:])
        return [self.enter((*path, "out", k), x) for k, x in enumerate(out)]

    def cond(self, eqn: Any, operands: list[Any], path: Path) -> list[Any]:
        """A choice with its branches as planned."""
        index, *rest = operands

        def branch(b: int, jaxpr: Any) -> Any:
            inner, consts = open_jaxpr(jaxpr)

            def run(*args: Any) -> list[Any]:
                with self.body():
                    outs = self.walk(inner, consts, list(args), (*path, "branch", b))
                    return [self.branch_out((*path, "out", k), b, x) for k, x in enumerate(outs)]

            return run

        branches = [branch(b, j) for b, j in enumerate(eqn.params["branches"])]
        outs = lax.switch(jnp.asarray(index, jnp.int32), branches, *rest)
        return [self.enter((*path, "out", k), x) for k, x in enumerate(outs)]

    def branch_out(self, path: Path, branch: int, x: Any) -> Any:
        """The result of a branch, as all branches give it."""
        op = self.ops.get(path)
        return x if op is None else self.operand(op, branch, x)


def _within(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The operands of a dynamic slice or update with starts for which it fits into its array."""
    arrays = 1 if eqn.primitive.name == "dynamic_slice" else 2
    whole, part = (v.aval.shape for v in (eqn.invars[0], [*eqn.outvars, eqn.invars[1]][arrays - 1]))
    out = list(operands)
    for k, (size, length) in enumerate(zip(whole, part, strict=True), arrays):
        start = operands[k]
        if not isinstance(start, jax.core.Tracer) and 0 <= start <= size - length:
            continue
        dtype = np.dtype(eqn.invars[k].aval.dtype)
        last = min(size - length, np.iinfo(dtype).max)
        out[k] = lax.clamp(dtype.type(0), jnp.asarray(start, dtype), dtype.type(last))
    return out
