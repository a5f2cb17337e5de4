"""What a user calls: `plan(fn, *args)`, and the decorator `parallelize`."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np

from autoshard.blockwise import checked as checked_blocks
from autoshard.blockwise import first_that_fits, that_may_help
from autoshard.bound_plan import Plan, traced_for
from autoshard.devices import cluster_here
from autoshard.microbatches import batch_sizes, checked, fastest
from autoshard.parallelized import Parallelized
from autoshard.stages_wanted import checked_stages, plan_stages
from autoshard.state import state_pairs
from autoshard.trace import Traced
from cost_models.cluster import Cluster
from cost_models.cluster import cluster as read_cluster
from cost_models.units import parse_bytes
from passes.block_counts import Blocks
from passes.hints import hints_for
from passes.ir.mesh import Mesh
from passes.microbatch_loop import NoTimeLoop
from passes.search import SOLVERS, NoFeasiblePlan, Progress, search

Hints = Mapping[str, Any]
_FEW = 64  # devices on which one program for all of them is searched beside pipelines


def plan(
    fn: Callable[..., Any],
    *args: Any,
    cluster: str | Cluster | None = None,
    mesh: Mapping[str, int] | None = None,
    hints: Hints | None = None,
    donate_argnums: int | Sequence[int] = (),
    memory_limit: float | str | None = None,
    solver: str = "ilp",
    fused_attention: bool = False,
    microbatches: int | str | None = None,
    blockwise: int | str | None = None,
    stages: int | str | None = None,
    schedule: str | None = None,
    chunks: int | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan how to run fn(*args) on a cluster. Nothing is allocated, compiled or run.

    args: pytrees of arrays or jax.ShapeDtypeStruct. cluster: such as "cpu:8" or "tpu-v5e:4x4"; the
    devices jax has when omitted. mesh: axis sizes, or None to search. hints: path glob to
    PartitionSpec. memory_limit: bytes per device, or text such as "12GiB". solver: "ilp",
    "propagate", "dp", "fsdp", "tp" or "fsdp+tp". fused_attention: price attention as one kernel
    that never stores its scores, where a program that calls such a kernel is meant; XLA makes none
    by itself. microbatches: into how many parts the batch is cut, one after the other (gradient
    accumulation: the same numbers in less memory); "auto" for the fastest number that fits.
    blockwise: into how many blocks huge values are cut, such as the scores of attention, so that
    they are never there as a whole; "auto" for as few as fit.

    stages: into how many stages of a pipeline fn is cut, or "auto" for the fastest number; the
    answer is then a PipelinedPlan, but for "auto" on up to 64 devices where one program for all of
    them is faster. Of a pipeline, microbatches (None: the fastest number) are those
    of each data-parallel group, mesh may name its axes `stage` and `data` besides those that a
    group shards over, schedule is a name such as "1F1B" or "ZB-V", and chunks are pieces of the
    model per stage where a schedule leaves that open. A parallelized fn brings its own hints,
    static and donated arguments.

    Raises NoFeasiblePlan, HintError, HintConflict, UnknownCluster, NoTimeLoop, NoBlocks, NoStages,
    ScheduleError, ValueError, TypeError.
    """
    options = {} if donate_argnums == () else {"donate_argnums": donate_argnums}
    wishes = _Wishes(
        cluster,
        mesh,
        hints,
        memory_limit,
        solver,
        fused_attention,
        microbatches,
        blockwise,
        stages,
        schedule,
        chunks,
        progress,
    )
    return _plan(fn, args, {}, options, wishes)


@dataclasses.dataclass(frozen=True, slots=True)
class _Wishes:
    """What a user asks of a plan, as in `plan`."""

    cluster: str | Cluster | None
    mesh: Mapping[str, int] | None
    hints: Hints | None
    memory_limit: float | str | None
    solver: str
    fused_attention: bool
    microbatches: int | str | None
    blockwise: int | str | None
    stages: int | str | None
    schedule: str | None
    chunks: int | None
    progress: Progress | None


@contextmanager
def _no_collector() -> Iterator[None]:
    """Planning makes millions of small objects and few cycles: looking for those costs 10-30 %."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _plan(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    jit_options: Mapping[str, Any],
    wishes: _Wishes,
) -> Plan:
    if wishes.solver not in SOLVERS:
        raise ValueError(f"unknown solver {wishes.solver!r}; there are {', '.join(SOLVERS)}")
    if wishes.hints is not None and not isinstance(wishes.hints, Mapping):
        raise TypeError(f"hints is a mapping of globs to specs, not {type(wishes.hints).__name__}")
    microbatches, wanted = checked(wishes.microbatches), checked_blocks(wishes.blockwise)
    hardware = _cluster(wishes.cluster)
    if wishes.stages is not None:
        with _no_collector():
            found = _pipelined(fn, args, kwargs, jit_options, hardware, wishes)
        alone = wishes.stages == "auto" and wishes.schedule is None and wishes.mesh is None
        if not alone or hardware.devices > _FEW:
            return found
        return _faster(found, partial(_plan, fn, args, kwargs, jit_options), wishes)
    for name in ("schedule", "chunks"):
        if getattr(wishes, name) is not None:
            raise ValueError(f"{name} is of a pipeline: give stages too, a number or 'auto'")
    fixed = _mesh(wishes.mesh, hardware)
    with _no_collector():
        traced = traced_for(fn, args, kwargs, jit_options)

        def in_parts(count: int) -> Plan:
            cut = traced if count == 1 else traced_for(fn, args, kwargs, jit_options, count)

            def in_such(blocks: Blocks) -> Plan:
                again = traced_for(fn, args, kwargs, jit_options, count, blocks) if blocks else cut
                return _search(fn, again, hardware, fixed, wishes, count, blocks)

            return _blockwise(in_such, wanted, cut, hardware, wishes)

        if isinstance(microbatches, str):
            sizes = batch_sizes(traced)
            return fastest(in_parts, lambda p: p.cost.step_time, sizes, wishes.progress)
        return in_parts(microbatches)


def _blockwise(
    in_such: Callable[[Blocks], Plan],
    wanted: Blocks | Literal["auto"],
    traced: Traced,
    hardware: Cluster,
    wishes: _Wishes,
) -> Plan:
    """The plan in so many blocks, or in as few as fit. traced: without blocks."""

    def peak(found: Plan) -> float:
        return found.cost.peak_memory

    if isinstance(wanted, str):
        limit = _limit(wishes)
        return first_that_fits(in_such, peak, traced, hardware, limit, wishes.progress)
    try:
        return in_such(wanted)
    except NoFeasiblePlan as error:
        raise error if wanted else that_may_help(error, traced) from None


def _faster(found: Plan, ask: Callable[[_Wishes], Plan], wishes: _Wishes) -> Plan:
    """The pipeline that was found, or one program for all devices where that is faster."""
    try:
        whole = ask(dataclasses.replace(wishes, stages=None, chunks=None))
    except (NoFeasiblePlan, NoTimeLoop):
        return found
    return whole if whole.cost.step_time < found.cost.step_time else found


def _pipelined(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    jit_options: Mapping[str, Any],
    hardware: Cluster,
    wishes: _Wishes,
) -> Plan:
    """The plan of a pipeline."""
    if wishes.blockwise is not None:
        raise ValueError("blockwise does not go with stages: give one of them")
    microbatches = checked("auto" if wishes.microbatches is None else wishes.microbatches)
    _mesh(wishes.mesh, hardware)
    traced = traced_for(fn, args, kwargs, jit_options)
    own: Mapping[str, Any] = {}
    if isinstance(fn, Parallelized):
        jit_options, own, fn = {**fn.options, **jit_options}, fn.hints, fn.fn
    return plan_stages(
        fn,
        args,
        kwargs,
        jit_options,
        traced,
        hardware,
        stages=checked_stages(wishes.stages),
        microbatches=None if isinstance(microbatches, str) else microbatches,
        schedule=wishes.schedule,
        chunks=wishes.chunks,
        mesh=wishes.mesh,
        hints={**own, **(wishes.hints or {})},
        limit=_limit(wishes),
        solver=wishes.solver,
        fused_attention=wishes.fused_attention,
        progress=wishes.progress,
    )


def _search(
    fn: Callable[..., Any],
    traced: Traced,
    hardware: Cluster,
    fixed: Mesh | None,
    wishes: _Wishes,
    microbatches: int,
    blocks: Blocks,
) -> Plan:
    """The plan for a traced function."""
    graph = traced.graph
    if traced.required_mesh is not None:
        fixed = _manual_mesh(traced, fixed, hardware)
    own = fn.hints if isinstance(fn, Parallelized) else {}
    wanted = (*graph.hints, *hints_for(graph, {**own, **(wishes.hints or {})}))
    again = partial(
        search,
        graph,
        hardware,
        hints=wanted,
        memory_limit=_limit(wishes),
        state=state_pairs(traced),
        fused_attention=wishes.fused_attention,
    )
    found = again(mesh=fixed, solver=wishes.solver, progress=wishes.progress)
    data = dataclasses.replace(
        found.plan, microbatches=microbatches, blocks=blocks.count, block_bytes=blocks.nbytes
    )
    return Plan(data, traced, found, again)


def _limit(wishes: _Wishes) -> float | None:
    return None if wishes.memory_limit is None else float(parse_bytes(wishes.memory_limit))


def _cluster(spec: str | Cluster | None) -> Cluster:
    if spec is None:
        return cluster_here()
    if not isinstance(spec, str | Cluster):
        raise TypeError(f"cluster is text such as 'cpu:8', or a Cluster, not {spec!r}")
    return read_cluster(spec) if isinstance(spec, str) else spec


def _mesh(mesh: Mapping[str, int] | None, cluster: Cluster) -> Mesh | None:
    if mesh is None:
        return None
    if not isinstance(mesh, Mapping):
        raise TypeError(f"mesh is a mapping such as {{'data': 4, 'model': 2}}, not {mesh!r}")
    # numpy's whole numbers too, so that a size may be computed
    out = Mesh.of({n: int(s) if isinstance(s, np.integer) else s for n, s in mesh.items()})
    if out.devices != cluster.devices:
        raise ValueError(
            f"mesh {out} has {out.devices} devices, but the cluster {cluster} has {cluster.devices}"
        )
    return out


def _manual_mesh(traced: Traced, fixed: Mesh | None, cluster: Cluster) -> Mesh:
    """The mesh that a shard_map inside the function demands."""
    assert traced.required_mesh is not None
    demanded = Mesh.of(traced.required_mesh)
    if demanded.devices != cluster.devices or (fixed is not None and fixed != demanded):
        raise ValueError(
            f"{traced.graph.name} has a shard_map over mesh {demanded}; the plan has to use that "
            f"mesh, but was asked for {fixed if fixed is not None else cluster}"
        )
    return demanded


def parallelize(
    fn: Callable[..., Any] | None = None,
    *,
    cluster: str | Cluster | None = None,
    mesh: Mapping[str, int] | None = None,
    hints: Hints | None = None,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    memory_limit: float | str | None = None,
    solver: str = "ilp",
    fused_attention: bool = False,
    microbatches: int | str | None = None,
    blockwise: int | str | None = None,
    stages: int | str | None = None,
    schedule: str | None = None,
    chunks: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Make fn run in parallel: `parallelize(fn, cluster=...)` or `@parallelize(cluster=...)`.

    Plans at the first call for each form of the arguments, compiles, and keeps both.
    `step.plan(*args)` gives the plan, `step.lower(*args)` the program. Options as in `plan` and
    `jax.jit`. Traced by jax, as in `jax.grad(step)`, it is fn itself.
    """
    named = {
        "donate_argnums": donate_argnums,
        "static_argnums": static_argnums,
        "static_argnames": static_argnames,
    }
    options = {name: given for name, given in named.items() if given not in (None, ())}

    def make(step: Parallelized, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
        wishes = _Wishes(
            cluster,
            mesh,
            hints,
            memory_limit,
            solver,
            fused_attention,
            microbatches,
            blockwise,
            stages,
            schedule,
            chunks,
            progress,
        )
        return _plan(step, args, kwargs, {}, wishes)

    def wrap(fn: Callable[..., Any]) -> Parallelized:
        return Parallelized(fn, options, hints or {}, make)

    return wrap if fn is None else wrap(fn)


__all__ = ["Parallelized", "Plan", "parallelize", "plan"]
