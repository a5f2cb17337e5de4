"""Which mesh, and which plan on it?  `search(graph, cluster, ...) -> Found`.

Every sensible factorisation of the device count into at most three axes is tried, the slowest axis
first, so that the last axis lies on the fastest links. On each mesh the Problem is built once; the
expert baselines are read back from it as starting points, so that the answer never costs more than
any of them. The meshes and baselines that lost stay as alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cost_models.cluster import Cluster
from cost_models.topology import lay
from cost_models.units import format_bytes
from passes.anchors import anchors
from passes.assemble import assemble, cost_of
from passes.attention import NONE, Attention, attention
from passes.baselines import BASELINES, baseline
from passes.batch import find_batch
from passes.compiler import scheduler
from passes.decisions import Decisions, decide
from passes.fitting import fixed, solve_within
from passes.fusion import Fusion, fuse
from passes.hints import HintError
from passes.ir.graph import Graph, Hint
from passes.ir.mesh import Mesh
from passes.ir.plan import Alternative, Plan
from passes.liveness import Liveness, liveness
from passes.price import HintUnmet, Priced, price
from passes.reshard_table import PICO
from passes.solve.problem import Solution
from passes.worth import worth_of_memory

SOLVERS = ("ilp", "propagate", *BASELINES)
AXIS_NAMES = ("data", "model", "seq")
Progress = Callable[[str], None]


class NoFeasiblePlan(ValueError):
    """No plan fits: the sentence says how many bytes short, who holds them, and what would help."""


@dataclass(frozen=True, slots=True)
class Found:
    """The plan, and the priced problem and solution behind it (for explanations)."""

    plan: Plan
    priced: Priced
    solution: Solution


@dataclass(frozen=True, slots=True)
class Setting:
    """What a search is about: the function, the machine and the user's wishes."""

    graph: Graph
    cluster: Cluster
    hints: tuple[Hint, ...]
    limit: float
    decisions: Decisions
    live: Liveness
    fusion: Fusion
    state: tuple[tuple[int, int], ...]


def search(
    graph: Graph,
    cluster: Cluster,
    *,
    mesh: Mesh | None = None,
    hints: Sequence[Hint] = (),
    memory_limit: float | None = None,
    solver: str = "ilp",
    state: Sequence[tuple[int, int]] = (),
    fused_attention: bool = False,
    progress: Progress | None = None,
) -> Found:
    """The best plan found. graph: without dead code. hints: all of them, the graph's included.

    state: (input, output) pairs in which the output takes the input's place at the next step; they
    get one sharding, and share memory where the input is donated. memory_limit: bytes per device,
    None for the cluster's. fused_attention: price attention as one kernel. Raises NoFeasiblePlan,
    and HintError when hints fit none of the meshes.
    """
    limit = cluster.memory_limit if memory_limit is None else memory_limit
    fused = attention(graph) if fused_attention else NONE
    fusion = fuse(graph, cluster.platform, fused)
    tied = replace(graph, ties=(*graph.ties, *state))
    given = [p for p in state if p[0] in graph.donated]
    setting = Setting(
        graph,
        cluster,
        tuple(hints),
        limit,
        decide(tied, hints),
        liveness(graph, fusion.stored, given, fusion.filled, scheduler(cluster), fusion.casts),
        fusion,
        tuple(state),
    )
    batch = find_batch(graph, [p[0] for p in state])
    meshes = [mesh] if mesh is not None else candidate_meshes(cluster, _names(hints))
    if solver not in ("ilp", "propagate"):
        meshes = _natural(solver, meshes)
    tell = progress or (lambda _: None)
    lost: list[Alternative] = []
    entered, unfit = _entries(setting, meshes, batch, solver, lost, tell)
    if len(unfit) == len(meshes):
        raise unfit[0]
    answers: list[tuple[Priced, Solution]] = []
    best = math.inf
    # The most promising first: the others need only be searched until they can not win.
    left = sorted(entered, key=lambda e: e.promise)
    interrupted = False
    while left and not interrupted:
        entry = left.pop(0)
        priced = entry.priced
        tell(f"mesh {priced.mesh}")
        constant = priced.constant * PICO
        if solver == "ilp":
            solution = solve_within(priced, entry.starts, limit, best - constant)
            interrupted = solution.stopped == "interrupted"
        else:
            solution = fixed(priced.problem, entry.starts[0])
        if solution.choice or not priced.problem.nodes:
            answers.append((priced, solution))
            best = min(best, solution.cost + constant)
        else:
            lost.append(Alternative(solver, _axes(priced.mesh), None, _why(priced, solution)))
    if not answers and interrupted:
        raise KeyboardInterrupt
    if not answers:
        raise NoFeasiblePlan(_message(setting, lost))
    answers.sort(key=lambda a: (a[1].cost + a[0].constant * PICO, meshes.index(a[0].mesh)))
    priced, solution = answers[0]
    notes = [_of_attention(fused)] * fused_attention
    if interrupted:
        notes.append(f"interrupted: {len(left)} of {len(entered)} meshes were not searched")
    notes += worth_of_memory(priced, solution)
    plan = assemble(priced, solution, solver, limit, notes)
    plan = replace(plan, fused_attention=fused_attention)
    for p, s in answers[1:]:
        cost = cost_of(p, s.choice)
        lost.append(Alternative(solver, _axes(p.mesh), cost, _compare(plan, cost.step_time)))
    order = sorted(lost, key=lambda a: (a.cost is None, a.cost.step_time if a.cost else 0.0))
    return Found(replace(plan, alternatives=tuple(order)), priced, solution)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One mesh of a search. starts: choices to begin with; promise: what the best of them costs."""

    priced: Priced
    starts: tuple[Sequence[int], ...]
    promise: float


def _entries(
    setting: Setting,
    meshes: Sequence[Mesh],
    batch: Sequence[int],
    solver: str,
    lost: list[Alternative],
    tell: Progress,
) -> tuple[list[_Entry], list[HintError]]:
    """Each mesh priced, its baselines counted as lost; and the errors of those no hint fits."""
    entered: list[_Entry] = []
    unfit: list[HintError] = []
    for m in meshes:
        tell(f"pricing mesh {m}")
        try:
            entry, others = _enter(setting, m, batch, solver)
        except HintError as error:
            unfit.append(error)
            lost.append(Alternative(solver, _axes(m), None, "breaks a hint"))
            continue
        entered.append(entry)
        lost += others
    return entered, unfit


def _enter(
    setting: Setting, mesh: Mesh, batch: Sequence[int], solver: str
) -> tuple[_Entry, list[Alternative]]:
    """One mesh priced, with the baselines on it; HintError where a hint does not fit it."""
    anchors(setting.graph, mesh, setting.hints)  # its words are the clearest
    priced = price(
        setting.graph,
        mesh,
        setting.cluster,
        setting.decisions,
        setting.live,
        setting.fusion,
        setting.limit,
    )
    if solver != "ilp":
        choice = baseline(solver, priced, setting.hints, batch)
        return _Entry(priced, (choice,), 0.0), []
    starts, others = [], []
    promise = math.inf
    for name in ("propagate", *BASELINES):
        choice = baseline(name, priced, setting.hints, batch)
        starts.append(choice)
        cost = cost_of(priced, choice) if priced.problem.cost(choice) < 1e18 else None
        note = ""
        if cost is None:
            note = "breaks a hint"
        elif cost.peak_memory > setting.limit:
            note = f"needs {format_bytes(cost.peak_memory)} of memory"
        else:
            promise = min(promise, cost.step_time)
        others.append(Alternative(name, _axes(mesh), cost, note))
    return _Entry(priced, tuple(starts), promise), others


# Meshes


def candidate_meshes(cluster: Cluster, names: Sequence[str] = ()) -> list[Mesh]:
    """Factorisations of the device count into one to three axes, without those that are the same.

    names: axis names that hints use; every mesh then has them all, in this order, and splits
    something along each unless the devices are too few.
    """
    return _meshes(cluster, names, 2) or _meshes(cluster, names, 1)


def _meshes(cluster: Cluster, names: Sequence[str], least_size: int) -> list[Mesh]:
    wanted = [*names, *(n for n in AXIS_NAMES if n not in names)]
    least = max(1, len(names))
    out: list[Mesh] = []
    seen: set[object] = set()
    most = max(3, least) if least_size > 1 else least
    for count in range(least, most + 1):
        for sizes in _factorisations(cluster.devices, count, least_size):
            # Without hints names mean nothing: the same links in another order are the same.
            links = lay(cluster, sizes)
            key: object = sizes if names else tuple(sorted(map(repr, links)))
            if key not in seen:
                seen.add(key)
                out.append(Mesh(tuple(wanted[:count]), sizes))
    return out


def _factorisations(n: int, count: int, least: int) -> list[tuple[int, ...]]:
    if count == 1:
        return [(n,)] if n >= least else []
    out = []
    for first in sorted((d for d in range(least, n + 1) if n % d == 0), reverse=True):
        out += [(first, *rest) for rest in _factorisations(n // first, count - 1, least)]
    return out


def _natural(solver: str, meshes: Sequence[Mesh]) -> list[Mesh]:
    """The meshes an expert would use a baseline on: one axis, two for fsdp+tp, either for tp."""
    want = {"tp": (1, 2), "fsdp+tp": (2,)}.get(solver, (1,))
    found = [m for m in meshes if len([s for s in m.sizes if s > 1]) in want]
    return found or list(meshes)


def _names(hints: Sequence[Hint]) -> tuple[str, ...]:
    names = [a for h in hints for axes in h.dims if axes for a in axes]
    order = {n: k for k, n in enumerate(AXIS_NAMES)}
    return tuple(sorted(dict.fromkeys(names), key=lambda n: (order.get(n, 99),)))


def _axes(mesh: Mesh) -> tuple[tuple[str, int], ...]:
    return tuple(zip(mesh.names, mesh.sizes, strict=True))


# Words


def _of_attention(found: Attention) -> str:
    count = len(found.softmaxes)
    return (
        f"fused_attention: {count or 'no'} attention{'s' if count != 1 else ''} found and priced "
        "as fused kernels, which no scores leave. XLA makes none by itself: call one"
    )


def _compare(plan: Plan, seconds: float) -> str:
    ratio = seconds / plan.cost.step_time if plan.cost.step_time else math.inf
    return f"{ratio:.2f}x the step time"


def _why(priced: Priced, solution: Solution) -> str:
    problem = priced.problem
    short = solution.shortage
    if solution.stopped == "cutoff":
        return "nothing on it is as fast"
    if short is None:
        return "no feasible choice found"
    held = ", ".join(
        f"{problem.nodes[n].label} {format_bytes(b)}"
        for n, b in list(zip(short.nodes, short.smallest, strict=True))[:4]
    )
    return f"{format_bytes(short.short)} short even at its smallest (held by {held})"


def _message(setting: Setting, lost: Sequence[Alternative]) -> str:
    notes = "; ".join(
        f"{' '.join(f'{n}={s}' for n, s in a.mesh)}: {a.note}" for a in lost if a.cost is None
    )
    return (
        f"no plan of {setting.graph.name} fits in {format_bytes(setting.limit)} per device. "
        f"{notes}. More devices, a smaller batch, rematerialisation (jax.checkpoint), donated "
        "state (donate_argnums), fewer hard hints or a larger memory_limit would help"
    )


__all__ = [
    "SOLVERS",
    "Found",
    "HintUnmet",
    "Mapping",
    "NoFeasiblePlan",
    "candidate_meshes",
    "search",
]
