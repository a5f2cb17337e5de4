"""Is this a graph at all?  Named checks, each a small function, to run after tracing or a pass.

>>> from passes.ir.parse import parse_graph
>>> verify(parse_graph("graph f\\n  arg x  f32[8]\\n  %0 = neg x  f32[8]  i -> i\\n  out %0"))
>>> verify(parse_graph("graph f\\n  arg x  f32[8]\\n  %0 = neg x  f32[9]  i -> i\\n  out %0"))
Traceback (most recent call last):
    ...
passes.ir.verify.InvalidGraph: rule_fits_types: op 0 (neg): dim 0 of %0 has length 9, its factors \
(i) make 8
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from passes.ir.graph import LOOPS, Graph, Op
from passes.ir.rule import Rule
from passes.ir.text import value_names

LOOP_BODY_LINKS = frozenset({"loop_next", "scan_slice", "scan_stack"})

Check = Callable[[Graph], Iterator[str]]


class InvalidGraph(ValueError):
    """A graph that breaks a rule of the IR: a bug of ours. Names the check and the operation."""


def verify(graph: Graph) -> None:
    """Run all checks in order; raises InvalidGraph at the first offence."""
    for check in CHECKS:
        for offence in check(graph):
            raise InvalidGraph(f"{check.__name__}: {offence}")


def ids_are_dense(graph: Graph) -> Iterator[str]:
    """Value, op and region number n stands at place n, and all that is referred to exists."""
    for kind, ids in (
        ("value", [v.id for v in graph.values]),
        ("op", [op.id for op in graph.ops]),
        ("region", [r.id for r in graph.regions]),
    ):
        yield from (f"{kind} at place {n} has id {i}" for n, i in enumerate(ids) if i != n)
    for op in graph.ops:
        for v in (*op.inputs, *op.outputs):
            if not 0 <= v < len(graph.values):
                yield f"{_place(op)}: there is no value {v}"
        if not 0 <= op.region < len(graph.regions):
            yield f"{_place(op)}: there is no region {op.region}"


def inputs_and_outputs_exist(graph: Graph) -> Iterator[str]:
    """Inputs are exactly the arguments, outputs are values, donated values are inputs."""
    arguments = [v.id for v in graph.values if v.kind == "argument"]
    if sorted(graph.inputs) != arguments:
        yield f"inputs are {sorted(graph.inputs)}, but the arguments are {arguments}"
    for v in graph.outputs:
        if not 0 <= v < len(graph.values):
            yield f"there is no value {v} to give back"
    if graph.output_names and len(graph.output_names) != len(graph.outputs):
        yield f"{len(graph.output_names)} output names for {len(graph.outputs)} outputs"
    for v in sorted(graph.donated - frozenset(graph.inputs)):
        yield f"value {v} is donated but no input"


def values_are_defined_before_use(graph: Graph) -> Iterator[str]:
    """Results come from one op each, that stands above all their uses."""
    names = value_names(graph)
    defined = {v.id for v in graph.values if v.kind != "result"}
    for op in graph.ops:
        for v in op.inputs:
            if v not in defined:
                yield f"{_place(op)}: {names[v]} is used before it is defined"
        for v in op.outputs:
            if v in defined:
                yield f"{_place(op)}: {names[v]} is defined a second time"
            defined.add(v)
    for v in graph.outputs:
        if v not in defined:
            yield f"{names[v]} is given back but never defined"
    for value in graph.values:
        if value.id not in defined:
            yield f"{names[value.id]} is a result of no op"


def regions_are_nested(graph: Graph) -> Iterator[str]:
    """Region 0 is everything; others lie inside their parents, in order, without overlap."""
    top, count = graph.regions[0], len(graph.ops)
    if top.kind != "top" or (top.begin, top.end, top.trips) != (0, count, 1):
        yield f"region 0 is {top.kind} [{top.begin}, {top.end}) x{top.trips}, not all {count} ops"
    reached = [r.begin for r in graph.regions]
    for r in graph.regions[1:]:
        if not 0 <= r.parent < r.id:
            yield f"region {r.id} ({r.kind}) has parent {r.parent}, which is not before it"
            continue
        parent = graph.regions[r.parent]
        if not reached[r.parent] <= r.begin <= r.end <= parent.end:
            yield f"region {r.id} ({r.kind}) [{r.begin}, {r.end}) does not fit into its parent"
        if not (r.trips >= 0 and math.isfinite(r.trips)):
            yield f"region {r.id} ({r.kind}) runs {r.trips} times"
        reached[r.parent] = r.end


def ops_know_their_region(graph: Graph) -> Iterator[str]:
    """Each op names the innermost region whose span holds it."""
    inner = [0] * len(graph.ops)
    for r in graph.regions[1:]:
        inner[r.begin : r.end] = [r.id] * (r.end - r.begin)
    for op, region in zip(graph.ops, inner, strict=True):
        if op.region != region:
            yield f"{_place(op)}: says region {op.region}, stands in region {region}"


def rule_fits_types(graph: Graph) -> Iterator[str]:
    """A rule has the operands, results and ranks of its op; factors multiply to dim lengths."""
    names = value_names(graph)
    for op in graph.ops:
        rule = op.rule
        if (len(rule.operands), len(rule.results)) != (len(op.inputs), len(op.outputs)):
            yield f"{_place(op)}: {len(op.inputs)} -> {len(op.outputs)} values, rule {rule}"
            continue
        tensors = zip((*op.inputs, *op.outputs), (*rule.operands, *rule.results), strict=True)
        for v, dims in tensors:
            for offence in _dims_offences(rule, dims, graph.values[v].shape, names[v]):
                yield f"{_place(op)}: {offence}"


def _dims_offences(
    rule: Rule, dims: tuple[tuple[int, ...], ...], shape: tuple[int, ...], name: str
) -> Iterator[str]:
    if len(dims) != len(shape):
        yield f"{name} has {len(shape)} dims, the rule gives it {len(dims)}: {rule}"
        return
    if any(not 0 <= f < len(rule.factors) for dim in dims for f in dim):
        yield f"the rule gives {name} a factor that it does not have"
        return
    for d, (dim, length) in enumerate(zip(dims, shape, strict=True)):
        made = math.prod(rule.factors[f].size for f in dim)
        if dim and made != length:
            letters = " ".join(rule.factors[f].name for f in dim)
            yield f"dim {d} of {name} has length {length}, its factors ({letters}) make {made}"


def factors_make_sense(graph: Graph) -> Iterator[str]:
    """A factor is at most once on a tensor; a reduction has an op and is on no result."""
    seen: set[int] = set()
    for op in graph.ops:
        rule = op.rule
        if id(rule) in seen:
            continue
        seen.add(id(rule))
        for dims in (*rule.operands, *rule.results):
            used = [f for dim in dims for f in dim]
            if len(set(used)) != len(used):
                yield f"{_place(op)}: a factor is twice on one tensor: {rule}"
        for offence in _kind_offences(rule):
            yield f"{_place(op)}: {offence}: {rule}"


def _kind_offences(rule: Rule) -> Iterator[str]:
    kept = {f for dims in rule.results for dim in dims for f in dim}
    for n, f in enumerate(rule.factors):
        if f.size < 0:
            yield f"factor {f.name} has size {f.size}"
        if f.kind == "reduction" and not f.op:
            yield f"reduction factor {f.name} does not say what reduces it"
        if f.kind == "reduction" and n in kept:
            yield f"reduction factor {f.name} is on a result"
    for group in rule.linear:
        if any(not 0 <= k < len(rule.operands) for k in group):
            yield f"linear in operands {group}, of which there are {len(rule.operands)}"


def links_cross_borders(graph: Graph) -> Iterator[str]:
    """Only links carry a value into or out of a loop; other regions have no walls."""
    names = value_names(graph)
    loops = _loops(graph)
    around = [loops[r.parent] for r in graph.regions]
    # Per argument and result the loop in which it may be used; constants may be used anywhere.
    home = {v.id: 0 for v in graph.values if v.kind == "argument"}
    entering: set[int] = set()  # what loop_enter made: for the loops just inside its own
    for op in graph.ops:
        loop = loops[op.region]
        for v in op.inputs:
            here = home.get(v, loop)
            inside = around[loop] == here and (v in entering or op.name == "scan_slice")
            if here != loop and not inside:
                yield f"{_place(op)}: {names[v]} of region {here} is used in region {op.region}"
        leaves = op.name in ("loop_next", "scan_stack")
        if op.name in LOOP_BODY_LINKS and not loop:
            yield f"{_place(op)}: stands in no loop"
        home.update(dict.fromkeys(op.outputs, around[loop] if leaves else loop))
        if op.name == "loop_enter":
            entering.update(op.outputs)
    for v in graph.outputs:
        if home.get(v, 0) != 0:
            yield f"{names[v]} is given back from inside region {home[v]}"


def _loops(graph: Graph) -> list[int]:
    """Per region the innermost loop it is or lies in; 0 for none."""
    out: list[int] = []
    for r in graph.regions:
        out.append(r.id if r.kind in LOOPS else out[r.parent] if r.id else 0)
    return out


def ties_are_alike(graph: Graph) -> Iterator[str]:
    """Tied values have one shape."""
    names = value_names(graph)
    for a, b in graph.ties:
        if graph.values[a].shape != graph.values[b].shape:
            yield f"{names[a]} and {names[b]} are tied but have different shapes"


def hints_fit(graph: Graph) -> Iterator[str]:
    """A hint is about a value there is, and has one entry per dim."""
    for hint in graph.hints:
        if not 0 <= hint.value < len(graph.values):
            yield f"the hint of {hint.origin} is about value {hint.value}, which does not exist"
        elif len(hint.dims) != len(graph.values[hint.value].shape):
            rank = len(graph.values[hint.value].shape)
            yield f"the hint of {hint.origin} has {len(hint.dims)} entries for {rank} dims"


def _place(op: Op) -> str:
    where = f" at {op.source}" if op.source else ""
    return f"op {op.id} ({op.name}){where}"


CHECKS: tuple[Check, ...] = (
    ids_are_dense,
    inputs_and_outputs_exist,
    values_are_defined_before_use,
    regions_are_nested,
    ops_know_their_region,
    rule_fits_types,
    factors_make_sense,
    links_cross_borders,
    ties_are_alike,
    hints_fit,
)
