"""What must hold after propagation for any graph, any mesh and any hints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from passes.factor_flow import project
from passes.ir.graph import Graph, Hint, Op, Region, Type, Value
from passes.ir.mesh import Mesh
from passes.ir.rule import Factor, Kind, Rule
from passes.ir.verify import verify
from passes.propagate import Propagation, _Run, propagate, wire

SIZES = st.sampled_from([1, 2, 4, 6, 8, 12])


@st.composite
def rules(draw: st.DrawFn, operands: list[tuple[int, ...]]) -> tuple[Rule, tuple[int, ...]]:
    """A rule for operands of these shapes, with shared factors, and a result's shape."""
    sizes: list[int] = []
    sides = []
    for shape in operands:
        dims: list[tuple[int, ...]] = []
        used: set[int] = set()
        for n in shape:
            free = [f for f, size in enumerate(sizes) if size == n and f not in used]
            choice = draw(st.integers(0, 5))
            if choice == 0 and n == 1:
                dim: tuple[int, ...] = ()
            elif choice <= 3 and free:
                dim = (draw(st.sampled_from(free)),)
            elif choice == 4 and n > 2 and n % 2 == 0:
                sizes += [2, n // 2]
                dim = (len(sizes) - 2, len(sizes) - 1)
            else:
                sizes.append(n)
                dim = (len(sizes) - 1,)
            used |= set(dim)
            dims.append(dim)
        sides.append(tuple(dims))
    kept = draw(st.permutations(range(len(sizes))))[: draw(st.integers(0, min(4, len(sizes))))]
    result: list[tuple[int, ...]] = []
    for f in kept:
        if result and len(result[-1]) == 1 and draw(st.booleans()):
            result[-1] += (f,)
        else:
            result.append((f,))
    factors = []
    for f, size in enumerate(sizes):
        kinds: list[Kind] = ["parallel", "parallel", "parallel", "whole", "halo"]
        kind = draw(st.sampled_from(kinds if f in kept else [*kinds, "reduction", "reduction"]))
        op, halo = "add" if kind == "reduction" else "", int(kind == "halo")
        factors.append(Factor(f"f{f}", size, kind, op, halo))
    rule = Rule(tuple(factors), tuple(sides), (tuple(result),))
    return rule, tuple(math.prod(sizes[f] for f in dim) for dim in result)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A graph of random operations, some values tied, some used twice by one operation."""
    shapes = [tuple(draw(st.lists(SIZES, max_size=3))) for _ in range(draw(st.integers(1, 3)))]
    count = len(shapes)
    ops = []
    for n in range(draw(st.integers(1, 8))):
        inputs = tuple(
            draw(st.integers(0, len(shapes) - 1)) for _ in range(draw(st.integers(1, 3)))
        )
        if draw(st.booleans()):
            dims = tuple((d,) for d in range(len(shapes[inputs[0]])))
            factors = tuple(Factor(f"f{d}", size) for d, size in enumerate(shapes[inputs[0]]))
            same = tuple(v for v in inputs if shapes[v] == shapes[inputs[0]])
            rule, shape, inputs = Rule(factors, (dims,) * len(same), (dims,)), shapes[same[0]], same
        else:
            rule, shape = draw(rules([shapes[v] for v in inputs]))
        name = draw(st.sampled_from(["op", "broadcast_in_dim", "dynamic_slice", "reshape"]))
        ops.append(Op(n, name, inputs, (len(shapes),), rule, {}, f"a.py:{n}"))
        shapes.append(shape)
    values = tuple(
        Value(v, Type(shape, "float32", 32), "argument" if v < count else "result", f"x{v}")
        for v, shape in enumerate(shapes)
    )
    pairs = [(a, b) for a in range(len(shapes)) for b in range(a) if shapes[a] == shapes[b]]
    ties = draw(st.lists(st.sampled_from(pairs), max_size=2)) if pairs else []
    top = Region(0, 0, "top", 1.0, 0, len(ops))
    return Graph("f", values, tuple(ops), (top,), tuple(range(count)), (), ties=tuple(ties))


MESHES = st.sampled_from([Mesh.parse(m) for m in ("a=2", "a=2,b=2", "a=2,b=3,c=2", "a=4,b=2")])


@st.composite
def hinted(draw: st.DrawFn) -> tuple[Graph, Mesh]:
    """A graph with hints that fit it and each other, one value at most once."""
    graph, mesh = draw(graphs()), draw(MESHES)
    hints = []
    for v in graph.values:
        if not draw(st.booleans()) or any(v.id in tie for tie in graph.ties):
            continue
        free = list(draw(st.permutations(mesh.names)))
        dims: list[tuple[str, ...] | None] = []
        for n in v.shape:
            axes = tuple(free[: draw(st.integers(0, 2))]) if draw(st.booleans()) else ()
            if n % math.prod(mesh.as_dict()[a] for a in axes):
                axes = ()
            free = [a for a in free if a not in axes]
            dims.append(axes or draw(st.sampled_from([None, None, ()])))
        hints.append(Hint(v.id, tuple(dims), f"h.py:{v.id}", draw(st.integers(0, 2))))
    return replace(graph, hints=tuple(hints)), mesh


def check_steps(graph: Graph, mesh: Mesh, result: Propagation, value: int, axis: int) -> None:
    """The chain is unbroken, and each step moves along a factor that both values split so."""
    steps = result.why(value, axis)
    assert steps[0].value == value
    assert steps[-1].hint is not None
    assert steps[-1].hint.value == steps[-1].value
    assert mesh.names[axis] in (steps[-1].hint.dims[steps[-1].dim] or ())
    assert len(set(steps)) == len(steps)
    for step, following in pairwise(steps):
        assert result.shardings[step.value].axes[axis] == step.dim
        if step.op is None:
            assert result.group[step.value] == result.group[following.value]
            continue
        op = graph.ops[step.op]
        shared = factors_split_by(op, mesh, result, step.value, axis)
        shared &= factors_split_by(op, mesh, result, following.value, axis)
        assert any(op.rule.factors[f].kind != "whole" for f in shared)


def factors_split_by(op: Op, mesh: Mesh, result: Propagation, value: int, axis: int) -> set[int]:
    out = set()
    tensors = zip(
        (*op.inputs, *op.outputs), (*op.rule.operands, *op.rule.results), strict=True
    )  # fmt: skip
    for v, dims in tensors:
        split = result.shardings[v].dims(len(dims))
        for dim, axes in zip(dims, split, strict=True):
            if v == value and dim and axis in axes:
                parts, _ = project(axes, [op.rule.factors[f].size for f in dim], mesh.sizes)
                out |= {f for f, part in zip(dim, parts, strict=True) if axis in part}
    return out


@given(hinted())
@settings(deadline=None, max_examples=300)
def test_what_holds_for_any_graph(case: tuple[Graph, Mesh]) -> None:
    graph, mesh = case
    verify(graph)
    result = propagate(graph, mesh)
    for v in graph.values:
        sharding = result.shardings[v.id]
        assert not sharding.partial
        assert sharding.divides(v.shape, mesh.sizes)
        for axis, dim in enumerate(sharding.axes):
            if dim >= 0:
                check_steps(graph, mesh, result, v.id, axis)
            else:
                assert result.why(v.id, axis) == ()
    for hint in graph.hints:
        split = result.shardings[hint.value].spec(len(hint.dims), mesh)
        for names, got in zip(hint.dims, split, strict=True):
            assert names is None or set(names) == set(got)
    for a, b in graph.ties:
        assert result.shardings[a] == result.shardings[b]


@given(hinted())
@settings(deadline=None, max_examples=150)
def test_nothing_is_left_to_move_at_the_end(case: tuple[Graph, Mesh]) -> None:
    graph, mesh = case
    result = propagate(graph, mesh)
    run = _Run(graph, mesh, wire(graph))
    run.reserve(result.anchors)
    for priority in (0, 1, 2):
        run.settle(run.place(result.anchors, priority))
    before = [list(dims) for dims in run.dims]
    moves: list[Callable[..., None]] = [run.basic, run.aggressive]
    for move in moves:
        for op in graph.ops:
            open_ = run.disagreeing(op.id)
            if open_:
                move(op.id, open_, 2)
    assert run.dims == before


@given(hinted(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_the_order_of_hints_does_not_matter(case: tuple[Graph, Mesh], random: object) -> None:
    graph, mesh = case
    hints = list(graph.hints)
    random.shuffle(hints)  # type: ignore[attr-defined]
    assert propagate(graph, mesh, hints).shardings == propagate(graph, mesh).shardings


@given(hinted())
@settings(deadline=None, max_examples=100)
def test_hinting_the_result_gives_the_result(case: tuple[Graph, Mesh]) -> None:
    graph, mesh = case
    first = propagate(graph, mesh)
    hints = [
        Hint(v.id, first.shardings[v.id].spec(len(v.shape), mesh), "again") for v in graph.values
    ]
    assert propagate(graph, mesh, hints).shardings == first.shardings
