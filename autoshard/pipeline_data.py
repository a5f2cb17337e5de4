"""From a priced pipeline to its plan as data, and back to a schedule: `as_plan`, `schedule_of`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autoshard.pipeline_costs import Pipeline
from autoshard.pipeline_search import Searched
from autoshard.stage_prices import GROUPS, Exchanged
from autoshard.time_axes import MOSTLY, kept_out
from autoshard.trace import Traced
from cost_models.cluster import Cluster
from cost_models.units import format_bytes
from passes.dims_loop import dims_text
from passes.ir.graph import Graph, Hint
from passes.ir.pipeline_plan import Piece, PipelinePlan, Table
from passes.ir.plan import Alternative, Cost, Plan, TimeAxis, fingerprint, signature_of
from passes.pipeline.schedule import Place, Schedule, Task, Transfer
from passes.pipeline.stage_costs import StageCosts
from passes.pipeline.timeline import Timeline, simulate
from passes.time_loop import TimeLoop

# What becomes of hints over the axes outside a stage, but for those that split a batch.
_WHY = {
    "stage": "decides nothing: a stage holds the layers that it runs",
    GROUPS: "is not followed: every group holds all weights of its stages; shared_update=True "
    "splits the optimizer's state over the groups",
}


def as_plan(
    found: Searched,
    traced: Traced,
    cluster: Cluster,
    limit: float,
    fused_attention: bool,
    over: TimeAxis,
    hints: Sequence[Hint],
) -> PipelinePlan:
    """The plan of the best pipeline. traced: the function as the user wrote it. over: the axis of
    its microbatches, whatever its size. hints: what was asked of the values of `traced`.
    """
    best, form = found.best, found.best.form
    plans: list[Plan] = []
    pieces = []
    for price in best.prices:
        plan = price.found.plan
        if plan not in plans:
            plans.append(plan)
        pieces.append(
            Piece(
                plans.index(plan),
                price.seconds["F"],
                price.seconds["B"],
                price.seconds["W"],
                price.update,
                price.lying,
                price.working,
                price.updating,
                price.activation,
                price.kept,
                price.sent,
                price.exchanged.reduced,
                price.exchanged.scattered,
                price.exchanged.gathered,
                price.spared,
            )
        )
    signature = signature_of(traced.graph)
    return PipelinePlan(
        name=traced.graph.name,
        fingerprint=fingerprint(signature),
        signature=signature,
        cluster=cluster.to_dict(),
        stages=form.stages,
        chunks=form.chunks,
        groups=form.groups,
        mesh=tuple(form.mesh.as_dict().items()),
        microbatches=form.microbatches,
        time_axis=replace(over, size=form.steps),
        apart=form.apart,
        shared_update=form.shared_update,
        table=_table(best.timeline.schedule),
        send=best.timeline.costs.send,
        tails=best.tails,
        memory=best.memory,
        memory_limit=limit,
        cost=cost_of(best),
        pieces=tuple(pieces),
        plans=tuple(plans),
        donated=tuple(k for k, given in enumerate(traced.donated) if given),
        alternatives=tuple(_alternatives(found)),
        notes=(
            *_over(traced, over, form.steps),
            *_left_out(traced.graph, hints, best.cut.staged.loop),
            *_outside(best, over),
            *_notes(found),
            *_shared(best),
            *_in_pieces(best),
            *traced.graph.notes,
        ),
        fused_attention=fused_attention,
    )


def _over(traced: Traced, axis: TimeAxis, steps: int) -> list[str]:
    """What hints say that the microbatches are of."""
    over = dims_text(traced.graph, axis.dims)
    return [f"{axis.name}={steps} runs over {over}, the microbatches of all groups"] * bool(over)


def _left_out(graph: Graph, hints: Sequence[Hint], loop: TimeLoop) -> list[str]:
    """What is asked of arguments over axes that no stage splits them over."""
    split = dict(zip(graph.inputs, map(loop.seeds.get, loop.graph.inputs), strict=True))
    said: dict[tuple[str, str], None] = {}
    for hint in (h for h in hints if h.value in split):
        part = split[hint.value]
        for dim, axes in enumerate(hint.dims):
            batch = part is not None and part.dim == dim
            said |= {(a, hint.origin): None for a in axes or () if a in _WHY and not batch}
    return [f"{axis!r} in {origin} {_WHY[axis]}" for axis, origin in said]


def _outside(pipeline: Pipeline, over: TimeAxis) -> list[str]:
    """What no schedule can do in microbatches, and why."""
    loop = pipeline.cut.staged.loop
    if loop.share >= MOSTLY or not (loop.couplings or loop.ahead):
        return []
    return [
        f"{1 - loop.share:.0%} of the FLOPs run before or after all microbatches, and no schedule "
        f"spreads them: {kept_out(over, loop)}"
    ]


def cost_of(pipeline: Pipeline) -> Cost:
    """What a pipeline costs its busiest device."""
    form, prices = pipeline.form, pipeline.prices
    compute = waiting = sent = flops = 0.0
    for place in range(form.stages):
        own = [k for k, p in enumerate(pipeline.timeline.schedule.ways[0]) if p.device == place]
        work = sum(sum(prices[k].compute.values()) for k in own) * form.microbatches
        whole = sum(sum(prices[k].seconds.values()) for k in own) * form.microbatches
        update = sum(prices[k].update for k in own)
        compute = max(compute, work + update)
        waiting = max(waiting, whole - work + pipeline.tails[place] - update)
        moved = sum(prices[k].found.plan.cost.comm_bytes for k in own)
        moved += sum(prices[k].sent * form.microbatches for k in own)
        moved += sum(_exchanged(prices[k].exchanged) for k in own) * (form.groups > 1)
        sent = max(sent, moved)
        flops = max(flops, sum(prices[k].found.plan.cost.flops for k in own))
    return Cost(pipeline.step_time, compute, waiting, max(pipeline.memory), sent, flops)


def _exchanged(found: Exchanged) -> float:
    """Bytes that a device sends to other groups."""
    return 2 * found.reduced + found.scattered + found.gathered


def timeline_of(plan: PipelinePlan) -> Timeline:
    """The plan's schedule with the times that are predicted."""
    costs = StageCosts(
        tuple(p.forward for p in plan.pieces),
        tuple(p.backward for p in plan.pieces),
        tuple(p.weight for p in plan.pieces),
        plan.send,
        tuple(p.activation for p in plan.pieces),
        tuple(p.kept for p in plan.pieces),
        tuple(0.0 for _ in plan.pieces),
    )
    return simulate(schedule_of(plan.table), costs)


def whole_memory(plan: PipelinePlan) -> float:
    """Bytes of the fullest device, if each group held all of its optimizer's state."""
    needed = list(plan.memory)
    for way in plan.table.ways:
        for piece, (device, _) in zip(plan.pieces, way, strict=True):
            needed[device] += piece.spared
    return max(needed)


def schedule_of(table: Table) -> Schedule:
    """The schedule that a table says."""
    ways = tuple(tuple(Place(d, c) for d, c in way) for way in table.ways)
    orders = tuple(tuple(map(_task, order)) for order in table.orders)
    transfers = tuple(tuple(map(_transfer, order)) for order in table.transfers)
    return Schedule(table.name, ways, table.way_of, orders, transfers)


def _table(schedule: Schedule) -> Table:
    return Table(
        schedule.name,
        tuple(tuple((p.device, p.chunk) for p in way) for way in schedule.ways),
        schedule.way_of,
        tuple(tuple(map(str, order)) for order in schedule.orders),
        tuple(
            tuple(f"{t.task} {t.beside}" if t.beside else str(t.task) for t in order)
            for order in schedule.transfers
        ),
    )


def _task(text: str) -> Task:
    kind = text.rstrip("0123456789.")
    microbatch, _, chunk = text[len(kind) :].partition(".")
    return Task(kind, int(microbatch), int(chunk or 0))


def _transfer(text: str) -> Transfer:
    task, _, beside = text.partition(" ")
    return Transfer(_task(task), _task(beside) if beside else None)


def _alternatives(found: Searched) -> list[Alternative]:
    out = []
    for p in found.others:
        ratio = p.step_time / found.best.step_time
        out.append(_alternative(p, f"{ratio:.2f}x the step time"))
    for form, name, why in found.refused:
        axes = (("stage", form.stages), ("data", form.groups), *form.mesh.as_dict().items())
        out.append(Alternative(name, axes, None, why.partition(". ")[0]))
    return out


def _alternative(p: Pipeline, note: str) -> Alternative:
    form = p.form
    axes = (("stage", form.stages), ("data", form.groups), *form.mesh.as_dict().items())
    chunks = f" in {form.chunks} chunks" if form.chunks > 1 else ""
    name = f"{p.timeline.schedule.name}{chunks}, {form.microbatches} microbatches"
    return Alternative(name, axes, cost_of(p), note)


def _notes(found: Searched) -> Sequence[str]:
    tried = 1 + len(found.others) + len(found.refused)
    if found.left:
        return (
            f"{tried} pipelines were priced, the most promising first; {found.left} others that "
            "may be faster were not",
        )
    return (f"{tried} pipelines were priced; no other of the forms that are tried promises more",)


def _shared(pipeline: Pipeline) -> Sequence[str]:
    """What groups have in parts, and why."""
    spared = [p.spared for p in pipeline.prices]
    if not pipeline.form.shared_update or not max(spared):
        return ()
    return (
        f"optimizer state over {pipeline.form.groups} groups: each updates its part and holds no "
        f"other, which spares up to {format_bytes(max(spared))} per piece on each device; "
        "gradients are reduce-scattered, what tasks read of the new parameters is all-gathered",
    )


def _in_pieces(best: Pipeline) -> tuple[str, ...]:
    """What is said of stacked results that are no array of jax's (`autoshard.stacked_array`)."""
    program, joins = best.cut.made.program, best.cut.made.stacked.joins
    spec = {
        p: r.spec
        for price in best.prices
        for p, r in zip(
            price.step.results, price.found.plan.results[len(price.step.sent) :], strict=True
        )
    }

    def one_array(parts: Sequence[int]) -> bool:
        forms = {(program.avals[p].shape, spec.get(p, ())) for p in parts}
        return len(forms) == 1 and not any(s[0] for _, s in forms if s)

    if not joins or (best.form.chunks == 1 and all(map(one_array, joins.values()))):
        return ()
    return (
        "results of stacked layers stay where their pieces lie, some as autoshard.StackedArray, "
        "which the next step takes",
    )
