"""A flat function whose backward half makes again what layers made, and its scans, too.

Which, `passes.remat_layers` says, and `passes.remat_scans`. Before the first equation that reads
something of a layer, the layer's equations are computed again, of what they were made of, behind a
barrier: with the gradient that is read there, so that XLA neither merges them with the first time
nor computes them before that gradient is there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jax import lax

from autoshard.jax_compat import Var, open_jaxpr, traced_at
from autoshard.rewalk import read
from autoshard.through_scans import Through, done_again
from autoshard.trace import Path, Traced
from passes.ir.graph import Graph
from passes.remat_region import Layer
from passes.through_scans import ThroughScans


def layers_again(
    traced: Traced, layers: Sequence[Layer], scans: ThroughScans
) -> Callable[..., list[Any]]:
    """The function over flat arguments. traced: a flat one, but for what `Kept` leaves."""
    jaxpr, consts = open_jaxpr(traced.jaxpr)

    def run(*args: Any) -> list[Any]:
        walker = _Layers(traced.graph, scans, layers, traced.backward)
        return walker.walk(jaxpr, consts, list(args))

    return run


class _Layers(Through):
    """Computes a flat jaxpr; its backward half reads what is made again."""

    def __init__(
        self,
        graph: Graph,
        scans: ThroughScans,
        layers: Sequence[Layer],
        backward: Collection[Path],
    ) -> None:
        super().__init__(graph, scans)
        self.backward = backward
        self.before: dict[Path, list[Layer]] = {}
        for layer in layers:
            self.before.setdefault(layer.before, []).append(layer)
        self.late: dict[Path, dict[Any, Any]] = {}  # by body: variable to what is made again

    def operands(self, eqn: Any, env: Mapping[Any, Any], path: Path) -> list[Any]:
        """What an equation takes: of the backward half, what was made again where it was."""
        at = path[:-1]
        for layer in self.before.get(path, ()):
            self.make(layer, eqn, env)
        late = self.late.get(at, {}) if path in self.backward else {}
        return [late[v] if isinstance(v, Var) and v in late else read(v, env) for v in eqn.invars]

    def make(self, layer: Layer, reader: Any, env: Mapping[Any, Any]) -> None:
        """Make a layer's values again. reader: the equation that takes them first."""
        jaxpr, late = self.jaxprs[layer.body], self.late.setdefault(layer.body, {})
        beside = [self.made_by(v, jaxpr, layer.body) for v in layer.beside]
        leaves = [self.value_at(v, jaxpr, layer.body) for v in layer.leaves]
        names = [*leaves, *beside]
        given = [*(env[v] for v in leaves), *(late.get(v, env[v]) for v in beside)]
        with traced_at(reader):
            behind = lax.optimization_barrier(tuple(given))
        held = dict(zip(names, behind, strict=True))
        late.update({v: held[v] for v in beside})
        made = done_again(jaxpr, layer.equations, {**env, **held}, reader)
        for v in layer.values:
            var = self.made_by(v, jaxpr, layer.body)
            late[var] = made[var]

    def value_at(self, v: int, jaxpr: Any, at: Path) -> Any:
        """The variable of a value in a body: of what it is given, or of what it makes."""
        maker = self.graph.producers()[v]
        if maker < 0:
            return jaxpr.invars[self.graph.inputs.index(v)]
        op = self.graph.ops[maker]
        if op.is_link and at and op.path[:-2] == at[:-1]:
            return jaxpr.invars[int(op.path[-1])]
        return self.made_by(v, jaxpr, at)
