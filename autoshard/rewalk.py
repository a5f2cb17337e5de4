"""A jaxpr computed again, equation by equation, so that some of them can be done in another way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoshard.jax_compat import Literal, bind, open_jaxpr, traced_at
from autoshard.sources import is_at_a_line
from autoshard.trace import INLINED, Path


class Rewalk:
    """Computes a jaxpr as it is. Calls are inlined; equations keep their lines and their scopes.

    caller: the innermost equation around, that is at a line of the user's.
    """

    caller: Any = None

    def walk(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], path: Path = ()
    ) -> list[Any]:
        """The results of a jaxpr. path: of the equation that it is the body of."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for i, eqn in enumerate(jaxpr.eqns):
            operands = [read(v, env) for v in eqn.invars]
            outside = self.caller
            self.caller = eqn if is_at_a_line(eqn.source_info) else outside
            with traced_at(eqn, self.caller):
                outs = self.equation(eqn, operands, (*path, i))
            self.caller = outside
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v, env) for v in jaxpr.outvars]

    def equation(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """The results of one equation."""
        name = eqn.primitive.name
        if name in INLINED:
            inner, consts = open_jaxpr(eqn.params[INLINED[name]])
            return self.walk(inner, consts, operands, path)
        return self.plain(eqn, operands, path)

    def plain(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """The results of an equation that is no call."""
        return bind(eqn, operands)


def read(atom: Any, env: Mapping[Any, Any]) -> Any:
    """The value of a variable or a literal."""
    return atom.val if isinstance(atom, Literal) else env[atom]
