"""A flat function whose scans make again what they would take from outside.

Which, `passes.through_scans` says, and `passes.remat_scans`. The scan that made a value hands out,
beside its own results, what the value is made of; the one that reads it has the operations at the
beginning of its body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import lax

from autoshard.flat import Kept
from autoshard.jax_compat import Literal, Var, bind, open_jaxpr, scan_counts, traced_at
from autoshard.rewalk import read
from autoshard.trace import Path, Traced
from passes.ir.graph import Graph
from passes.through_scans import Chain, ThroughScans


def through_scans(traced: Traced, again: ThroughScans) -> Callable[..., list[Any]]:
    """The function over flat arguments. traced: a flat one, but for what `Kept` leaves."""
    jaxpr, consts = open_jaxpr(traced.jaxpr)

    def run(*args: Any) -> list[Any]:
        return Through(traced.graph, again).walk(jaxpr, consts, list(args))

    return run


class Through(Kept):
    """Computes a flat jaxpr; each body keeps what its scans know of one another."""

    def __init__(self, graph: Graph, again: ThroughScans) -> None:
        self.graph, self.chains = graph, again.chains
        self.given: dict[Path, list[Chain]] = {}  # by the writer
        for chains in self.chains.values():
            for chain in chains:
                if chain.writer is not None:
                    self.given.setdefault(chain.writer, []).append(chain)
        self.unread = _unread(graph, again)
        self.envs: dict[Path, dict[Any, Any]] = {}
        self.jaxprs: dict[Path, Any] = {}
        self.sources: dict[Path, dict[Any, Any]] = {}  # of a writer: variable to what it stacked

    def walk(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], path: Path = ()
    ) -> list[Any]:
        """The results of a body."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        self.envs[path], self.jaxprs[path] = env, jaxpr
        for i, eqn in enumerate(jaxpr.eqns):
            operands = self.operands(eqn, env, (*path, i))
            with traced_at(eqn):
                outs = self.equation(eqn, operands, (*path, i))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v, env) for v in jaxpr.outvars]

    def operands(self, eqn: Any, env: Mapping[Any, Any], path: Path) -> list[Any]:
        """What an equation takes."""
        return [read(v, env) for v in eqn.invars]

    def scan(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """A scan that makes values again, or gives what they are made of."""
        chains, given = self.chains.get(path, ()), self.given.get(path, ())
        if not chains and not given:
            return super().scan(eqn, operands, path)
        inner, body_consts = open_jaxpr(eqn.params["jaxpr"])
        n_consts, n_carry = scan_counts(eqn.params)
        entering = n_consts + n_carry
        replaced = {k for chain in chains for k in chain.makes}
        kept = [k for k in range(entering, len(operands)) if k not in replaced]
        extra = [self.stacked(chain) for chain in chains]
        leaves = self.leaves(inner, given, path)
        drop = self.unread.get(path, frozenset())
        results = [k for k in range(n_carry, len(eqn.outvars)) if k not in drop]
        stacks = {inner.outvars[k]: k for k in results if isinstance(inner.outvars[k], Var)}
        more_of = [var for var in leaves if var not in stacks]

        def body(carry: Any, sliced: Any) -> Any:
            own, more = sliced
            args = [*operands[:n_consts], *carry, *([None] * (len(operands) - entering))]
            for k, x in zip(kept, own, strict=True):
                args[k] = x
            for chain, x in zip(chains, more, strict=True):
                for k, made in self.made(chain, x, path).items():
                    args[k] = made
            outs = self.walk(inner, body_consts, args, (*path, "body"))
            env = self.envs[(*path, "body")]
            return outs[:n_carry], ([outs[k] for k in results], [env[v] for v in more_of])

        params, init = eqn.params, list(operands[n_consts:entering])
        xs = ([operands[k] for k in kept], extra)
        carry, (ys, more) = lax.scan(
            body, init, xs, params["length"], params["reverse"], params["unroll"]
        )
        out = [*carry, *([None] * (len(eqn.outvars) - n_carry))]
        for k, y in zip(results, ys, strict=True):
            out[k] = y
        known = self.sources.setdefault(path, {})
        known.update(zip(more_of, more, strict=True))
        known.update({var: out[stacks[var]] for var in leaves if var in stacks})
        return out

    # of the scan that writes

    def leaves(self, inner: Any, given: Sequence[Chain], path: Path) -> list[Any]:
        """Variables of a body that it must stack: those that are no inputs from outside."""
        eqn = self.equation_at(path)
        n_consts, n_carry = scan_counts(eqn.params)
        known: dict[Any, Any] = {}
        env = self.envs[path[:-1]]
        for k, var in enumerate(inner.invars):
            if not n_consts <= k < n_consts + n_carry:
                known[var] = read(eqn.invars[k], env)
        self.sources[path] = known
        wanted = {self.variable(v, path): None for chain in given for v in chain.leaves}
        return [var for var in wanted if var not in known]

    def variable(self, v: int, path: Path) -> Any:
        """The variable in a scan's body of a value."""
        inner, _ = open_jaxpr(self.equation_at(path).params["jaxpr"])
        op = self.graph.ops[self.graph.producers()[v]]
        if op.is_link and op.path[:-2] == path:
            return inner.invars[int(op.path[-1])]
        return self.made_by(v, inner, (*path, "body"))

    def made_by(self, v: int, jaxpr: Any, at: Path) -> Any:
        """The variable of a value that an equation of a body makes. at: the body's path."""
        op = self.graph.ops[self.graph.producers()[v]]
        number, *rest = op.path[len(at) :]
        eqn = jaxpr.eqns[int(number)]
        k = int(rest[-1]) if rest[:1] == ["out"] else op.outputs.index(v)
        return eqn.outvars[k]

    def equation_at(self, path: Path) -> Any:
        """The equation at a path."""
        return self.jaxprs[path[:-1]].eqns[int(path[-1])]

    # of the scan that makes again

    def stacked(self, chain: Chain) -> list[Any]:
        """The stacks that a chain's leaves are parts of."""
        if chain.writer is None:
            return []
        return [self.sources[chain.writer][var] for var in self.slices(chain)]

    def slices(self, chain: Chain) -> list[Any]:
        """Leaves of a chain that are stacked; the others are the same in all rounds."""
        assert chain.writer is not None
        eqn = self.equation_at(chain.writer)
        inner, _ = open_jaxpr(eqn.params["jaxpr"])
        n_consts, _ = scan_counts(eqn.params)
        variables = dict.fromkeys(self.variable(v, chain.writer) for v in chain.leaves)
        same = set(inner.invars[:n_consts])
        return [var for var in variables if var not in same]

    def made(self, chain: Chain, stacked: Sequence[Any], path: Path) -> dict[int, Any]:
        """What a chain makes, by the number of the scan's input."""
        if chain.writer is None:
            jaxpr, env = self.jaxprs[path[:-1]], self.envs[path[:-1]]
        else:
            jaxpr, _ = open_jaxpr(self.equation_at(chain.writer).params["jaxpr"])
            consts = open_jaxpr(self.equation_at(chain.writer).params["jaxpr"])[1]
            env = {**dict(zip(jaxpr.constvars, consts, strict=True)), **self.sources[chain.writer]}
            env.update(zip(self.slices(chain), stacked, strict=True))
        local = done_again(jaxpr, chain.equations, env)
        if chain.writer is None:
            names = {k: self.made_by(v, jaxpr, path[:-1]) for k, v in chain.makes.items()}
        else:
            names = {k: self.variable(v, chain.writer) for k, v in chain.makes.items()}
        return {k: local[var] if var in local else env[var] for k, var in names.items()}


def done_again(
    jaxpr: Any, equations: Sequence[Path], env: Mapping[Any, Any], reader: Any = None
) -> dict[Any, Any]:
    """What these equations of a body make. reader: an equation whose named scopes they get."""
    local: dict[Any, Any] = {}
    for at in equations:
        eqn = jaxpr.eqns[int(at[-1])]
        operands = [
            a.val if isinstance(a, Literal) else local[a] if a in local else env[a]
            for a in eqn.invars
        ]
        with traced_at(reader or eqn, eqn):
            outs = bind(eqn, operands)
        local.update(zip(eqn.outvars, outs, strict=True))
    return local


def _unread(graph: Graph, again: ThroughScans) -> Mapping[Path, frozenset[int]]:
    """By scan, its results that nobody reads any more."""
    replaced = {
        (*path, "in", k) for path, chains in again.chains.items() for c in chains for k in c.makes
    }
    read = {v for op in graph.ops if op.path not in replaced for v in op.inputs}
    read.update(graph.outputs)
    out: dict[Path, set[int]] = {}
    for op in graph.ops:
        if op.name == "scan_stack" and op.outputs[0] not in read:
            out.setdefault(op.path[:-2], set()).add(int(op.path[-1]))
    return {path: frozenset(ks) for path, ks in out.items()}
