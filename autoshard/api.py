"""What a user calls: `plan(fn, *args)`, and the decorator `parallelize`."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from autoshard.blockwise import first_that_fits, that_may_help
from autoshard.bound_plan import Plan, of_devices, traced_for
from autoshard.parallelized import Parallelized
from autoshard.pipelined import OUTER
from autoshard.remat import checked as checked_remat
from autoshard.remat import rematable, rematerialized
from autoshard.stages_wanted import checked_stages, plan_stages, with_stages
from autoshard.state import state_pairs
from autoshard.time_axes import sized
from autoshard.time_wanted import axes_over, check_names, of_pipeline
from autoshard.trace import Traced
from autoshard.wishes import Hints, Wishes
from cost_models.cluster import Cluster
from passes.block_counts import Blocks
from passes.hints import hints_for
from passes.ir.graph import Graph, Hint
from passes.ir.mesh import Mesh
from passes.ir.plan import TimeAxis
from passes.microbatch_loop import NoTimeLoop
from passes.search import NoFeasiblePlan, Progress, search
from passes.time_hints import check_at_once, over_devices

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
    time_axes: Mapping[str, int | str] | None = None,
    remat: str | None = None,
    stages: int | str | None = None,
    schedule: str | None = None,
    chunks: int | None = None,
    shared_update: bool | None = None,
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
    they are never there as a whole; "auto" for as few as fit. time_axes: name to size, or "auto",
    of axes that run over the steps of loops; hints name them for dims of arguments as they name
    axes of the mesh, and one that they do not name runs over the batch. microbatches=8 and
    blockwise=4 are short for time_axes={"micro": 8, "block": 4}. remat: what the backward half
    computes again instead of keeping it, by layers: nothing but what the user's own jax.checkpoint
    does (None or "none"), "full", or "auto" for as few layers as are needed to fit (of a pipeline,
    none or all).

    stages: into how many stages of a pipeline fn is cut, or "auto" for the fastest number; the
    answer is then a PipelinedPlan, but for "auto" on up to 64 devices where one program for all of
    them is faster. Of a pipeline, microbatches (None: the fastest number) are those
    of each data-parallel group, mesh may name its axes `stage` and `data` besides those that a
    group shards over, schedule is a name such as "1F1B" or "ZB-V", and chunks are pieces of the
    model per stage where a schedule leaves that open. shared_update: whether data-parallel groups
    hold the optimizer's state in parts and each updates its own (ZeRO stage 1); None for where that
    is as good. A parallelized fn brings its own hints,
    static and donated arguments.

    Raises NoFeasiblePlan, HintError, HintConflict, UnknownCluster, NoTimeLoop, NoBlocks, NoStages,
    ScheduleError, ValueError, TypeError.
    """
    options = {} if donate_argnums == () else {"donate_argnums": donate_argnums}
    wishes = Wishes.of(locals())
    return _plan(fn, args, {}, options, wishes)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Planning makes millions of small objects and few cycles: looking for those costs 10-30 %.

    What is left of them is put with the old objects, which the collector looks through less often:
    else it would do so at once.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # nothing that the user keeps from the collector
            gc.freeze()
            gc.unfreeze()
        gc.enable()


def _plan(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    jit_options: Mapping[str, Any],
    wishes: Wishes,
) -> Plan:
    """The plan, with parts computed again where that is wanted."""
    wishes.check()
    remat, hardware, limit = checked_remat(wishes.remat), wishes.hardware, wishes.limit
    if remat == "none":
        return _as_written(fn, args, kwargs, jit_options, wishes)
    most = hardware.memory_limit if limit is None else limit
    with _no_collector():
        plan, again, note = rematerialized(
            rematable(fn, args, kwargs, jit_options),
            remat,
            lambda other: _as_written(other, args, kwargs, jit_options, wishes),
            lambda found: found.cost.peak_memory <= most,
            hardware,
            wishes.progress,
            by_parts=wishes.stages is None,
        )
    plan.data = dataclasses.replace(plan.data, remat=again, notes=(note, *plan.data.notes))
    return plan


def _as_written(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    jit_options: Mapping[str, Any],
    wishes: Wishes,
) -> Plan:
    """The plan of a function as it is."""
    hardware = wishes.hardware
    with _no_collector():
        if wishes.stages is None:
            return _one_program(fn, args, kwargs, jit_options, hardware, wishes)
        found = _pipelined(fn, args, kwargs, jit_options, hardware, wishes)
    alone = wishes.stages == "auto" and wishes.schedule is None and wishes.mesh is None
    if not alone or hardware.devices > _FEW:
        return found
    return _faster(found, partial(_as_written, fn, args, kwargs, jit_options), wishes)


def _one_program(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    jit_options: Mapping[str, Any],
    hardware: Cluster,
    wishes: Wishes,
) -> Plan:
    """The plan of one program for all devices, over time axes and in blocks as asked for."""
    time, fixed = wishes.time, wishes.mesh_on(hardware)
    check_names(time, () if fixed is None else fixed.names)
    traced = traced_for(fn, args, kwargs, jit_options)
    hints = _hints(fn, traced.graph, wishes)

    def over(axes: tuple[TimeAxis, ...]) -> Plan:
        if fixed is not None:
            check_at_once(traced.graph, hints, axes, fixed)
        if any(axis.size > 1 for axis in axes):
            cut = traced_for(fn, args, kwargs, jit_options, axes)
        else:
            cut = of_devices(traced, time.names)

        def in_such(blocks: Blocks) -> Plan:
            again = traced_for(fn, args, kwargs, jit_options, axes, blocks) if blocks else cut
            return _search(fn, again, hardware, fixed, wishes, axes, blocks)

        return _blockwise(in_such, cut, hardware, wishes)

    axes = axes_over(traced.graph, hints, time)
    return sized(axes, over, lambda p: p.cost.step_time, traced, wishes.progress)


def _hints(fn: Callable[..., Any], graph: Graph, wishes: Wishes) -> tuple[Hint, ...]:
    """All hints: those in the function, those that a parallelized one brings, and those given."""
    own = fn.hints if isinstance(fn, Parallelized) else {}
    return (*graph.hints, *hints_for(graph, {**own, **(wishes.hints or {})}))


def _blockwise(
    in_such: Callable[[Blocks], Plan], traced: Traced, hardware: Cluster, wishes: Wishes
) -> Plan:
    """The plan in so many blocks, or in as few as fit. traced: without blocks."""
    wanted = wishes.time.blocks

    def peak(found: Plan) -> float:
        return found.cost.peak_memory

    if isinstance(wanted, str):
        return first_that_fits(in_such, peak, traced, hardware, wishes.limit, wishes.progress)
    try:
        return in_such(wanted)
    except NoFeasiblePlan as error:
        raise error if wanted else that_may_help(error, traced) from None


def _faster(found: Plan, ask: Callable[[Wishes], Plan], wishes: Wishes) -> Plan:
    """The pipeline that was found, or one program for all devices where that is faster."""
    try:
        whole = ask(dataclasses.replace(wishes, stages=None, chunks=None, shared_update=None))
    except (NoFeasiblePlan, NoTimeLoop):
        return found
    return whole if whole.cost.step_time < found.cost.step_time else found


def _pipelined(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    jit_options: Mapping[str, Any],
    hardware: Cluster,
    wishes: Wishes,
) -> Plan:
    """The plan of a pipeline."""
    wishes = dataclasses.replace(wishes, mesh=with_stages(wishes.mesh, wishes.stages))
    fixed = wishes.mesh_on(hardware)
    check_names(wishes.time, OUTER if fixed is None else (*OUTER, *fixed.names))
    traced = traced_for(fn, args, kwargs, jit_options)
    over = of_pipeline(wishes.time, _hints(fn, traced.graph, wishes), traced.graph)
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
        over=over,
        schedule=wishes.schedule,
        chunks=wishes.chunks,
        shared_update=wishes.shared_update,
        mesh=None if fixed is None else fixed.as_dict(),
        hints={**own, **(wishes.hints or {})},
        limit=wishes.limit,
        solver=wishes.solver,
        fused_attention=wishes.fused_attention,
        progress=wishes.progress,
    )


def _search(
    fn: Callable[..., Any],
    traced: Traced,
    hardware: Cluster,
    fixed: Mesh | None,
    wishes: Wishes,
    axes: tuple[TimeAxis, ...],
    blocks: Blocks,
) -> Plan:
    """The plan for a function traced over these time axes and in such blocks."""
    names = wishes.time.names
    if traced.required_mesh is not None:
        fixed = _manual_mesh(traced, fixed, hardware)
        check_names(wishes.time, fixed.names)
    again = partial(
        search,
        traced.graph,
        hardware,
        hints=over_devices(_hints(fn, traced.graph, wishes), names),
        memory_limit=wishes.limit,
        state=state_pairs(traced),
        fused_attention=wishes.fused_attention,
        time_axes=names,
    )
    found = again(mesh=fixed, solver=wishes.solver, progress=wishes.progress)
    data = dataclasses.replace(
        found.plan, time_axes=axes, blocks=blocks.count, block_bytes=blocks.nbytes
    )
    return Plan(data, traced, found, again)


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
    time_axes: Mapping[str, int | str] | None = None,
    remat: str | None = None,
    stages: int | str | None = None,
    schedule: str | None = None,
    chunks: int | None = None,
    shared_update: bool | None = None,
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

    wishes = Wishes.of(locals())

    def make(step: Parallelized, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
        return _plan(step, args, kwargs, {}, wishes)

    def wrap(fn: Callable[..., Any]) -> Parallelized:
        return Parallelized(fn, options, hints or {}, make)

    return wrap if fn is None else wrap(fn)


__all__ = ["Parallelized", "Plan", "parallelize", "plan"]
