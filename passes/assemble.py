"""From a choice to a Plan: everything that is read off the choice, in a user's words."""

from __future__ import annotations

from collections.abc import Sequence

from passes.answer import Answer, Change, read_back
from passes.compiler import compiler_options
from passes.constraints import asked
from passes.held import local_bytes
from passes.ir.graph import Graph, Op
from passes.ir.plan import (
    Axes,
    Move,
    OpPlan,
    Plan,
    TensorPlan,
    fingerprint,
    signature_of,
)
from passes.ir.sharding import Sharding
from passes.plan_cost import cost_of_answer
from passes.priced import Priced
from passes.reshard import reshard_seconds
from passes.solve.problem import Solution
from passes.strategies import (
    NOWHERE,
    group_of,
    parts,
)


def assemble(
    priced: Priced, solution: Solution, solver: str, limit: float, notes: Sequence[str] = ()
) -> Plan:
    """The plan that a solution stands for."""
    graph = priced.graph
    answer = read_back(priced, solution.choice)
    values = answer.values
    wanted = asked(priced, solution.choice, values, answer.strategies)
    signature = signature_of(graph)
    return Plan(
        name=graph.name,
        fingerprint=fingerprint(signature),
        signature=signature,
        cluster=priced.cluster.to_dict(),
        mesh=tuple(zip(priced.mesh.names, priced.mesh.sizes, strict=True)),
        solver=solver,
        status=solution.status,
        gap=solution.gap,
        memory_limit=limit,
        cost=cost_of_answer(priced, answer),
        arguments=tuple(_tensor(priced, v, graph.values[v].name, values[v]) for v in graph.inputs),
        results=tuple(
            _tensor(priced, v, name, values[v])
            for v, name in zip(graph.outputs, graph.output_names, strict=True)
        ),
        ops=_op_plans(priced, answer),
        values=wanted.values,
        reshards=wanted.reshards,
        donated=tuple(i for i, v in enumerate(graph.inputs) if v in graph.donated),
        notes=(*graph.notes, *notes),
        compiler_options=compiler_options(priced.cluster),
    )


def _tensor(priced: Priced, v: int, name: str, axes: Axes) -> TensorPlan:
    type = priced.graph.values[v].type
    spec = Sharding(axes).spec(len(type.shape), priced.mesh)
    hints = priced.decisions.groups[priced.decisions.group_of[v]].hints
    return TensorPlan(
        name, type.shape, type.dtype, type.nbytes, spec, hints[0].origin if hints else ""
    )


def _op_plans(priced: Priced, answer: Answer) -> tuple[OpPlan, ...]:
    by_op: dict[int, list[Change]] = {}
    for c in answer.changes:
        by_op.setdefault(c.op, []).append(c)
    return tuple(_op_plan(priced, op, answer, by_op.get(op.id, ())) for op in priced.graph.ops)


def _op_plan(priced: Priced, op: Op, answer: Answer, changed: Sequence[Change]) -> OpPlan:
    graph, mesh = priced.graph, priced.mesh
    trips = graph.trips(op.region)
    values, strategy = answer.values, answer.strategies[op.id]
    split = parts(strategy, mesh.sizes)
    return OpPlan(
        id=op.id,
        name=op.name,
        source=op.source,
        factors=op.rule.notation(),
        strategy=tuple(
            (mesh.names[a], op.rule.factors[s].name if s >= 0 else f"partial operand {group_of(s)}")
            for a, s in enumerate(strategy)
            if s != NOWHERE
        ),
        result=" ".join(
            Sharding(values[v]).text(graph.values[v].shape, _short(graph, v), mesh)
            for v in op.outputs
        ),
        seconds=answer.seconds[op.id],
        bytes=sum(local_bytes(graph.values[v].type.nbytes, values[v], priced) for v in op.outputs),
        flops=op.rule.flops / split * trips,
        trips=trips,
        collectives=tuple(m for c in changed for m in moves_of(priced, op, c)),
    )


def _short(graph: Graph, v: int) -> str:
    return str(graph.values[v].type).split("[")[0]


def moves_of(priced: Priced, op: Op, change: Change) -> list[Move]:
    """The collectives of one change of sharding."""
    value = priced.graph.values[change.value]
    what = value.name or f"{value.type} of {op.name}"
    return [
        Move(
            kind=s.kind,
            axes=(priced.mesh.names[s.axis],),
            nbytes=s.larger * change.nbytes,
            seconds=reshard_seconds([s], change.nbytes, priced.links),
            source=op.source,
            value=what,
            trips=change.trips,
        )
        for s in change.moves
        if s.kind != "slice"
    ]
