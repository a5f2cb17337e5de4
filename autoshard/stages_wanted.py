"""From what a user asks of stages to the plan of a pipeline: `plan_stages`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import gcd
from typing import Any

from autoshard.pipeline_costs import PipelineCosts
from autoshard.pipeline_data import as_plan
from autoshard.pipeline_search import Wanted, search_pipelines
from autoshard.pipelined import OUTER, PipelinedPlan
from autoshard.scan_pieces import layers_of
from autoshard.time_axes import AUTO, BATCH, begun, lengths, loop_over
from autoshard.trace import Traced
from cost_models.cluster import Cluster
from passes.hints import hints_for
from passes.ir.mesh import Mesh, MeshError
from passes.ir.plan import TimeAxis
from passes.meshes import names_of
from passes.microbatch_loop import NoTimeLoop
from passes.pipeline.published import published
from passes.search import Progress
from passes.time_hints import over_devices
from passes.time_loop import unit_path

_MANY = 10**6


def checked_stages(stages: object) -> int | None:
    """The number of stages that was asked for; None for "auto"."""
    if stages == "auto":
        return None
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise ValueError(f"stages is a whole number from 1 on, or 'auto', not {stages!r}")
    return stages


def plan_stages(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
    traced: Traced,
    cluster: Cluster,
    *,
    stages: int | None,
    over: TimeAxis = BATCH,
    schedule: str | None = None,
    chunks: int | None = None,
    shared_update: bool | None = None,
    mesh: Mapping[str, int] | None = None,
    hints: Mapping[str, Any] | None = None,
    limit: float | None = None,
    solver: str = "ilp",
    fused_attention: bool = False,
    progress: Progress | None = None,
) -> PipelinedPlan:
    """The best pipeline found. traced: of fn; stages: None to search. over: the axis of the
    microbatches, of the size AUTO to search.

    Raises NoFeasiblePlan, NoStages, NoTimeLoop, ScheduleError, HintError.
    """
    name = None if schedule in (None, "auto") else published(str(schedule)).name
    most = cluster.memory_limit if limit is None else limit
    wanted = _wanted(traced, cluster, mesh, hints or {}, over)
    asked = {"stages": stages, "schedule": name, "chunks": chunks}
    given = {k: v for k, v in asked.items() if v is not None}
    given |= {} if over.size == AUTO else {"microbatches": over.size}
    call = fn, args, kwargs, options
    costs = PipelineCosts(*call, cluster, most, hints, fused_attention, solver, over, shared_update)
    found = search_pipelines(costs, _with(wanted, given), progress)
    data = as_plan(found, traced, cluster, most, fused_attention, over)
    return PipelinedPlan(data, found.best.cut)


def _with(wanted: Wanted, given: Mapping[str, Any]) -> Wanted:
    fixed = wanted.stages
    if fixed is not None and given.get("stages", fixed) != fixed:
        raise MeshError(f"stages={given['stages']}, but the mesh has an axis stage={fixed}")
    return replace(wanted, **given)


def _wanted(
    traced: Traced,
    cluster: Cluster,
    mesh: Mapping[str, int] | None,
    hints: Mapping[str, Any],
    over: TimeAxis,
) -> Wanted:
    """What is known beforehand of the function, and asked for by its mesh."""
    graph = traced.graph
    sizes = lengths(traced, over)
    if not sizes:
        raise NoTimeLoop(
            f"{graph.name} has no batch dimension: no leading dim of an input splits its "
            "operations, so that nothing can run in microbatches"
        )
    flops = sum(op.rule.flops * graph.trips(op.region) for op in graph.ops)
    state = float(sum(graph.values[v].type.nbytes for v in graph.inputs))
    own = over_devices((*graph.hints, *hints_for(graph, hints)), (over.name,))
    axes = tuple(n for n in names_of(own) if n not in OUTER) or ("model",)
    fixed: dict[str, Any] = {"axes": axes}
    if mesh is not None:
        inside = {n: s for n, s in mesh.items() if n not in OUTER} or {axes[0]: 1}
        fixed |= {
            "mesh": Mesh.of(inside),
            "stages": mesh.get("stage"),
            "groups": mesh.get("data", 1),
        }
    samples = gcd(*sizes)
    read = _read(traced, samples, over)
    return Wanted(cluster.devices, samples, _layers(traced), flops, state, read, **fixed)


def _read(traced: Traced, samples: int, over: TimeAxis) -> float:
    """Bytes of the arguments that what runs in microbatches reads as they are.

    All others, such as an optimizer's moments, only what comes before and after it does.
    """
    graph = traced.graph
    steps = next((n for n in range(2, samples + 1) if samples % n == 0), 0)
    if not steps:
        return 0.0
    loop = loop_over(traced, begun(traced, replace(over, size=steps)))
    inside = {v for op in graph.ops if loop.phases[unit_path(op)] == "loop" for v in op.inputs}
    return float(sum(graph.values[v].type.nbytes for v in graph.inputs if v in inside))


def _layers(traced: Traced) -> int:
    """Into how many pieces a function can be cut at most; many where no scan holds its layers."""
    graph, length = traced.graph, layers_of(traced)
    if length <= 1:
        return _MANY
    whole = inside = 0.0
    scans: set[int] = set()
    for op in graph.ops:
        flops = op.rule.flops * graph.trips(op.region)
        whole += flops
        outer = op.region
        while outer and graph.regions[outer].parent:
            outer = graph.regions[outer].parent
        if outer and graph.regions[outer].kind == "scan" and graph.regions[outer].trips == length:
            inside += flops
            scans.add(outer)
    return length * max(1, len(scans) // 2) if inside > whole / 2 else _MANY
