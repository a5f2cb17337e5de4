"""How are the weights' gradients taken out of a backward scan?  As a scan of their own.

The gradient of a scan over layers computes, layer by layer, what the layer before needs and what
the layer's weights need. Only the first has to be done in this order, and the stage before waits
for it only. By reachability in the body the scan falls into two:

  B  what is carried on, and all that is computed from it alone
  W  the rest: what is summed up or stacked up for the weights

What W takes of B is stacked up, layer by layer. `weights_apart(traced, loop)` gives the function in
which all backward scans of the loop are two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax

from autoshard.jax_compat import Literal, bind, open_jaxpr, scan_counts, traced_at
from autoshard.rewalk import Rewalk
from autoshard.trace import INLINED, REMAT, Path, Traced
from passes.time_axis import PARTIAL
from passes.time_loop import TimeLoop


def weights_apart(traced: Traced, loop: TimeLoop) -> Callable[..., list[Any]]:
    """The function over flat arguments. traced: of which `loop` is the loop."""
    jaxpr, consts = open_jaxpr(traced.jaxpr)

    def run(*flat: Any) -> list[Any]:
        return _Apart(traced, loop).walk(jaxpr, consts, flat)

    return run


class _Apart(Rewalk):
    def __init__(self, traced: Traced, loop: TimeLoop) -> None:
        self.traced, self.loop = traced, loop

    def equation(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        inside = self.loop.phases.get(path) == "loop" and path in self.traced.backward
        if eqn.primitive.name == "scan" and inside:
            links = [self.loop.by_path[(*path, "out", k)] for k in range(len(eqn.outvars))]
            late = [self.loop.views[op.outputs[0]] is PARTIAL for op in links]
            if any(late) and not all(late):
                return _two_scans(eqn, operands, late)
        return super().equation(eqn, operands, path)


@dataclass(frozen=True)
class _Step:
    """One equation of a body, calls inlined; names number the values. eqn None: a barrier."""

    eqn: Any
    ins: tuple[Any, ...]  # names, or Literals
    outs: tuple[int, ...]


class _Body:
    """A body as a list of steps."""

    def __init__(self, jaxpr: Any, consts: Sequence[Any]) -> None:
        self.steps: list[_Step] = []
        self.known: dict[int, Any] = {}
        self.count = 0
        scope = {var: self.name() for var in jaxpr.invars}
        self.inputs = [scope[var] for var in jaxpr.invars]
        self.outputs = self.flatten(jaxpr, consts, scope)

    def name(self) -> int:
        self.count += 1
        return self.count - 1

    def flatten(self, jaxpr: Any, consts: Sequence[Any], scope: dict[Any, Any]) -> list[Any]:
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            scope[var] = self.name()
            self.known[scope[var]] = value
        for eqn in jaxpr.eqns:
            ins = tuple(v if isinstance(v, Literal) else scope[v] for v in eqn.invars)
            name = eqn.primitive.name
            if name in INLINED or name in REMAT:
                inner, inner_consts = open_jaxpr(eqn.params[INLINED.get(name, "jaxpr")])
                if name in REMAT and eqn.params.get("differentiated"):
                    new = tuple(p if isinstance(p, Literal) else self.name() for p in ins)
                    held = tuple(p for p in ins if isinstance(p, int))
                    again = tuple(p for p in new if isinstance(p, int))
                    self.steps.append(_Step(None, held, again))
                    ins = new
                within: dict[Any, Any] = dict(zip(inner.invars, ins, strict=True))
                results = self.flatten(inner, inner_consts, within)
                scope.update(zip(eqn.outvars, results, strict=True))
                continue
            outs = tuple(self.name() for _ in eqn.outvars)
            scope.update(zip(eqn.outvars, outs, strict=True))
            self.steps.append(_Step(eqn, ins, outs))
        return [v if isinstance(v, Literal) else scope[v] for v in jaxpr.outvars]

    def run(self, steps: Sequence[_Step], env: dict[int, Any]) -> None:
        """Compute some of the steps."""
        for step in steps:
            ins = [p.val if isinstance(p, Literal) else env[p] for p in step.ins]
            if step.eqn is None:
                outs = list(lax.optimization_barrier(tuple(ins)))
            else:
                with traced_at(step.eqn):
                    outs = bind(step.eqn, ins)
            env.update(zip(step.outs, outs, strict=True))


def _two_scans(eqn: Any, operands: Sequence[Any], late: Sequence[bool]) -> list[Any]:
    """The scan as one for what is carried on and one for the rest. late: which results can wait."""
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
    n_consts, n_carry = scan_counts(eqn.params)
    entering = n_consts + n_carry
    body = _Body(jaxpr, consts)
    late = _early_where_needed(body, list(late), n_consts, n_carry)
    first = [k for k, wait in enumerate(late) if not wait]
    needed = _needed(body, [body.outputs[k] for k in first])
    early = [s for s in body.steps if needed.intersection(s.outs)]
    rest = [s for s in body.steps if not needed.intersection(s.outs)]
    made = {p for s in early for p in s.outs}
    moving = {body.inputs[n_consts + k] for k in range(n_carry) if not late[k]}
    taken = {p for s in rest for p in s.ins if isinstance(p, int)}
    taken |= {p for k, p in enumerate(body.outputs) if late[k] and isinstance(p, int)}
    crossing = sorted(taken & (made | moving))
    fixed = {**body.known, **dict(zip(body.inputs[:n_consts], operands, strict=False))}
    carries = [k for k in range(n_carry) if not late[k]], [k for k in range(n_carry) if late[k]]
    stacks = [k for k in range(n_carry, len(late)) if not late[k]]
    stacks_late = [k for k in range(n_carry, len(late)) if late[k]]
    xs, init = operands[entering:], operands[n_consts:entering]
    names = body.inputs[entering:]

    def value(k: int, env: dict[int, Any]) -> Any:
        p = body.outputs[k]
        return p.val if isinstance(p, Literal) else env[p]

    def b_part(carry: Any, sliced: Any) -> Any:
        env = {**fixed, **dict(zip(names, sliced, strict=True))}
        env.update((body.inputs[n_consts + k], x) for k, x in zip(carries[0], carry, strict=True))
        body.run(early, env)
        ys = [value(k, env) for k in stacks], [env[p] for p in crossing]
        return [value(k, env) for k in carries[0]], ys

    def w_part(carry: Any, both: Any) -> Any:
        sliced, crossed = both
        env = {**fixed, **dict(zip(names, sliced, strict=True))}
        env.update(zip(crossing, crossed, strict=True))
        env.update((body.inputs[n_consts + k], x) for k, x in zip(carries[1], carry, strict=True))
        body.run(rest, env)
        return [value(k, env) for k in carries[1]], [value(k, env) for k in stacks_late]

    length, reverse = eqn.params["length"], eqn.params["reverse"]
    carried, (ys, crossed) = lax.scan(
        b_part, [init[k] for k in carries[0]], list(xs), length, reverse
    )
    summed, ys_late = lax.scan(
        w_part, [init[k] for k in carries[1]], (list(xs), crossed), length, reverse
    )
    results = dict(zip([*carries[0], *carries[1]], [*carried, *summed], strict=True))
    results.update(zip([*stacks, *stacks_late], [*ys, *ys_late], strict=True))
    return [results[k] for k in range(len(late))]


def _early_where_needed(body: _Body, late: list[bool], n_consts: int, n_carry: int) -> list[bool]:
    """A carry that something early reads is early itself."""
    while True:
        outs = [body.outputs[k] for k, wait in enumerate(late) if not wait]
        needed = _needed(body, outs)
        early = [s for s in body.steps if needed.intersection(s.outs)]
        read = {p for s in early for p in s.ins if isinstance(p, int)}
        read.update(p for p in outs if isinstance(p, int))
        found = [k for k in range(n_carry) if late[k] and body.inputs[n_consts + k] in read]
        if not found:
            return late
        for k in found:
            late[k] = False


def _needed(body: _Body, outs: Sequence[Any]) -> set[int]:
    """All names that these are computed from."""
    needed = {p for p in outs if isinstance(p, int)}
    for s in reversed(body.steps):
        if needed.intersection(s.outs):
            needed.update(p for p in s.ins if isinstance(p, int))
    return needed
