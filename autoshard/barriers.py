"""A flat function whose barriers let huge values by (`passes.barriers`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import lax

from autoshard.flat import Flat
from autoshard.jax_compat import open_jaxpr
from autoshard.trace import Path, Traced


def let_by(traced: Traced, held: Mapping[Path, frozenset[int]]) -> Callable[..., list[Any]]:
    """The function over flat arguments. traced: a flat one; held: operands by barrier."""
    jaxpr, consts = open_jaxpr(traced.jaxpr)

    def run(*args: Any) -> list[Any]:
        return _LetBy(held).walk(jaxpr, consts, list(args))

    return run


class _LetBy(Flat):
    """Computes a jaxpr; these operands of barriers go by."""

    def __init__(self, held: Mapping[Path, frozenset[int]]) -> None:
        self.held = held

    def plain(self, eqn: Any, operands: Sequence[Any], path: Path) -> list[Any]:
        """An equation without a body."""
        held = self.held.get(path)
        if held is None:
            return super().plain(eqn, operands, path)
        rest = [k for k in range(len(operands)) if k not in held]
        out = list(operands)
        behind = lax.optimization_barrier(tuple(operands[k] for k in rest)) if rest else ()
        for k, x in zip(rest, behind, strict=True):
            out[k] = x
        return out
