"""From what a user asks of stages to the plan of a pipeline: `plan_stages`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import gcd
from typing import Any, TypeGuard

import numpy as np

from autoshard.pipeline_costs import PipelineCosts
from autoshard.pipeline_data import as_plan
from autoshard.pipeline_search import Wanted, search_pipelines
from autoshard.pipelined import OUTER, PipelinedPlan
from autoshard.scan_pieces import layers_of
from autoshard.time_axes import AUTO, BATCH, batch_of, begun, lengths, loop_over
from autoshard.trace import Traced
from cost_models.cluster import Cluster
from passes.hints import hints_for
from passes.ir.graph import Hint
from passes.ir.mesh import Mesh, MeshError
from passes.ir.plan import TimeAxis
from passes.meshes import names_of
from passes.microbatch_loop import NoTimeLoop, found_batch
from passes.pipeline.published import PUBLISHED, SEARCHED, chunks_of, published
from passes.pipeline.schedule import ScheduleError
from passes.search import Progress
from passes.time_hints import over_devices
from passes.time_loop import unit_path

_MANY = 10**6


def checked_stages(stages: object) -> int | None:
    """The number of stages that was asked for; None for "auto"."""
    if stages == "auto":
        return None
    if not _is_count(stages):
        raise ValueError(f"stages is a whole number from 1 on, or 'auto', not {stages!r}")
    return int(stages)


def checked_chunks(chunks: object, schedule: str | None) -> int | None:
    """The pieces per stage that were asked for. schedule: the name of the one that is wanted.

    Raises ValueError for no number, and ScheduleError where the schedule has another.
    """
    if chunks is None:
        return None
    if not _is_count(chunks):
        raise ValueError(f"chunks is a whole number from 1 on, not {chunks!r}")
    fixed = None if schedule is None else chunks_of(published(schedule))
    if fixed not in (None, chunks):
        open_to_any = " and ".join(p.name for p in PUBLISHED if chunks_of(p) is None)
        raise ScheduleError(
            f"{schedule} has {fixed} chunk{'s' * (fixed > 1)} per stage, not {chunks}: leave chunks"
            f" out, or choose {open_to_any}, of any number of chunks"
        )
    return int(chunks)


def checked_schedule(schedule: object) -> str | None:
    """The name of the schedule that was asked for; None where any will do."""
    if schedule is None:
        return None
    if not isinstance(schedule, str):
        raise TypeError(f"schedule is the name of one, such as '1F1B', not {schedule!r}")
    name = published(schedule).name
    return None if name == SEARCHED else name


def checked_shared_update(shared: object) -> bool | None:
    """Whether groups are to share the update; None for where that is as good."""
    if shared is not None and not isinstance(shared, bool):
        raise TypeError(f"shared_update is True, False or None, not {shared!r}")
    return shared


def with_stages(mesh: object, stages: object) -> Any:
    """The mesh that was asked for, with the number of stages where that stands beside it only."""
    if isinstance(mesh, Mapping) and mesh and "stage" not in mesh and _is_count(stages):
        return {"stage": stages, **mesh}
    return mesh


def _is_count(x: object) -> TypeGuard[int]:
    """Whether it is a whole number from 1 on; numpy's too, so that it may be computed."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool) and int(x) > 0


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
    name = checked_schedule(schedule)
    chunks = checked_chunks(chunks, name)
    shared_update = checked_shared_update(shared_update)
    most = cluster.memory_limit if limit is None else limit
    asked_of = (*traced.graph.hints, *hints_for(traced.graph, hints or {}))
    wanted = _wanted(traced, cluster, mesh, asked_of, over)
    asked = {"stages": stages, "schedule": name, "chunks": chunks}
    given = {k: v for k, v in asked.items() if v is not None}
    given |= {} if over.size == AUTO else {"microbatches": over.size}
    call = fn, args, kwargs, options
    costs = PipelineCosts(
        *call, cluster, most, hints, fused_attention, solver, over, shared_update, traced
    )
    found = search_pipelines(costs, _with(wanted, given), progress)
    data = as_plan(found, traced, cluster, most, fused_attention, over, asked_of)
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
    hints: Sequence[Hint],
    over: TimeAxis,
) -> Wanted:
    """What is known beforehand of the function, and asked for by its mesh."""
    graph = traced.graph
    sizes = lengths(traced, over)
    if not sizes:
        raise NoTimeLoop(
            f"{graph.name} has no batch dimension: no leading dim of an input splits its "
            "operations, so that nothing can run in microbatches; where the batch is another dim, "
            "hints say so, such as hints={'x': P(None, 'micro')}"
        )
    flops = sum(op.rule.flops * graph.trips(op.region) for op in graph.ops)
    state = float(sum(graph.values[v].type.nbytes for v in graph.inputs))
    axes = tuple(n for n in names_of(over_devices(hints, (over.name,))) if n not in OUTER) or (
        "model",
    )
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
    if not over.dims:
        fixed["found"] = found_batch(graph, batch_of(traced))
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
