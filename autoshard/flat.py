"""A function as one flat program: `flat(traced)` gives it without calls and rematerialised parts.

What is left is plain equations, at the outermost level and in the bodies of loops and branches, so
that a pass can move and repeat them one by one. What `jax.checkpoint` computes again stands in the
program twice; a barrier between keeps XLA from merging it with the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from autoshard.jax_compat import bind, open_jaxpr, scan_counts
from autoshard.rewalk import Rewalk
from autoshard.trace import REMAT, Path, Traced, solve_part


def flat(traced: Traced, kept: bool = False) -> Callable[..., list[Any]]:
    """The traced function over flat arguments, to be traced again.

    kept: whether what `jax.checkpoint` computes again stays one equation.
    """
    jaxpr, consts = open_jaxpr(traced.jaxpr)

    def run(*args: Any) -> list[Any]:
        return (Kept if kept else Flat)().walk(jaxpr, consts, list(args))

    return run


class Flat(Rewalk):
    """Computes a jaxpr as it is, also inside loops and branches."""

    def equation(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """The results of one equation."""
        name = eqn.primitive.name
        if name in REMAT:
            inner, consts = open_jaxpr(eqn.params["jaxpr"])
            if eqn.params.get("differentiated") and eqn.params.get("prevent_cse"):
                operands = list(lax.optimization_barrier(tuple(operands)))
            return self.walk(inner, consts, operands, path)
        if name == "custom_linear_solve":
            body, operands = solve_part(eqn, operands)
            inner, consts = open_jaxpr(body)
            return self.walk(inner, consts, operands, path)
        if name == "scan":
            return self.scan(eqn, operands, path)
        if name == "while":
            return self.while_loop(eqn, operands, path)
        if name == "cond":
            return self.cond(eqn, operands, path)
        return super().equation(eqn, operands, path)

    def plain(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """An equation without a body."""
        return bind(eqn, operands)

    def scan(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """A scan with its body computed again."""
        inner, body_consts = open_jaxpr(eqn.params["jaxpr"])
        n_consts, n_carry = scan_counts(eqn.params)
        consts, rest = operands[:n_consts], operands[n_consts:]

        def body(carry: Any, sliced: Any) -> Any:
            outs = self.walk(inner, body_consts, [*consts, *carry, *sliced], (*path, "body"))
            return outs[:n_carry], outs[n_carry:]

        params, init, xs = eqn.params, list(rest[:n_carry]), list(rest[n_carry:])
        carry, ys = lax.scan(body, init, xs, params["length"], params["reverse"], params["unroll"])
        return [*carry, *ys]

    def while_loop(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """A while loop, likewise."""
        cond, cond_consts = open_jaxpr(eqn.params["cond_jaxpr"])
        body, body_consts = open_jaxpr(eqn.params["body_jaxpr"])
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        first, second = operands[:n_cond], operands[n_cond : n_cond + n_body]

        def test(carry: Any) -> Any:
            return self.walk(cond, cond_consts, [*first, *carry], (*path, "cond"))[0]

        def round_(carry: Any) -> Any:
            return self.walk(body, body_consts, [*second, *carry], (*path, "body"))

        return list(lax.while_loop(test, round_, list(operands[n_cond + n_body :])))

    def cond(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """Branches, likewise."""
        index, *rest = operands

        def branch(b: int, jaxpr: Any) -> Any:
            inner, consts = open_jaxpr(jaxpr)
            return lambda *args: self.walk(inner, consts, list(args), (*path, "branch", b))

        branches = [branch(b, j) for b, j in enumerate(eqn.params["branches"])]
        return list(lax.switch(jnp.asarray(index, jnp.int32), branches, *rest))


class Kept(Flat):
    """As flat, but for what `jax.checkpoint` computes again: that stays as the user wrote it."""

    def equation(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """The results of one equation."""
        if eqn.primitive.name in REMAT and eqn.params.get("differentiated"):
            return self.plain(eqn, operands, path)
        return super().equation(eqn, operands, path)
