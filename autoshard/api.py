"""What a user calls: `plan(fn, *args)`, the Plan it gives, and the decorator `parallelize`.

A Plan is data (`passes.ir.plan.Plan`) bound to the function it was made for; without the function
it still prints and explains, but can not be lowered.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from autoshard.devices import cluster_here
from autoshard.jit_options import check_arguments
from autoshard.lower import constrained
from autoshard.mesh import device_mesh, lowering_platform, partition_spec
from autoshard.microbatches import batch_sizes, checked, fastest, in_microbatches
from autoshard.parallelized import Parallelized
from autoshard.placement import placed
from autoshard.state import state_pairs
from autoshard.trace import Traced, trace
from cost_models.cluster import Cluster
from cost_models.cluster import cluster as read_cluster
from cost_models.units import parse_bytes
from passes.hints import hints_for
from passes.ir import plan as ir
from passes.ir.mesh import Mesh
from passes.ir.pipeline_plan import MARK as PIPELINE
from passes.ir.plan import PlanError
from passes.normalize import drop_dead, merge_same
from passes.search import SOLVERS, Found, Progress, search

if TYPE_CHECKING:
    from autoshard.verification import Verification
    from passes.solve.problem import Problem

Hints = Mapping[str, Any]


class Plan:
    """A parallelization plan, bound to the function it was made for (or not, after `from_json`)."""

    def __init__(
        self,
        data: ir.Plan,
        traced: Traced | None = None,
        found: Found | None = None,
        again: Callable[..., Found] | None = None,
    ) -> None:
        self.data = data
        self._traced = traced
        self._found = found
        self._again = again  # the search that found it, for another mesh and solver

    @property
    def mesh(self) -> Mapping[str, int]:
        """Axis name to size, in order."""
        return dict(self.data.mesh)

    @property
    def cost(self) -> ir.Cost:
        """Predicted seconds, bytes and FLOP on every device."""
        return self.data.cost

    @property
    def ops(self) -> tuple[ir.OpPlan, ...]:
        """Every operation with its source line, factors, strategy, seconds, bytes, collectives."""
        return self.data.ops

    @property
    def alternatives(self) -> tuple[ir.Alternative, ...]:
        """The meshes and baselines it beat, the best first."""
        return self.data.alternatives

    @property
    def problem(self) -> Problem:
        """What was solved for this mesh, such as for `passes.solve.iopddl.write`."""
        found = self._search()
        if found is None:
            raise PlanError(
                "a plan without its function has no problem: give it to Plan.from_json(text, fn, "
                "*args), or call plan.bind(fn, *args)"
            )
        return found.priced.problem

    @property
    def compiler_options(self) -> Mapping[str, str]:
        """XLA's options for the plan's program: `lower().compile(compiler_options=...)`."""
        return dict(self.data.compiler_options)

    @property
    def state(self) -> tuple[tuple[int, int], ...]:
        """Places, in flattened order, of arguments and of the results that take their place."""
        traced = self._bound("state")
        inputs = {v: k for k, v in enumerate(traced.graph.inputs)}
        outputs = {v: k for k, v in enumerate(traced.graph.outputs)}
        return tuple((inputs[i], outputs[o]) for i, o in state_pairs(traced))

    @property
    def in_shardings(self) -> Any:
        """PartitionSpecs shaped like the arguments: a tuple, or (args, kwargs) if any."""
        args, kwargs = jax.tree.unflatten(
            self._bound("in_shardings").in_tree,
            [partition_spec(t.spec) for t in self.data.arguments],
        )
        return (args, kwargs) if kwargs else args

    @property
    def out_shardings(self) -> Any:
        """PartitionSpecs shaped like the result."""
        return jax.tree.unflatten(
            self._bound("out_shardings").out_tree,
            [partition_spec(t.spec) for t in self.data.results],
        )

    def explain(self, glob: str) -> str:
        """Why the values that a glob names are sharded so, and what else would cost."""
        from autoshard.explain import explain

        return explain(self.data, self._search(), glob)

    def to_json(self) -> str:
        """The plan as JSON text, the same for the same plan."""
        return self.data.to_json()

    @staticmethod
    def from_json(
        text: str, fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any
    ) -> Plan:
        """Read a plan; with the function and its arguments, bind it to them.

        Raises PlanError for text that is no plan, and for a function that is not the plan's.
        """
        if PIPELINE in str(text):
            from autoshard.pipelined import PipelinedPlan

            return PipelinedPlan.from_json(text, fn, *args, **kwargs)
        read = Plan(ir.Plan.from_json(text))
        return read if fn is None else read.bind(fn, *args, **kwargs)

    def bind(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
        """The same plan for this function, which must be the one it was made for (PlanError)."""
        traced = _traced(fn, args, kwargs, {}, self.data.microbatches)
        signature = ir.signature_of(traced.graph)
        if ir.fingerprint(signature) != self.data.fingerprint:
            found = "; ".join(ir.differences(self.data.signature, signature))
            raise PlanError(
                f"this plan was made for another function or other shapes than "
                f"{traced.graph.name}: {found}. Plan again for this one."
            )
        sizes = [len(part) for part in (self.data.arguments, self.data.results, self.data.values)]
        graph = traced.graph
        if sizes != [len(part) for part in (graph.inputs, graph.outputs, graph.values)]:
            raise PlanError(f"this plan is damaged: it does not say all about {graph.name}")
        return Plan(self.data, _donating(traced, self.data.donated))

    def lower(self, devices: Sequence[Any] | jax.sharding.Mesh | None = None) -> jax.stages.Lowered:
        """The program for these devices: real ones, virtual ones, or a compile-only topology's.

        As from `jax.jit(fn).lower(*args)`, and static arguments left out. Raises DevicesError when
        there are too few.
        """
        traced = self._bound("lower")
        mesh = self._device_mesh(devices)
        platform = lowering_platform(mesh.devices.flat[0])
        flat = map(_shape, traced.in_avals, self._in_named(mesh))
        args, kwargs = jax.tree.unflatten(traced.in_tree, flat)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # not one that the caller has set
            staged = self._jitted(traced, mesh).trace(*args, **kwargs)
            lowered: jax.stages.Lowered = staged.lower(lowering_platforms=(platform,))
        return lowered

    def compile(
        self, devices: Sequence[Any] | jax.sharding.Mesh | None = None
    ) -> Callable[..., Any]:
        """The compiled function: takes and returns what fn does, and places arguments by itself."""
        traced = self._bound("compile")
        mesh = self._device_mesh(devices)
        compiled = self.lower(mesh).compile(compiler_options=self._options(mesh.devices.flat[0]))
        shardings = self._in_named(mesh)

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = placed(traced, args, kwargs, shardings)
            return compiled(*args, **kwargs)

        call.__name__ = call.__qualname__ = traced.graph.name
        return call

    def place(self, *args: Any, devices: Any = None, **kwargs: Any) -> Any:
        """The arguments as the plan wants them on the devices."""
        traced = self._bound("place")
        shardings = self._in_named(self._device_mesh(devices))
        out_args, out_kwargs = placed(traced, args, kwargs, shardings)
        return (out_args, out_kwargs) if out_kwargs else out_args

    def verify(
        self,
        devices: Sequence[Any] | None = None,
        *,
        top: int = 1,
        progress: Progress | None = None,
    ) -> Verification:
        """Compile the plan for its cluster, without the hardware, and compare with the prediction.

        devices: those to compile for, such as a topology's; None for the cluster's own. top: how
        many plans to compile, this one and the best of those that it beat; where it has
        `compiler_options`, also without them.

        Raises NoCompiler where the compiler for that cluster is not here, CompilerRefused,
        PlanError.
        """
        from autoshard.targets import target_devices
        from autoshard.verification import verify

        tell = progress or (lambda _: None)
        found = target_devices(Cluster.from_dict(self.data.cluster)) if devices is None else devices
        tell(f"compiling for {found[0].device_kind}")
        options = self._options(found[0])
        own = verify(self.data, self.lower, found, options)
        others = []
        for other in self._best_others(top - 1, tell):
            tell(f"compiling {other.data.solver} on {other.data.mesh_axes}")
            others.append(verify(other.data, other.lower, found, options))
        if options and top > 1:
            tell("compiling without options")
            others.append(verify(self.data, self.lower, found, {}))
        return dataclasses.replace(own, others=tuple(others))

    def _search(self) -> Found | None:
        """What the plan was found in, searched again where it was read; None without a function."""
        if self._found is None and self._traced is not None:
            from autoshard.explain import search_again

            state = state_pairs(self._traced)
            self._found = search_again(self.data, self._traced.graph, state)
        return self._found

    def _options(self, device: Any) -> dict[str, Any]:
        """The plan's compiler options, where the device is of the platform they are meant for."""
        meant = device.platform == self.data.cluster["platform"]
        return dict(self.data.compiler_options) if meant else {}

    def _best_others(self, count: int, tell: Progress) -> list[Plan]:
        """The best of the plans that this one beat, different ones only."""
        if count > 0 and self._again is None:
            raise PlanError("a plan from JSON knows no others: plan again to verify several")
        out: list[Plan] = []
        known = {(self.data.mesh, self.data.cost)}
        for a in self.data.alternatives:
            if len(out) == count or self._again is None:
                break
            if a.cost is None or (a.mesh, a.cost) in known:
                continue
            known.add((a.mesh, a.cost))
            found = self._again(mesh=Mesh.of(dict(a.mesh)), solver=a.solver, progress=tell)
            out.append(Plan(found.plan, self._traced, found, self._again))
        return out

    def __str__(self) -> str:
        from autoshard.report import report

        return report(self.data)

    def __repr__(self) -> str:
        mesh = ", ".join(f"{n}={s}" for n, s in self.data.mesh)
        return f"Plan({self.data.name}, mesh {mesh}, {self.data.cost.step_time:.3g} s)"

    def _bound(self, what: str) -> Traced:
        if self._traced is None:
            raise PlanError(
                f"Plan.{what} needs the function: give it to Plan.from_json(text, fn, *args), "
                "or call plan.bind(fn, *args)"
            )
        return self._traced

    def _device_mesh(self, devices: Any) -> jax.sharding.Mesh:
        if isinstance(devices, jax.sharding.Mesh):
            devices = devices.devices.flat
        return device_mesh(self.data.mesh_axes, devices)

    def _in_named(self, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
        return tuple(jax.NamedSharding(mesh, partition_spec(t.spec)) for t in self.data.arguments)

    def _jitted(self, traced: Traced, mesh: jax.sharding.Mesh) -> Any:
        """The planned function as jit would have it, arguments and results in their structure."""
        run = constrained(traced, self.data, mesh)

        def call(*args: Any, **kwargs: Any) -> Any:
            return jax.tree.unflatten(traced.out_tree, run(*jax.tree.leaves((args, kwargs))))

        call.__name__ = call.__qualname__ = traced.graph.name
        args, kwargs = jax.tree.unflatten(traced.in_tree, traced.donated)
        results = [jax.NamedSharding(mesh, partition_spec(t.spec)) for t in self.data.results]
        return jax.jit(
            call,
            out_shardings=jax.tree.unflatten(traced.out_tree, results),
            donate_argnums=tuple(i for i, x in enumerate(args) if any(jax.tree.leaves(x))),
            donate_argnames=tuple(k for k, x in kwargs.items() if any(jax.tree.leaves(x))),
        )


def _shape(aval: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    weak = bool(getattr(aval, "weak_type", False))
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak, sharding=sharding)


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

    stages: into how many stages of a pipeline fn is cut, or "auto" for the fastest number; the
    answer is then a PipelinedPlan. Of a pipeline, microbatches (None: the fastest number) are those
    of each data-parallel group, mesh may name its axes `stage` and `data` besides those that a
    group shards over, schedule is a name such as "1F1B" or "ZB-V", and chunks are pieces of the
    model per stage where a schedule leaves that open. A parallelized fn brings its own hints,
    static and donated arguments.

    Raises NoFeasiblePlan, HintError, HintConflict, UnknownCluster, NoTimeLoop, NoStages,
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
    microbatches = checked(wishes.microbatches)
    hardware = _cluster(wishes.cluster)
    if wishes.stages is not None:
        with _no_collector():
            return _pipelined(fn, args, kwargs, jit_options, hardware, wishes)
    for name in ("schedule", "chunks"):
        if getattr(wishes, name) is not None:
            raise ValueError(f"{name} is of a pipeline: give stages too, a number or 'auto'")
    fixed = _mesh(wishes.mesh, hardware)
    with _no_collector():
        traced = _traced(fn, args, kwargs, jit_options)

        def in_parts(count: int) -> Plan:
            cut = traced if count == 1 else _traced(fn, args, kwargs, jit_options, count)
            return _search(fn, cut, hardware, fixed, wishes, count)

        if isinstance(microbatches, str):
            sizes = batch_sizes(traced)
            return fastest(in_parts, lambda p: p.cost.step_time, sizes, wishes.progress)
        return in_parts(microbatches)


def _pipelined(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    jit_options: Mapping[str, Any],
    hardware: Cluster,
    wishes: _Wishes,
) -> Plan:
    """The plan of a pipeline."""
    from autoshard.stages_wanted import checked_stages, plan_stages

    microbatches = checked("auto" if wishes.microbatches is None else wishes.microbatches)
    _mesh(wishes.mesh, hardware)
    traced = _traced(fn, args, kwargs, jit_options)
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
        limit=None if wishes.memory_limit is None else float(parse_bytes(wishes.memory_limit)),
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
) -> Plan:
    """The plan for a traced function."""
    graph = traced.graph
    if traced.required_mesh is not None:
        fixed = _manual_mesh(traced, fixed, hardware)
    own = fn.hints if isinstance(fn, Parallelized) else {}
    wanted = (*graph.hints, *hints_for(graph, {**own, **(wishes.hints or {})}))
    limit = None if wishes.memory_limit is None else float(parse_bytes(wishes.memory_limit))
    again = partial(
        search,
        graph,
        hardware,
        hints=wanted,
        memory_limit=limit,
        state=state_pairs(traced),
        fused_attention=wishes.fused_attention,
    )
    found = again(mesh=fixed, solver=wishes.solver, progress=wishes.progress)
    data = dataclasses.replace(found.plan, microbatches=microbatches)
    return Plan(data, traced, found, again)


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


def _traced(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    jit_options: Mapping[str, Any],
    microbatches: int = 1,
) -> Traced:
    """A function traced, one that does the same in microbatches where there are several."""
    if isinstance(fn, Parallelized):
        jit_options = {**fn.options, **jit_options}
        fn = fn.fn
    check_arguments(fn, args, kwargs, jit_options)
    traced = trace(fn, *args, **jit_options, **kwargs)
    if microbatches > 1:
        cut, notes = in_microbatches(fn, traced, microbatches, jit_options)
        traced = trace(cut, *args, **jit_options, **kwargs)
        noted = dataclasses.replace(traced.graph, notes=(*notes, *traced.graph.notes))
        traced = dataclasses.replace(traced, graph=noted)
    graph, same = merge_same(traced.graph)
    return dataclasses.replace(traced, graph=drop_dead(graph), same=same)


def _donating(traced: Traced, donated: Sequence[int]) -> Traced:
    """The same function, donating these of its flat arguments."""
    inputs = traced.graph.inputs
    graph = dataclasses.replace(traced.graph, donated=frozenset(inputs[i] for i in donated))
    flags = tuple(i in set(donated) for i in range(len(inputs)))
    return dataclasses.replace(traced, graph=graph, donated=flags)


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
