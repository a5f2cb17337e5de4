"""A plan with pipeline stages, bound to its function: what `plan(fn, *args, stages=...)` gives.

It is used as a Plan is: printed, kept as JSON, compiled. Its program is not one but many: each task
of each stage is compiled for the stage's devices, and one controller starts them along the table of
the schedule (`autoshard.controller`); over several processes it is one (`autoshard.spmd_pipeline`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from autoshard.bound_plan import Plan
from autoshard.controller import Controller
from autoshard.cut_program import CutProgram, cut_program
from autoshard.in_parts import stage_parts
from autoshard.in_stages import Staged
from autoshard.mesh import device_mesh
from autoshard.pipeline_costs import Form, stage_of
from autoshard.pipeline_data import schedule_of, timeline_of, whole_memory
from autoshard.remat import computing_again
from autoshard.spmd_pipeline import SpmdPipeline
from autoshard.stage_layout import StageLayout, planned_layout
from autoshard.stage_prices import traced_stage
from autoshard.stage_step import StageStep
from autoshard.state import state_pairs
from autoshard.trace import Traced
from cost_models.cluster import Cluster
from cost_models.units import format_bytes
from passes.hints import named, path_of
from passes.ir import plan as ir
from passes.ir.mesh import Mesh
from passes.ir.pipeline_plan import MARK, PipelinePlan
from passes.ir.plan import PlanError
from passes.op_seconds import op_seconds
from passes.pipeline.schedule import Schedule
from passes.pipeline.timeline import Timeline

OUTER = ("stage", "data")  # axes of the mesh that lie outside of a group
_NO_SPECS = (
    "in a pipeline each array lies with the stages that use it, so that one PartitionSpec does not "
    "say where: plan.stages are the plans of the pieces"
)


class PipelinedPlan(Plan):
    """A plan of a pipeline: a Plan of several programs, which its `stages` are the plans of.

    cut: its function in pieces, None for a plan that was read.
    """

    data: PipelinePlan  # type: ignore[assignment]

    def __init__(self, data: PipelinePlan, cut: CutProgram | None = None) -> None:
        self.data = data
        self._cut = cut

    @property
    def mesh(self) -> Mapping[str, int]:
        """Axis name to size: stages, data-parallel groups, and what a group shards over."""
        return dict(self.data.axes)

    @property
    def cost(self) -> ir.Cost:
        """Predicted seconds, bytes and FLOP on the busiest device."""
        return self.data.cost

    @property
    def stages(self) -> tuple[ir.Plan, ...]:
        """Per piece of the model the plan of what it does, on the devices of one group."""
        return tuple(self.data.plans[p.plan] for p in self.data.pieces)

    @property
    def alternatives(self) -> tuple[ir.Alternative, ...]:
        """The pipelines it beat, the best first."""
        return self.data.alternatives

    @property
    def ops(self) -> tuple[ir.OpPlan, ...]:
        """Every operation of every piece."""
        return tuple(op for plan in self.stages for op in plan.ops)

    @property
    def problem(self) -> Any:
        """Several problems were solved: PlanError."""
        raise PlanError("a pipeline has a problem for each of its pieces, not one")

    @property
    def compiler_options(self) -> Mapping[str, str]:
        """XLA's options for the programs of all tasks."""
        return dict(self.data.plans[0].compiler_options)

    @property
    def state(self) -> tuple[tuple[int, int], ...]:
        """Places of arguments and of the results that take their place."""
        traced = self._bound_cut("state").staged.traced
        inputs = {v: k for k, v in enumerate(traced.graph.inputs)}
        outputs = {v: k for k, v in enumerate(traced.graph.outputs)}
        return tuple((inputs[i], outputs[o]) for i, o in state_pairs(traced))

    @property
    def in_shardings(self) -> Any:
        """An argument lies with the stages that use it: PlanError; see `stages`."""
        raise PlanError(_NO_SPECS)

    @property
    def out_shardings(self) -> Any:
        """A result lies with the stage that makes it: PlanError; see `stages`."""
        raise PlanError(_NO_SPECS)

    def lower(self, devices: Any = None) -> Any:
        """A pipeline is many programs: PlanError; `compile` gives the function that runs them."""
        raise PlanError(
            "a pipeline is a program for each task of each stage: plan.compile() gives the "
            "function that runs them"
        )

    def place(self, *args: Any, devices: Any = None, **kwargs: Any) -> Any:
        """The function that `compile` gives places its arguments by itself: PlanError."""
        raise PlanError("the compiled function of a pipeline places its arguments by itself")

    def verify(self, devices: Any = None, *, top: int = 1, progress: Any = None) -> Any:
        """Compile what each different piece does in a step, and compare; a PipelineVerification.

        devices: of one group, to compile for; None for the cluster's own. Raises as Plan.verify.
        """
        from autoshard.pipeline_verification import verify_pieces

        if top > 1:
            raise PlanError("of a pipeline only the plan itself is compiled: leave top out")
        traced = [own for _, own in self._pieces()]
        return verify_pieces(self.stages, traced, devices, progress or (lambda _: None))

    @property
    def timeline(self) -> Timeline:
        """When each task is predicted to run: to print, draw or keep as a trace."""
        return timeline_of(self.data)

    @property
    def lowering(self) -> str:
        """How `compile` runs it here, in words."""
        if jax.process_count() > 1:
            whole = "; each group updates all of its stage" if self.data.shared_update else ""
            return f"one program for all devices, of ticks that follow the table{whole}"
        return (
            "one program for each task of each stage, started by a single controller along the "
            f"table of {self.data.table.name}"
        )

    def to_json(self) -> str:
        """The plan as JSON text, the same for the same plan."""
        return self.data.to_json()

    @staticmethod
    def from_json(
        text: str, fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any
    ) -> PipelinedPlan:
        """Read a plan; with the function and its arguments, bind it to them. Raises PlanError."""
        read = PipelinedPlan(PipelinePlan.from_json(text))
        return read if fn is None else read.bind(fn, *args, **kwargs)

    @classmethod
    def reads(cls, text: str) -> bool:
        """Whether text is the plan of a pipeline."""
        return MARK in str(text)

    def bind(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> PipelinedPlan:
        """The same plan for this function, which must be the one it was made for (PlanError)."""
        data = self.data
        fn = computing_again(fn, args, kwargs, data.remat)
        cut = cut_program(
            fn,
            args,
            kwargs,
            {},
            steps=data.time_axis.size,
            over=data.time_axis,
            pieces=len(data.pieces),
            apart=data.apart,
            weigh=partial(
                op_seconds,
                cluster=Cluster.from_dict(data.cluster),
                fused_attention=data.fused_attention,
            ),
        )
        bound = PipelinedPlan(data, cut)
        bound.layouts()
        return bound

    def layouts(self) -> tuple[StageLayout, ...]:
        """Per piece where its values lie in a group; PlanError where the plan is another's."""
        out = []
        for k, (plan, (step, traced)) in enumerate(zip(self.stages, self._pieces(), strict=True)):
            planned, signature = map(_nameless, (plan.signature, ir.signature_of(traced.graph)))
            if planned != signature:
                found = "; ".join(ir.differences(planned, signature))
                raise PlanError(
                    f"piece {k} of {self.data.name} is not what was planned: {found}. Plan again "
                    "for this function"
                )
            out.append(planned_layout(step, traced, plan))
        return tuple(out)

    def _pieces(self) -> list[tuple[StageStep, Traced]]:
        """What each piece does in a step, and this traced."""
        cut = self._bound_cut("compile")
        data = self.data
        form = Form(
            data.stages,
            data.groups,
            data.mesh_axes,
            data.microbatches,
            data.chunks,
            data.apart,
            data.shared_update,
        )
        steps = [stage_of(cut, k, form) for k in range(len(data.pieces))]
        return [(step, traced_stage(step, cut.names)) for step in steps]

    def _bound_cut(self, what: str) -> CutProgram:
        if self._cut is None:
            raise PlanError(
                f"Plan.{what} needs the function: give it to Plan.from_json(text, fn, *args), "
                "or call plan.bind(fn, *args)"
            )
        return self._cut

    def compile(
        self, devices: Sequence[Any] | jax.sharding.Mesh | None = None
    ) -> Callable[..., Any]:
        """The function over the stages: takes and returns what fn does.

        devices: those that jax has when omitted. Programs are compiled when they first run. Where
        jax runs in several processes, which no single controller reaches, it is one program for all
        devices (`autoshard.spmd_pipeline`), for stages that shard nothing inside.

        Raises DevicesError when there are too few; PlanError and NoSpmdPipeline for what one
        program can not be.
        """
        layouts, staged = self.layouts(), self._bound_cut("compile").staged
        if isinstance(devices, jax.sharding.Mesh):
            devices = list(devices.devices.flat)
        names, sizes = zip(*self.data.axes, strict=True)
        grid = device_mesh(Mesh(names, sizes), devices).devices
        schedule, traced = schedule_of(self.data.table), staged.traced
        if jax.process_count() > 1:
            run = self._as_one_program(staged, schedule, grid)
        else:
            each = [list(own.flat) for own in grid]
            run = Controller(traced, staged.loop, staged.stages, schedule, each, layouts)

        def call(*args: Any, **kwargs: Any) -> Any:
            flat, tree = jax.tree.flatten((args, kwargs))
            if tree != traced.in_tree:
                raise TypeError(f"{self.data.name} was planned for arguments of another structure")
            return jax.tree.unflatten(traced.out_tree, run(*flat))

        call.__name__ = call.__qualname__ = self.data.name
        call.run = run  # type: ignore[attr-defined]
        return call

    def _as_one_program(
        self, staged: Staged, schedule: Schedule, grid: Any
    ) -> Callable[..., list[Any]]:
        """The pipeline as one program over all processes."""
        if self.data.mesh_axes.devices > 1:
            inside = " ".join(f"{n}={s}" for n, s in self.data.mesh)
            raise PlanError(
                f"this plan shards stages over {inside}, and jax runs in {jax.process_count()} "
                "processes: one program for all of them shards nothing inside a stage. Plan with "
                "mesh={'stage': ..., 'data': ...}"
            )
        needed, limit = whole_memory(self.data), self.data.memory_limit
        if needed > limit:
            raise PlanError(
                f"this plan has optimizer state in parts over {self.data.groups} groups, and jax "
                f"runs in {jax.process_count()} processes: one program for all of them has it "
                f"whole in each group, for which a device needs {format_bytes(needed)} and has "
                f"{format_bytes(limit)}. Plan with shared_update=False"
            )
        mesh = jax.sharding.Mesh(grid.reshape(grid.shape[:2]), OUTER)
        whole = SpmdPipeline(staged.traced, staged.loop, staged.stages, schedule, mesh)
        compiled = jax.jit(whole, in_shardings=whole.shardings)

        def run(*flat: Any) -> list[Any]:
            placed = [jax.device_put(x, s) for x, s in zip(flat, whole.shardings, strict=True)]
            return list(compiled(*placed))

        return run

    def explain(self, glob: str) -> str:
        """Of each different piece, why the values that a glob names are sharded so."""
        from autoshard.explain import explain

        out = []
        for k, plan in enumerate(self.data.plans):
            where = [i for i, p in enumerate(self.data.pieces) if p.plan == k]
            told = f"piece {', '.join(map(str, where))}\n{explain(plan, None, glob)}"
            out.append("\n".join([told, *self._in_parts(where[0], glob)]))
        return "\n\n".join(out)

    def _in_parts(self, piece: int, glob: str) -> Iterator[str]:
        """A line for each argument of a piece that a glob names and groups have parts of."""
        if self._cut is None or not self.data.shared_update:
            return
        names, groups = self._cut.names, self.data.groups
        over = stage_parts(self._cut, piece, groups, self.data.mesh_axes.devices)
        rest = [p for p in over.rest if p in names]
        for k in named(glob, [names[p] for p in rest]):
            path, dim = path_of(names[rest[k]]), over.dims[rest[k]]
            yield f"{path}: each of {groups} groups has its part of dim {dim}, as shown"

    def headline(self) -> str:
        """The beginning of the print-out: mesh, schedule, step time and memory."""
        from autoshard.report_pipeline import head

        return "\n".join(head(self.data, self.timeline))

    def __str__(self) -> str:
        from autoshard.report_pipeline import report

        return report(self.data)

    def __repr__(self) -> str:
        mesh = ", ".join(f"{n}={s}" for n, s in self.data.axes)
        return f"PipelinedPlan({self.data.name}, {mesh}, {self.data.cost.step_time:.3g} s)"


def _nameless(signature: Sequence[str]) -> tuple[str, ...]:
    """A signature without the names of arguments: layers alike have different ones."""
    return tuple(
        f"argument: {line.rpartition(': ')[2]}" if line.startswith("argument ") else line
        for line in signature
    )
