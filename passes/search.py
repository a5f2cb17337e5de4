"""Which mesh, and which plan on it?  `search(graph, cluster, ...) -> Found`.

Every sensible mesh is tried. On each the Problem is built once; the expert baselines are read back
from it as starting points, so that the answer never costs more than any of them. The meshes and
baselines that lost stay as alternatives.

Where most of a program repeats itself, the meshes are compared with repeated layers split alike:
then a problem is as large as a few layers. The best mesh, and others as good, are searched again
with each layer by itself, from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from cost_models.cluster import Cluster
from cost_models.units import format_bytes
from passes.assemble import assemble
from passes.attention import NONE, Attention, attention
from passes.baselines import BASELINES
from passes.batch import find_batch
from passes.compiler import quotients_kept, scheduler, tanh_bytes
from passes.decisions import decide
from passes.entries import Progress, Setting, layers_alike, price_on
from passes.fitting import solve_within
from passes.fusion import fuse
from passes.ir.graph import Graph, Hint
from passes.ir.mesh import Mesh
from passes.ir.plan import Alternative, Plan
from passes.liveness import liveness
from passes.meshes import axes_of, candidate_meshes, names_of, natural_meshes
from passes.plan_cost import cost_of
from passes.priced import HintUnmet, Priced
from passes.reshard_table import PICO
from passes.rounds import Searched, search_all
from passes.solve.problem import Solution
from passes.untie import carried_over
from passes.worth import worth_of_memory

SOLVERS = ("ilp", "propagate", *BASELINES)
# Where repeated layers are alike, a mesh that is this much slower may still win when they are not:
# letting 80 layers of LLaMA differ on 4 x 8 x 8 of v5p gained 0.01 % of the step.
_AS_GOOD = 0.002


class NoFeasiblePlan(ValueError):
    """No plan fits: the sentence says how many bytes short, who holds them, and what would help."""


@dataclass(frozen=True, slots=True)
class Found:
    """The plan, and the priced problem and solution behind it (for explanations)."""

    plan: Plan
    priced: Priced
    solution: Solution


def search(
    graph: Graph,
    cluster: Cluster,
    *,
    mesh: Mesh | None = None,
    hints: Sequence[Hint] = (),
    memory_limit: float | None = None,
    solver: str = "ilp",
    state: Sequence[tuple[int, int]] = (),
    together: Sequence[tuple[int, int]] = (),
    fused_attention: bool = False,
    time_axes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Found:
    """The best plan found. graph: without dead code. hints: all of them, the graph's included.

    state: (input, output) pairs in which the output takes the input's place at the next step; they
    get one sharding, and share memory where the input is donated. together: other pairs of values
    that get one sharding. memory_limit: bytes per device, None for the cluster's. fused_attention:
    price attention as one kernel. time_axes: names that no axis of a mesh may have. Raises
    NoFeasiblePlan, and HintError when hints fit none of the meshes.
    """
    fused = attention(graph) if fused_attention else NONE
    limit = cluster.memory_limit if memory_limit is None else memory_limit
    setting = _setting(graph, cluster, hints, limit, state, together, fused)
    meshes = [mesh] if mesh is not None else candidate_meshes(cluster, names_of(hints), time_axes)
    if solver not in ("ilp", "propagate"):
        meshes = natural_meshes(solver, meshes)
    tell = progress or (lambda _: None)
    alike = layers_alike(setting) if solver == "ilp" else setting
    searched = search_all(alike, meshes, solver, tell)
    if alike.same and not searched.won and not searched.left and searched.answers:
        alike = setting  # what fits nowhere with layers alike may fit with each by itself
        searched = search_all(alike, meshes, solver, tell)
    lost, won = _lost(searched, meshes, solver), searched.won
    if not won:
        raise _nothing(searched, setting, lost)
    notes = [_of_attention(fused)] * fused_attention
    best = {won[0]: (searched.priced(won[0]), searched.answers[won[0]].solution)}
    if alike.same:
        free = {} if searched.interrupted else _each_layer_by_itself(setting, searched, tell)
        notes.append(_of_layers(alike.same, len(meshes), bool(free)))
        best = free or {k: (p, _unproven(s)) for k, (p, s) in best.items()}
    cut_short = any(s.stopped == "interrupted" for _, s in best.values())
    if searched.interrupted or cut_short:
        notes.append(_of_interrupt(searched))
    first = min(best, key=lambda k: (_seconds(*best[k]), k))
    priced, solution = best[first]
    notes += worth_of_memory(priced, solution)
    plan = assemble(priced, solution, solver, limit, notes)
    plan = replace(plan, fused_attention=fused_attention)
    for k in won:
        cost = cost_of(best[k][0], best[k][1].choice) if k in best else searched.answers[k].cost
        if k != first and cost:
            why = _compare(plan, cost.step_time)
            lost.append(Alternative(solver, axes_of(meshes[k]), cost, why))
    order = sorted(lost, key=lambda a: (a.cost is None, a.cost.step_time if a.cost else 0.0))
    return Found(replace(plan, alternatives=tuple(order)), priced, solution)


def _setting(
    graph: Graph,
    cluster: Cluster,
    hints: Sequence[Hint],
    limit: float,
    state: Sequence[tuple[int, int]],
    together: Sequence[tuple[int, int]],
    fused: Attention,
) -> Setting:
    fusion = fuse(graph, cluster.platform, fused, quotients_kept(cluster), tanh_bytes(cluster))
    given = [p for p in state if p[0] in graph.donated]
    return Setting(
        graph,
        cluster,
        tuple(hints),
        limit,
        decide(replace(graph, ties=(*graph.ties, *state, *together)), hints),
        liveness(
            graph,
            fusion.stored,
            given,
            fusion.filled,
            scheduler(cluster),
            fusion.casts,
            fusion.together,
            cluster.platform == "tpu",
        ),
        fusion,
        tuple(state),
        tuple(find_batch(graph, [p[0] for p in state])),
    )


def _lost(searched: Searched, meshes: Sequence[Mesh], solver: str) -> list[Alternative]:
    """The baselines, and the meshes on which nothing was found."""
    out: list[Alternative] = []
    for k, promise in enumerate(searched.promises):
        out += promise.baselines
        answer = searched.answers.get(k)
        if promise.unfit:
            out.append(Alternative(solver, axes_of(meshes[k]), None, "breaks a hint"))
        elif answer and not answer.cost:
            out.append(Alternative(solver, axes_of(meshes[k]), None, answer.why))
    return out


def _nothing(searched: Searched, setting: Setting, lost: Sequence[Alternative]) -> BaseException:
    """What to raise where no mesh has a plan."""
    unfit = [p.unfit for p in searched.promises if p.unfit]
    if len(unfit) == len(searched.promises):
        return unfit[0]
    if searched.left:
        return KeyboardInterrupt()
    return NoFeasiblePlan(_message(setting, lost))


def _each_layer_by_itself(
    setting: Setting, searched: Searched, tell: Progress
) -> dict[int, tuple[Priced, Solution]]:
    """The best mesh, and those as good, searched again with every layer free; {} if interrupted."""
    out = {}
    best = searched.answers[searched.won[0]].seconds
    with suppress(KeyboardInterrupt):
        for k in searched.won:
            if searched.answers[k].seconds <= best * (1 + _AS_GOOD):
                alike = searched.priced(k)
                tell(f"mesh {alike.mesh}, each layer by itself")
                priced = price_on(setting, alike.mesh)
                start = carried_over(alike, searched.answers[k].solution.choice, priced)
                out[k] = priced, solve_within(priced, (start,), setting.limit)
    return out


def _unproven(solution: Solution) -> Solution:
    """A solution of another problem: as good, but its bound is none of this one."""
    return replace(solution, bound=min(0.0, solution.cost), status="feasible", prices=())


def _seconds(priced: Priced, solution: Solution) -> float:
    return solution.cost / PICO + priced.constant


def _of_layers(same: Sequence[int], meshes: int, free: bool) -> str:
    repeated = len(same) - len(set(same))
    what = f"{repeated} of {len(same)} operations repeat others: "
    if not free:
        return what + "repeated layers are split alike, which was not searched further"
    if meshes == 1:
        return what + "searched with repeated layers split alike, then with each layer by itself"
    return (
        what + f"the {meshes} meshes were compared with repeated layers split alike, the best "
        "searched again with each layer by itself"
    )


# Words


def _of_interrupt(searched: Searched) -> str:
    if not searched.left:
        return "interrupted: the search was not finished"
    entered = searched.left + len(searched.answers)
    return f"interrupted: {searched.left} of {entered} meshes were not searched"


def _of_attention(found: Attention) -> str:
    count = len(found.softmaxes)
    return (
        f"fused_attention: {count or 'no'} attention{'s' if count != 1 else ''} found and priced "
        "as fused kernels, which no scores leave. XLA makes none by itself: call one"
    )


def _compare(plan: Plan, seconds: float) -> str:
    ratio = seconds / plan.cost.step_time if plan.cost.step_time else math.inf
    return f"{ratio:.2f}x the step time"


def _message(setting: Setting, lost: Sequence[Alternative]) -> str:
    meshes: dict[str, list[str]] = {}
    for a in lost:
        if a.cost is None:
            meshes.setdefault(a.note, []).append(" ".join(f"{n}={s}" for n, s in a.mesh))
    notes = "; ".join(f"{', '.join(of)}: {note}" for note, of in meshes.items())
    return (
        f"no plan of {setting.graph.name} fits in {format_bytes(setting.limit)} per device. "
        f"{notes}. More devices, microbatches, rematerialisation (remat='auto'), donated "
        "state (donate_argnums), fewer hard hints or a larger memory_limit would help"
    )


__all__ = ["SOLVERS", "Found", "HintUnmet", "NoFeasiblePlan", "Progress", "search"]
