"""A Plan is data (`passes.ir.plan.Plan`) bound to the function it was made for.

Without the function it still prints and explains, but can not be lowered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from autoshard.blockwise import in_blocks
from autoshard.jit_options import check_arguments
from autoshard.lower import constrained
from autoshard.mesh import device_mesh, lowering_platform, partition_spec
from autoshard.parallelized import Parallelized
from autoshard.placement import placed
from autoshard.remat import computing_again
from autoshard.state import state_pairs
from autoshard.time_axes import begun, in_steps_of
from autoshard.trace import Traced, trace
from cost_models.cluster import Cluster
from passes.block_counts import NO_BLOCKS, Blocks
from passes.ir import plan as ir
from passes.ir.mesh import Mesh
from passes.ir.plan import PlanError, TimeAxis
from passes.normalize import drop_dead, merge_same
from passes.search import Found, Progress
from passes.time_hints import over_devices

if TYPE_CHECKING:
    from autoshard.verification import Verification
    from passes.solve.problem import Problem


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
        for kind in Plan.__subclasses__():
            if kind.reads(text):
                return kind.from_json(text, fn, *args, **kwargs)
        read = Plan(ir.Plan.from_json(text))
        return read if fn is None else read.bind(fn, *args, **kwargs)

    @classmethod
    def reads(cls, text: str) -> bool:
        """Whether text is a plan of this kind, where there are several."""
        return False

    def bind(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
        """The same plan for this function, which must be the one it was made for (PlanError)."""
        fn = computing_again(fn, args, kwargs, self.data.remat)
        blocks = Blocks(self.data.blocks, self.data.block_bytes)
        traced = traced_for(fn, args, kwargs, {}, self.data.time_axes, blocks)
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
        return Plan(self.data, donating(traced, self.data.donated))

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

    def headline(self) -> str:
        """The beginning of the print-out: mesh, step time and memory."""
        from autoshard.report import head

        return "\n".join(head(self.data))

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


def traced_for(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    jit_options: Mapping[str, Any],
    time_axes: Sequence[TimeAxis] = (),
    blocks: Blocks = NO_BLOCKS,
) -> Traced:
    """A function traced, one that does the same over time and in blocks where asked for."""
    if isinstance(fn, Parallelized):
        jit_options = {**fn.options, **jit_options}
        fn = fn.fn
    check_arguments(fn, args, kwargs, jit_options)
    traced = trace(fn, *args, **jit_options, **kwargs)
    notes: tuple[str, ...] = ()
    loops = [begun(traced, axis) for axis in time_axes if axis.size > 1]
    for loop in reversed(loops):  # the innermost first
        cut, more = in_steps_of(fn, traced, loop, jit_options)
        traced, notes = trace(cut, *args, **jit_options, **kwargs), (*more, *notes)
    if blocks:
        cut, more = in_blocks(fn, traced, blocks, jit_options)
        traced, notes = trace(cut, *args, **jit_options, **kwargs), (*notes, *more)
    if notes:
        noted = dataclasses.replace(traced.graph, notes=(*notes, *traced.graph.notes))
        traced = dataclasses.replace(traced, graph=noted)
    graph, same = merge_same(traced.graph)
    traced = dataclasses.replace(traced, graph=drop_dead(graph), same=same)
    return of_devices(traced, [axis.name for axis in time_axes])


def of_devices(traced: Traced, time_axes: Sequence[str]) -> Traced:
    """The same function, its annotations without the names of time axes."""
    left = over_devices(traced.graph.hints, time_axes)
    return dataclasses.replace(traced, graph=dataclasses.replace(traced.graph, hints=left))


def donating(traced: Traced, donated: Sequence[int]) -> Traced:
    """The same function, donating these of its flat arguments."""
    inputs = traced.graph.inputs
    graph = dataclasses.replace(traced.graph, donated=frozenset(inputs[i] for i in donated))
    flags = tuple(i in set(donated) for i in range(len(inputs)))
    return dataclasses.replace(traced, graph=graph, donated=flags)
