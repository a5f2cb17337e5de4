"""What does each mesh promise?  Its problem, and the expert baselines on it as first choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cost_models.cluster import Cluster
from cost_models.units import format_bytes
from passes.anchors import anchors
from passes.baselines import BASELINES, baseline
from passes.decisions import Decisions
from passes.fusion import Fusion
from passes.ir.graph import Graph, Hint
from passes.ir.mesh import Mesh
from passes.ir.plan import Alternative
from passes.liveness import Liveness
from passes.meshes import axes_of
from passes.plan_cost import cost_of
from passes.price import price
from passes.priced import Priced
from passes.propagate import Wiring
from passes.repeats import repeats
from passes.reshard_table import PICO
from passes.solve.problem import INFINITY

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a search is about: the function, the machine and the user's wishes.

    state: as of `passes.search`. batch: input values whose leading dim is the batch. same: as of
    `passes.price`, where repeated layers decide together.
    """

    graph: Graph
    cluster: Cluster
    hints: tuple[Hint, ...]
    limit: float
    decisions: Decisions
    live: Liveness
    fusion: Fusion
    state: tuple[tuple[int, int], ...]
    batch: tuple[int, ...]
    same: tuple[int, ...] = ()


def layers_alike(setting: Setting) -> Setting:
    """The setting in which repeated layers decide together, or the same one if there are none."""
    graph = setting.graph
    tied = replace(graph, ties=(*graph.ties, *setting.state))
    found = repeats(tied, setting.decisions, setting.hints, setting.fusion)
    if found is None:
        return setting
    return replace(setting, graph=found.graph, decisions=found.decisions, same=found.same)


@dataclass(frozen=True, slots=True)
class Entry:
    """One mesh of a search.

    starts: choices to begin with. promise: seconds of the best of them that fits. baselines: those
    that are natural on this mesh, and what they cost.
    """

    priced: Priced
    starts: tuple[Sequence[int], ...]
    promise: float
    baselines: tuple[Alternative, ...]


def enter(
    setting: Setting, mesh: Mesh, solver: str, wiring: Wiring, natural: Sequence[str]
) -> Entry:
    """One mesh priced, with the baselines on it; HintError where a hint does not fit it.

    wiring: of the setting's graph. natural: the baselines that are counted exactly here.
    """
    anchors(setting.graph, mesh, setting.hints, wiring.group)  # its words are the clearest
    priced = price_on(setting, mesh)
    if solver != "ilp":
        choice = baseline(solver, priced, setting.hints, setting.batch, wiring)
        return Entry(priced, (choice,), 0.0, ())
    starts, others = [], []
    promise = math.inf
    for name in ("propagate", *BASELINES):
        choice = baseline(name, priced, setting.hints, setting.batch, wiring)
        starts.append(choice)
        if priced.problem.feasible(choice):
            promise = min(promise, priced.problem.cost(choice) / PICO + priced.constant)
        if name in natural:
            others.append(_counted(setting, priced, name, choice))
    return Entry(priced, tuple(starts), promise, tuple(others))


def _counted(setting: Setting, priced: Priced, name: str, choice: Sequence[int]) -> Alternative:
    """A baseline as an alternative."""
    cost = cost_of(priced, choice) if priced.problem.cost(choice) < INFINITY else None
    note = ""
    if cost is None:
        note = "breaks a hint"
    elif cost.peak_memory > setting.limit:
        note = f"needs {format_bytes(cost.peak_memory)} of memory"
    return Alternative(name, axes_of(priced.mesh), cost, note)


def price_on(setting: Setting, mesh: Mesh) -> Priced:
    """The problem of a setting on one mesh; HintUnmet where a hint leaves no sharding."""
    return price(
        setting.graph,
        mesh,
        setting.cluster,
        setting.decisions,
        setting.live,
        setting.fusion,
        setting.limit,
        setting.same,
    )
