"""What does a jax function compute?  `trace(fn, args)` gives the Graph of its jaxpr.

`jit`, `closed_call`, `custom_jvp_call` and `custom_vjp_call` are inlined; `scan`, `while`, `cond`
and `remat2` stay as regions whose bodies lie in the same flat list; `shard_map` stays one
operation. Every operation keeps the path of its equation, so that `autoshard.lower` can walk the
same jaxpr and find the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

import passes.rules  # noqa: F401  (registers the hand-written rules)
from autoshard.jax_compat import Literal, is_backward, open_jaxpr, scan_counts
from autoshard.jit_options import static_places
from autoshard.restated import restated
from autoshard.shardy import shardy_rule
from autoshard.signature import signature, type_of
from autoshard.sources import source_of
from passes.ir.graph import Graph, Hint, Op, Region, RegionKind, Signature, Type, Value, ValueKind
from passes.ir.rule import Rule
from passes.rules.registry import hand_rule, whole_rule

Path = tuple[int | str, ...]

# Calls that mean no more than their body. Parameter that holds the body, by primitive name.
INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_lin": "call_jaxpr",
    "custom_transpose_call": "call_jaxpr",
}
REMAT = ("remat2", "checkpoint", "remat")
BARRIER = "optimization_barrier"


@dataclass(frozen=True)
class Traced:
    """A traced function: its Graph, and what jax needs to lower it again.

    jaxpr: the closed jaxpr. in_tree, out_tree: pytree structures of (args, kwargs) and of the
    result. in_avals: flat avals. donated: per flat argument. required_mesh: axis sizes that a
    `shard_map` inside demands, or None. same: paths of equations left out of the graph because the
    equation at another path computes the same. deciders: by the path of a branch or a while loop,
    the value that decides it. backward: paths of the equations that a gradient added.
    """

    graph: Graph
    jaxpr: Any
    in_tree: Any
    out_tree: Any
    in_avals: tuple[Any, ...]
    donated: tuple[bool, ...]
    required_mesh: Mapping[str, int] | None
    same: Mapping[Path, Path] = field(default_factory=dict)
    deciders: Mapping[Path, int] = field(default_factory=dict)
    backward: frozenset[Path] = frozenset()


def trace(
    fn: Callable[..., Any],
    *args: Any,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> Traced:
    """Trace fn on arrays or jax.ShapeDtypeStructs; nothing is allocated, compiled or run.

    What is said in a roundabout way is said plainly (`autoshard.restated`).

    Whatever `jax.jit` raises for a function or an argument it refuses comes through unchanged.
    """
    jitted = jax.jit(
        fn,
        donate_argnums=donate_argnums,
        static_argnums=static_argnums,
        static_argnames=static_argnames,
    )
    options = {"static_argnums": static_argnums, "static_argnames": static_argnames}
    numbers, fixed = static_places(fn, options, len(args))
    traced = jitted.trace(
        *(a if i in numbers else jax.tree.map(_unplaced, a) for i, a in enumerate(args)),
        **{k: a if k in fixed else jax.tree.map(_unplaced, a) for k, a in kwargs.items()},
    )
    closed = restated(traced.jaxpr)
    jaxpr, _ = open_jaxpr(closed)
    infos = jax.tree.leaves(traced.args_info)
    donated = tuple(bool(getattr(i, "donated", False)) for i in infos)
    names = _argument_names(jaxpr, len(jaxpr.invars))
    builder = _Builder()
    env: dict[Any, int] = {}
    for var, name in zip(jaxpr.invars, names, strict=True):
        env[var] = builder.value(type_of(var.aval), "argument", name)
    inputs = tuple(env[v] for v in jaxpr.invars)
    builder.constants(jaxpr.constvars, env)
    builder.walk(jaxpr, env, (), 0)
    outputs = tuple(builder.read(v, env) for v in jaxpr.outvars)
    builder.close_top()
    graph = Graph(
        name=getattr(fn, "__name__", type(fn).__name__),
        values=tuple(builder.values),
        ops=tuple(builder.ops),
        regions=tuple(builder.regions),
        inputs=inputs,
        outputs=outputs,
        output_names=_result_names(jaxpr, len(outputs)),
        ties=tuple(builder.ties),
        donated=frozenset(v for v, d in zip(inputs, donated, strict=True) if d),
        hints=tuple(builder.hints),
        notes=tuple(dict.fromkeys(builder.notes)),
    )
    return Traced(
        graph,
        closed,
        traced.in_tree,
        traced.out_tree,
        tuple(v.aval for v in jaxpr.invars),
        donated,
        builder.required_mesh,
        deciders=builder.deciders,
        backward=frozenset(builder.backward),
    )


def _unplaced(x: Any) -> Any:
    """An array's type without where it lies now, which says nothing about where it should."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=bool(getattr(x, "weak_type", False)))


def solve_part(eqn: Any, operands: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The jaxpr of a custom_linear_solve that solves, and the operands it takes."""
    lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
    first = lengths.matvec + lengths.vecmat
    sides = operands[sum(lengths) :]
    return jaxprs.solve, [*operands[first : first + lengths.solve], *sides]


def _argument_names(jaxpr: Any, count: int) -> tuple[str, ...]:
    info = getattr(jaxpr, "debug_info", None)
    names = tuple(getattr(info, "arg_names", None) or ())
    if len(names) != count:
        names = tuple(f"args[{i}]" for i in range(count))
    return tuple(n if n else f"args[{i}]" for i, n in enumerate(names))


def _result_names(jaxpr: Any, count: int) -> tuple[str, ...]:
    info = getattr(jaxpr, "debug_info", None)
    names = tuple(getattr(info, "result_paths", None) or ())
    return names if len(names) == count else tuple(f"result[{i}]" for i in range(count))


class _Builder:
    """Collects values, ops and regions while walking a jaxpr; the only mutable thing here."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.regions: list[Region] = [Region(0, 0, "top", 1.0, 0, 0)]
        self.ties: list[tuple[int, int]] = []
        self.hints: list[Hint] = []
        self.notes: list[str] = []
        self.required_mesh: Mapping[str, int] | None = None
        self.deciders: dict[Path, int] = {}
        self.backward: set[Path] = set()
        self._in_backward = False
        self._rules: dict[Any, tuple[Rule, str]] = {}
        self._caller = ""  # where the call stands whose body is being walked
        self._literals: dict[Any, int] = {}

    # values

    def value(self, type: Type, kind: ValueKind = "result", name: str = "") -> int:
        self.values.append(Value(len(self.values), type, kind, name))
        return len(self.values) - 1

    def constants(self, variables: Sequence[Any], env: dict[Any, int]) -> None:
        for i, var in enumerate(variables):
            env[var] = self.value(type_of(var.aval), "constant", f"constant[{i}]")

    def read(self, atom: Any, env: dict[Any, int]) -> int:
        if not isinstance(atom, Literal):
            return env[atom]
        type = type_of(atom.aval)
        text = np.array2string(np.asarray(atom.val)) if np.ndim(atom.val) == 0 else f"{type}"
        key = (type, text) if np.ndim(atom.val) == 0 else id(atom)
        if key not in self._literals:
            self._literals[key] = self.value(type, "literal", text)
        return self._literals[key]

    # ops

    def op(
        self,
        sig: Signature,
        rule: Rule,
        inputs: Sequence[int],
        outputs: Sequence[int],
        source: str,
        path: Path,
        region: int,
        effects: bool = False,
    ) -> None:
        self.ops.append(
            Op(
                len(self.ops),
                sig.name,
                tuple(inputs),
                tuple(outputs),
                rule,
                sig.params,
                source,
                path,
                region,
                effects,
            )
        )

    def rule_for(self, sig: Signature, eqn: Any, source: str) -> Rule:
        key = (sig.name, sig.operands, sig.results, _frozen(sig.params))
        if key not in self._rules:
            self._rules[key] = _new_rule(sig, eqn)
        rule, note = self._rules[key]
        if note:
            self.notes.append(f"{note} ({source})")
        return rule

    def link(
        self, name: str, sources: Sequence[int], to: Type, source: str, path: Path, region: int
    ) -> int:
        """A link operation over values already known; returns its result."""
        out = self.value(to)
        sig = Signature(name, tuple(self.values[v].type for v in sources), (to,))
        self.op(sig, self.rule_for(sig, None, source), sources, (out,), source, path, region)
        return out

    # regions

    def open_region(self, parent: int, kind: RegionKind, trips: float) -> int:
        self.regions.append(Region(len(self.regions), parent, kind, trips, len(self.ops), -1))
        return len(self.regions) - 1

    def close_region(self, region: int) -> None:
        r = self.regions[region]
        self.regions[region] = Region(r.id, r.parent, r.kind, r.trips, r.begin, len(self.ops))

    def close_top(self) -> None:
        self.regions[0] = Region(0, 0, "top", 1.0, 0, len(self.ops))

    # the walk

    def body(self, eqn: Any, jaxpr: Any, env: dict[Any, int], path: Path, region: int) -> None:
        """Walk the body of an equation; jax traces library functions once for all their callers."""
        outside = self._caller, self._in_backward
        self._caller = source_of(eqn.source_info, self._caller)
        self._in_backward = self._in_backward or is_backward(eqn.source_info)
        self.walk(jaxpr, env, path, region)
        self._caller, self._in_backward = outside

    def walk(self, jaxpr: Any, env: dict[Any, int], path: Path, region: int) -> None:
        for i, eqn in enumerate(jaxpr.eqns):
            name = eqn.primitive.name
            here = (*path, i)
            if self._in_backward or is_backward(eqn.source_info):
                self.backward.add(here)
            if name in INLINED:
                self._inline(eqn, eqn.params[INLINED[name]], env, here, region)
            elif name == "scan":
                self._scan(eqn, env, here, region)
            elif name == "while":
                self._while(eqn, env, here, region)
            elif name == "cond":
                self._cond(eqn, env, here, region)
            elif name == "custom_linear_solve":
                self._linear_solve(eqn, env, here, region)
            elif name in REMAT:
                inner = self.open_region(region, "remat", 1.0)
                self._inline(eqn, eqn.params["jaxpr"], env, here, inner)
                self.close_region(inner)
            elif name == BARRIER and len(eqn.invars) > 1:
                self._barrier(eqn, env, here, region)
            else:
                self._plain(eqn, env, here, region)

    def _barrier(self, eqn: Any, env: dict[Any, int], path: Path, region: int) -> None:
        """One operation for each operand: they need not be split along the same axes."""
        source = source_of(eqn.source_info, self._caller)
        for k, (atom, var) in enumerate(zip(eqn.invars, eqn.outvars, strict=True)):
            v, type, at = self.read(atom, env), type_of(var.aval), (*path, "out", k)
            env[var] = self.link(eqn.primitive.name, (v,), type, source, at, region)

    def _plain(self, eqn: Any, env: dict[Any, int], path: Path, region: int) -> None:
        sig, source = signature(eqn), source_of(eqn.source_info, self._caller)
        inputs = [self.read(v, env) for v in eqn.invars]
        outputs = []
        for var, type in zip(eqn.outvars, sig.results, strict=True):
            env[var] = self.value(type)
            outputs.append(env[var])
        rule = self.rule_for(sig, eqn, source)
        self.op(sig, rule, inputs, outputs, source, path, region, bool(eqn.effects))
        self._hints(eqn, inputs, outputs, source)

    def _hints(self, eqn: Any, inputs: list[int], outputs: list[int], source: str) -> None:
        name, params = eqn.primitive.name, eqn.params
        if name == "autoshard_annotate":
            origin = params["origin"] or source
            self.hints.append(
                Hint(outputs[0], params["spec"], origin, params["priority"], params["hard"])
            )
        elif name == "sharding_constraint":
            dims = _named_dims(params["sharding"], len(self.values[outputs[0]].shape))
            if dims is not None:
                origin = f"with_sharding_constraint, {source}"
                self.hints.append(Hint(outputs[0], dims, origin))
        elif name == "shard_map":
            self._manual(params, inputs, outputs, source)

    def _manual(self, params: Any, inputs: list[int], outputs: list[int], source: str) -> None:
        mesh = dict(params["mesh"].shape)
        if self.required_mesh is not None and dict(self.required_mesh) != mesh:
            raise ValueError(
                f"two shard_map calls want different meshes, {dict(self.required_mesh)} and {mesh} "
                f"({source}); give them one mesh"
            )
        self.required_mesh = mesh
        pairs = [*zip(inputs, params["in_specs"], strict=True)]
        pairs += [*zip(outputs, params["out_specs"], strict=True)]
        for v, spec in pairs:
            rank = len(self.values[v].shape)
            dims = _spec_dims(spec, rank)
            if rank and self.values[v].kind != "literal":
                self.hints.append(Hint(v, dims, f"shard_map, {source}", 0, hard=False))

    def _inline(self, eqn: Any, body: Any, env: dict[Any, int], path: Path, region: int) -> None:
        inner, _ = open_jaxpr(body)
        scope: dict[Any, int] = {}
        self.constants(inner.constvars, scope)
        for var, outer in zip(inner.invars, eqn.invars, strict=True):
            scope[var] = self.read(outer, env)
        self.body(eqn, inner, scope, path, region)
        for var, result in zip(eqn.outvars, inner.outvars, strict=True):
            env[var] = self.read(result, scope)

    def _linear_solve(self, eqn: Any, env: dict[Any, int], path: Path, region: int) -> None:
        """Only the solving part runs; the others are there for differentiation."""
        body, operands = solve_part(eqn, [self.read(v, env) for v in eqn.invars])
        inner, _ = open_jaxpr(body)
        scope: dict[Any, int] = {}
        self.constants(inner.constvars, scope)
        scope.update(zip(inner.invars, operands, strict=True))
        self.body(eqn, inner, scope, path, region)
        for var, result in zip(eqn.outvars, inner.outvars, strict=True):
            env[var] = self.read(result, scope)

    def _scan(self, eqn: Any, env: dict[Any, int], path: Path, region: int) -> None:
        inner, _ = open_jaxpr(eqn.params["jaxpr"])
        source = source_of(eqn.source_info, self._caller)
        n_consts, n_carry = scan_counts(eqn.params)
        outer = [self.read(v, env) for v in eqn.invars]
        scope: dict[Any, int] = {}
        self.constants(inner.constvars, scope)
        entering = n_consts + n_carry
        for k, var in enumerate(inner.invars[:entering]):
            at = (*path, "in", k)
            scope[var] = self.link("loop_enter", [outer[k]], type_of(var.aval), source, at, region)
        body = self.open_region(region, "scan", float(eqn.params["length"]))
        for k, var in enumerate(inner.invars[entering:], entering):
            at = (*path, "in", k)
            scope[var] = self.link("scan_slice", [outer[k]], type_of(var.aval), source, at, body)
        self.body(eqn, inner, scope, (*path, "body"), body)
        for k, (var, result) in enumerate(zip(eqn.outvars, inner.outvars, strict=True)):
            at, made = (*path, "out", k), self.read(result, scope)
            if k < n_carry:
                env[var] = self._next(
                    made, scope[inner.invars[n_consts + k]], var, source, at, body
                )
            else:
                env[var] = self.link("scan_stack", [made], type_of(var.aval), source, at, body)
        self.close_region(body)

    def _next(self, made: int, carry: int, var: Any, source: str, path: Path, body: int) -> int:
        out = self.link("loop_next", [made], type_of(var.aval), source, path, body)
        self.ties.append((carry, out))
        return out

    def _while(self, eqn: Any, env: dict[Any, int], path: Path, region: int) -> None:
        cond, _ = open_jaxpr(eqn.params["cond_jaxpr"])
        body, _ = open_jaxpr(eqn.params["body_jaxpr"])
        source = source_of(eqn.source_info, self._caller)
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        outer = [self.read(v, env) for v in eqn.invars]
        entered = [
            self.link("loop_enter", [v], self.values[v].type, source, (*path, "in", k), region)
            for k, v in enumerate(outer)
        ]
        carry = entered[n_cond + n_body :]
        self.notes.append(f"while loop with an unknown trip count is priced as one trip ({source})")
        for kind, inner, first in (
            ("while_cond", cond, entered[:n_cond]),
            ("while_body", body, entered[n_cond : n_cond + n_body]),
        ):
            scope: dict[Any, int] = {}
            self.constants(inner.constvars, scope)
            scope.update(zip(inner.invars, [*first, *carry], strict=True))
            span = self.open_region(region, kind, 1.0)  # type: ignore[arg-type]
            self.body(eqn, inner, scope, (*path, "cond" if inner is cond else "body"), span)
            if inner is cond:
                self.deciders[path] = self.read(inner.outvars[0], scope)
            else:
                for k, (var, result) in enumerate(zip(eqn.outvars, inner.outvars, strict=True)):
                    made = self.read(result, scope)
                    at = (*path, "out", k)
                    env[var] = self._next(made, carry[k], var, source, at, span)
            self.close_region(span)

    def _cond(self, eqn: Any, env: dict[Any, int], path: Path, region: int) -> None:
        source = source_of(eqn.source_info, self._caller)
        branches = eqn.params["branches"]
        index, *operands = [self.read(v, env) for v in eqn.invars]
        self.deciders[path] = index
        results: list[list[int]] = []
        for b, branch in enumerate(branches):
            inner, _ = open_jaxpr(branch)
            scope: dict[Any, int] = {}
            self.constants(inner.constvars, scope)
            scope.update(zip(inner.invars, operands, strict=True))
            span = self.open_region(region, "branch", 1.0 / len(branches))
            self.body(eqn, inner, scope, (*path, "branch", b), span)
            results.append([self.read(v, scope) for v in inner.outvars])
            self.close_region(span)
        for k, var in enumerate(eqn.outvars):
            made = [r[k] for r in results]
            at = (*path, "out", k)
            env[var] = self.link("branch_join", made, type_of(var.aval), source, at, region)


def _new_rule(sig: Signature, eqn: Any) -> tuple[Rule, str]:
    """The rule of an equation (None: of a link), and what is to be said about it."""
    if eqn is not None and eqn.effects:
        return whole_rule(sig), f"{sig.name} has side effects and is left unsharded"
    rule = hand_rule(sig)
    if rule is None and eqn is not None:
        rule = shardy_rule(eqn)
    if rule is None:
        return whole_rule(sig), f"{sig.name} has no sharding rule and is not split"
    return rule, ""


def _frozen(x: Any) -> Any:
    """A hashable stand-in for plain parameters; types count, so that 1, 1.0 and True differ."""
    if isinstance(x, Mapping):
        return tuple((k, _frozen(v)) for k, v in x.items())
    if isinstance(x, tuple):
        return tuple(map(_frozen, x))
    return (type(x).__name__, x)


def _spec_dims(spec: Any, rank: int) -> tuple[tuple[str, ...], ...]:
    """Axis names per dim of a PartitionSpec, filled up to the rank."""
    out: list[tuple[str, ...]] = []
    for entry in tuple(spec):
        if entry is None:
            out.append(())
        else:
            out.append(tuple(entry) if isinstance(entry, tuple) else (entry,))
    return tuple(out) + ((),) * (rank - len(out))


def _named_dims(sharding: Any, rank: int) -> tuple[tuple[str, ...] | None, ...] | None:
    """Hint dims of a NamedSharding; None where it names no mesh axes."""
    spec = getattr(sharding, "spec", None)
    if spec is None:
        return None
    open_ = jax.sharding.PartitionSpec.UNCONSTRAINED
    entries = tuple(spec) + (None,) * (rank - len(tuple(spec)))
    return tuple(
        None if e is open_ else () if e is None else e if isinstance(e, tuple) else (e,)
        for e in entries
    )
