"""Propagation: small programs read by a person, and what must hold for any graph and any hints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.anchors import HintConflict, anchors
from passes.factor_flow import project
from passes.hints import HintError
from passes.ir.graph import Graph, Hint, Op, Region, Type, Value
from passes.ir.mesh import Mesh
from passes.ir.parse import parse_graph
from passes.ir.rule import Factor, Kind, Rule
from passes.ir.verify import verify
from passes.propagate import Propagation, _Run, propagate

MESH = Mesh.parse("data=4,model=2")


def shardings(text: str, mesh: Mesh = MESH) -> str:
    graph = parse_graph("graph f\n" + text)
    verify(graph)
    return "\n".join(" ".join(line.split()) for line in str(propagate(graph, mesh)).splitlines())


def expect(text: str, wanted: str, mesh: Mesh = MESH) -> None:
    assert shardings(text, mesh).split("\n") == [line.strip() for line in wanted.split(" | ")]


# Small programs.


def test_forwards_backwards_and_sideways() -> None:
    expect(
        """
        arg x  f32[8,16]
        arg w  f32[16,32]
        arg v  f32[32,16]
        hint %1  [data, model]  a.py:1
        %0 = dot_general x w  f32[8,32]  b k, k n -> b n  add(k)
        %1 = tanh %0  f32[8,32]  i j -> i j
        %2 = dot_general %1 v  f32[8,16]  b k, k n -> b n  add(k)
        """,
        "x f32[8{data},16] | w f32[16,32{model}] | v f32[32{model},16] |"
        " %0 f32[8{data},32{model}] | %1 f32[8{data},32{model}] | %2 f32[8{data},16]",
    )


def test_a_closed_dim_stays_unsplit_and_an_open_one_does_not() -> None:
    text = """
        arg x  f32[8,16]
        hint x   [data, {}]  a.py:1
        hint %1  [., {}]  a.py:2
        hint %2  [?, model]  a.py:3
        %0 = tanh x  f32[8,16]  i j -> i j
        %1 = tanh %0  f32[8,16]  i j -> i j
        %2 = tanh %1  f32[8,16]  i j -> i j
    """
    expect(
        text.replace("{}", "?"),
        "x f32[8{data},16{model}] | %0 f32[8{data},16{model}] | %1 f32[8,16{model}] |"
        " %2 f32[8,16{model}]",
    )
    expect(
        text.replace("{}", "."),
        "x f32[8{data},16] | %0 f32[8{data},16] | %1 f32[8,16] | %2 f32[8,16{model}]",
    )


def test_a_value_that_one_axis_would_split_twice_is_split_once() -> None:
    expect(
        """
        arg x  f32[8,4]
        arg w  f32[4,16]
        hint x  [data, .]  a.py:1
        hint w  [., data]  a.py:2
        %0 = dot_general x w  f32[8,16]  b k, k n -> b n  add(k)
        """,
        # w is the larger one: it is cheaper to reshard x.
        "x f32[8{data},4] | w f32[4,16{data}] | %0 f32[8,16{data}]",
    )


def test_the_lower_priority_number_goes_first() -> None:
    text = """
        arg x  f32[8,8]
        arg y  f32[8,8]
        hint x  [data, ?]  a.py:1  priority={}
        hint y  [?, data]  a.py:2  priority={}
        %0 = tanh x  f32[8,8]  i j -> i j
        %1 = tanh y  f32[8,8]  i j -> i j
        %2 = add %0 %1  f32[8,8]  i j, i j -> i j
    """
    first = "x f32[8{data},8] | y f32[8,8{data}] | %0 f32[8{data},8] | %1 f32[8{data},8]"
    second = "x f32[8{data},8] | y f32[8,8{data}] | %0 f32[8,8{data}] | %1 f32[8,8{data}]"
    expect(text.format(0, 1), first + " | %2 f32[8{data},8]")
    expect(text.format(1, 0), second + " | %2 f32[8,8{data}]")
    expect(text.format(7, 3), second + " | %2 f32[8,8{data}]")


def test_a_later_hint_keeps_its_dims_and_axes() -> None:
    expect(
        """
        arg x  f32[8,8]
        hint x  [data, ?]  a.py:1
        hint %0  [?, data]  a.py:2  priority=1
        %0 = tanh x  f32[8,8]  i j -> i j
        %1 = tanh %0  f32[8,8]  i j -> i j
        """,
        "x f32[8{data},8] | %0 f32[8,8{data}] | %1 f32[8,8{data}]",
    )


def test_elementwise_operations_go_before_products() -> None:
    expect(
        """
        arg x  f32[8,8]
        arg w  f32[8,8]
        arg y  f32[8,8]
        hint x  [data, .]  a.py:1
        hint y  [?, data]  a.py:2
        %0 = dot_general x w  f32[8,8]  b k, k n -> b n  add(k)
        %1 = add %0 y  f32[8,8]  i j, i j -> i j
        """,
        "x f32[8{data},8] | w f32[8,8{data}] | y f32[8,8{data}] | %0 f32[8,8{data}] |"
        " %1 f32[8,8{data}]",
    )


def test_whole_factors_do_not_pass_and_halos_do() -> None:
    expect(
        """
        arg x  f32[8,8]
        hint x  [data, model]  a.py:1
        %0 = window x  f32[8,8]  i j -> i j  whole(i) halo(j:2)
        """,
        "x f32[8{data},8{model}] | %0 f32[8,8{model}]",
    )


def test_split_dims_take_the_major_factor_first() -> None:
    text = """
        arg x  f32[8,4]
        arg y  f32[32]
        hint x  {}  a.py:1
        hint y  {}  a.py:2
        %0 = reshape x  f32[32]  h d -> (h d)  {{h=8 d=4}}
        %1 = reshape y  f32[8,4]  (h d) -> h d  {{h=8 d=4}}
    """
    expect(
        text.format("[data, model]", "[data]"),  # h is not completely split: d can not follow
        "x f32[8{data},4{model}] | y f32[32{data}] | %0 f32[32{data}] | %1 f32[8{data},4]",
    )
    expect(
        text.format("[data+model, ?]", "[data+model]"),
        "x f32[8{data,model},4] | y f32[32{data,model}] | %0 f32[32{data,model}] |"
        " %1 f32[8{data,model},4]",
    )
    mesh = Mesh.parse("data=8,model=4")
    expect(
        text.format("[data, model]", "[data+model]"),
        "x f32[8{data},4{model}] | y f32[32{data,model}] | %0 f32[32{data,model}] |"
        " %1 f32[8{data},4{model}]",
        mesh,
    )
    # An axis that only part of the major factor can take is stuck.
    expect(
        """
        arg y  f32[32]
        hint y  [data]  a.py:1
        %0 = reshape y  f32[2,16]  (h d) -> h d  {h=2 d=16}
        """,
        "y f32[32{data}] | %0 f32[2,16]",
    )


def test_factors_of_a_dim_take_axes_in_mesh_order_only() -> None:
    # The merged dim would be split by model first, then by data: no Sharding says that.
    expect(
        """
        arg x  f32[2,16]
        hint x  [model, data]  a.py:1
        %0 = reshape x  f32[32]  h d -> (h d)  {h=2 d=16}
        """,
        "x f32[2{model},16{data}] | %0 f32[32{model}]",
    )


def test_an_axis_that_fits_no_factor_of_a_dim_is_not_lost() -> None:
    # y gets data=4, of which h=2 can take only half; then model asks for h.
    expect(
        """
        arg x  f32[32]
        arg y  f32[32]
        arg z  f32[2,16]
        hint x  [data]  a.py:1
        hint z  [model, ?]  a.py:2  priority=1
        %0 = add x y  f32[32]  i, i -> i
        %1 = reshape y  f32[2,16]  (h d) -> h d  {h=2 d=16}
        %2 = add %1 z  f32[2,16]  i j, i j -> i j
        """,
        "x f32[32{data}] | y f32[32{data}] | z f32[2{model},16] | %0 f32[32{data}] |"
        " %1 f32[2{model},16] | %2 f32[2{model},16]",
    )


def test_a_value_in_two_places_of_one_operation_takes_an_axis_once() -> None:
    expect(
        """
        arg x  f32[8,8]
        hint %0  [data, ?]  a.py:1
        %0 = symmetric x x  f32[8,8]  i j, j i -> i j
        """,
        "x f32[8{data},8] | %0 f32[8{data},8]",
    )


def test_a_value_takes_the_axes_it_has_room_for() -> None:
    expect(
        """
        arg c  f32[8,8]
        arg x  f32[8,8]
        arg y  f32[8,8]
        hint c  [., .]  a.py:1
        hint x  [data+model, .]  a.py:2
        hint y  [., model]  a.py:3
        %0 = transpose y  f32[8,8]  i j -> j i
        %1 = transpose %0  f32[8,8]  i j -> j i
        %2 = select_n c x %1  f32[8,8]  i j, i j, i j -> i j
        """,
        "c f32[8,8] | x f32[8{data,model},8] | y f32[8,8{model}] | %0 f32[8{model},8{data}] |"
        " %1 f32[8{data},8{model}] | %2 f32[8{data,model},8]",
    )


def test_a_rule_that_is_too_long_for_a_value_splits_nothing_unevenly() -> None:
    graph = parse_graph(
        "graph f\n arg x  f32[8]\n hint x  [data]  a.py:1\n %0 = cut x  f32[6]  i -> i  halo(i:2)"
    )
    assert str(propagate(graph, MESH)).split() == ["x", "f32[8{data}]", "%0", "f32[6]"]


def test_what_does_not_divide_is_not_split() -> None:
    expect(
        """
        arg x  f32[12,4]
        hint x  [data, .]  a.py:1
        %0 = reshape x  f32[2,6,4]  (h d) j -> h d j  {h=2 d=6}
        %1 = tanh x  f32[12,4]  i j -> i j
        """,
        "x f32[12{data},4] | %0 f32[2,6,4] | %1 f32[12{data},4]",
    )


LOOP = """
        arg w  f32[3,16,16]
        arg x  f32[8,16]
        tie %0 %3
        {}
        %0 = loop_enter x  f32[8,16]  i j -> i j
        scan x3 {{
          %1 = scan_slice w  f32[16,16]  l j k -> j k  whole(l)
          %2 = dot_general %0 %1  f32[8,16]  b k, k n -> b n  add(k)  a.py:9
          %3 = loop_next %2  f32[8,16]  i j -> i j
          %4 = scan_stack %2  f32[3,8,16]  i j -> l i j  whole(l)
        }}
"""


def test_through_loops_and_ties() -> None:
    expect(
        LOOP.format("hint x  [data, ?]  a.py:1"),
        "w f32[3,16,16] | x f32[8{data},16] | %0 f32[8{data},16] | %1 f32[16,16] |"
        " %2 f32[8{data},16] | %3 f32[8{data},16] | %4 f32[3,8{data},16]",
    )
    expect(
        LOOP.format("hint w  [., ?, model]  a.py:1"),
        "w f32[3,16,16{model}] | x f32[8,16{model}] | %0 f32[8,16{model}] | %1 f32[16,16{model}] |"
        " %2 f32[8,16{model}] | %3 f32[8,16{model}] | %4 f32[3,8,16{model}]",
    )


def test_no_hints_split_nothing() -> None:
    graph = parse_graph("graph f\n arg x  f32[8]\n %0 = neg x  f32[8]  i -> i")
    assert set(str(propagate(graph, MESH)).split()) == {"x", "%0", "f32[8]"}
    assert propagate(graph, MESH).why(1, "data") == ()
    assert propagate(graph, MESH).explain(1, "data") == ""


def test_given_hints_take_the_place_of_the_graphs() -> None:
    graph = parse_graph("graph f\n arg x  f32[8]\n hint x  [data]  a.py:1")
    assert propagate(graph, MESH).shardings[0].axes == (0, -1)
    assert propagate(graph, MESH, ()).shardings[0].axes == (-1, -1)
    other = Hint(0, (("model",),), "b.py:2")
    assert propagate(graph, MESH, [other]).shardings[0].axes == (-1, 0)


# Mistakes of the user.


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("[modle, ?]", "no axis 'modle' in the mesh data=4 model=2; did you mean 'model'"),
        ("[zz, ?]", r"a\.py:7: \[zz, \?\] on x, f32\[8,6\]: there is no axis 'zz' in the mesh"),
        ("[data, data]", "axis 'data' is given twice"),
        ("[data+data, ?]", "axis 'data' is given twice"),
        ("[data]", r"\[data\] has 1 entries for the 2 dims of x, f32\[8,6\]"),
        ("[?, data]", "dim 1 of x, .* has length 6, which data=4 does not divide"),
        ("[?, data+model]", "length 6, which data=4 x model=2 does not divide; use a mesh"),
    ],
)
def test_hints_that_can_not_be_followed(spec: str, said: str) -> None:
    graph = parse_graph(f"graph f\n arg x  f32[8,6]\n hint x  {spec}  a.py:7")
    with pytest.raises(HintError, match=said):
        propagate(graph, MESH)


def test_an_intermediate_value_is_named_by_its_operation() -> None:
    graph = parse_graph(
        "graph f\n arg x  f32[6]\n hint %0  [data]  a.py:7\n %0 = neg x  f32[6]  i -> i  a.py:3"
    )
    with pytest.raises(HintError, match=r"dim 0 of the result of neg \(a.py:3\), f32\[6\]"):
        propagate(graph, MESH)


CONFLICTS = """
        arg x  f32[8,8]
        hint x  {}  a.py:1  {}
        hint x  {}  b.py:2  {}
"""


@pytest.mark.parametrize(
    ("one", "two"),
    [("[data, ?]", "[model, ?]"), ("[data, ?]", "[., ?]"), ("[data, ?]", "[?, data]"),
     ("[data, ?]", "[data+model, ?]")],
)  # fmt: skip
def test_two_hints_that_contradict_each_other(one: str, two: str) -> None:
    graph = parse_graph("graph f\n" + CONFLICTS.format(one, "", two, ""))
    with pytest.raises(HintConflict) as error:
        propagate(graph, MESH)
    text = str(error.value)
    assert f"x, f32[8,8]: a.py:1 wants {one}, b.py:2 wants {two}" in text
    assert "mark one as soft" in text


def test_hints_on_tied_values_must_agree() -> None:
    two = "hint %0  [data, ?]  a.py:1\n hint %3  [model, ?]  b.py:2"
    with pytest.raises(HintConflict, match=r"a\.py:1 wants .* b\.py:2 wants"):
        shardings(LOOP.format(two))


@pytest.mark.parametrize(
    ("one", "a", "two", "b", "wanted"),
    [
        ("[data, ?]", "soft", "[model, ?]", "", "x f32[8{model},8]"),
        ("[data, ?]", "", "[model, ?]", "soft", "x f32[8{data},8]"),
        ("[data, ?]", "soft", "[model, ?]", "soft", "x f32[8{data},8]"),
        ("[data, ?]", "priority=1 soft", "[model, ?]", "soft", "x f32[8{model},8]"),
        ("[data, ?]", "soft", "[?, data]", "", "x f32[8,8{data}]"),
        ("[data, ?]", "", "[?, data]", "soft", "x f32[8{data},8]"),
        ("[data, ?]", "", "[?, model]", "", "x f32[8{data},8{model}]"),
        ("[data, .]", "", "[data, ?]", "", "x f32[8{data},8]"),
        ("[model+data, ?]", "", "[data+model, .]", "", "x f32[8{data,model},8]"),
    ],
)
def test_hints_on_one_value_are_merged(one: str, a: str, two: str, b: str, wanted: str) -> None:
    expect(CONFLICTS.format(one, a, two, b), wanted)


def test_anchors_say_which_dims_a_search_must_keep() -> None:
    graph = parse_graph("graph f\n" + CONFLICTS.format("[data, ?]", "", "[?, .]", "soft"))
    anchor = anchors(graph, MESH, graph.hints)[0]
    assert anchor.dims == ((0,), ())
    assert anchor.hard == (True, False)
    assert anchors(graph, MESH, [Hint(0, (None, None), "a.py:1")]) == {}


# Why.


def test_the_chain_leads_back_to_the_hint() -> None:
    graph = parse_graph("graph f\n" + LOOP.format("hint w  [., ?, model]  a.py:1"))
    result = propagate(graph, MESH)
    x = graph.inputs[1]
    names = [graph.ops[s.op].name for s in result.why(x, "model") if s.op is not None]
    assert names == ["loop_enter", "loop_next", "dot_general", "scan_slice"]
    assert result.explain(x, "model").splitlines() == [
        "x, f32[8,16]: model splits dim 1",
        "  from the result of loop_enter, f32[8,16], through loop_enter",
        "  as the result of loop_next, f32[8,16], which it is tied to",
        "  from the result of dot_general (a.py:9), f32[8,16], through loop_next",
        "  from the result of scan_slice, f32[16,16], through dot_general (a.py:9)",
        "  from w, f32[3,16,16], through scan_slice",
        "  w, f32[3,16,16]: model splits dim 2, hinted by a.py:1 as [., ?, model]",
    ]
    assert result.why(x, 1) == result.why(x, "model")
    assert result.why(x, "data") == ()


# Any graph.

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
@settings(deadline=None, max_examples=300, derandomize=True)
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
@settings(deadline=None, max_examples=150, derandomize=True)
def test_nothing_is_left_to_move_at_the_end(case: tuple[Graph, Mesh]) -> None:
    graph, mesh = case
    result = propagate(graph, mesh)
    run = _Run(graph, mesh, result.group)
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
@settings(deadline=None, max_examples=100, derandomize=True)
def test_the_order_of_hints_does_not_matter(case: tuple[Graph, Mesh], random: object) -> None:
    graph, mesh = case
    hints = list(graph.hints)
    random.shuffle(hints)  # type: ignore[attr-defined]
    assert propagate(graph, mesh, hints).shardings == propagate(graph, mesh).shardings


@given(hinted())
@settings(deadline=None, max_examples=100, derandomize=True)
def test_hinting_the_result_gives_the_result(case: tuple[Graph, Mesh]) -> None:
    graph, mesh = case
    first = propagate(graph, mesh)
    hints = [
        Hint(v.id, first.shardings[v.id].spec(len(v.shape), mesh), "again") for v in graph.values
    ]
    assert propagate(graph, mesh, hints).shardings == first.shardings


def chain_of(count: int) -> Graph:
    """So many layers of product, elementwise and reduction operations, a tenth of them hinted."""
    lines = ["graph f", " arg x0  f32[8,16]"]
    last = "x0"
    for n in range(count // 3):
        lines += [
            f" arg w{n}  f32[16,16]",
            f" %{3 * n} = dot_general {last} w{n}  f32[8,16]  b k, k n -> b n  add(k)",
            f" %{3 * n + 1} = tanh %{3 * n}  f32[8,16]  i j -> i j",
            f" %{3 * n + 2} = reduce_sum %{3 * n + 1}  f32[8]  i j -> i  add(j)",
        ]
        if n % 4 == 0:
            lines.append(f" hint w{n}  [?, model]  a.py:{n}")
        last = f"%{3 * n + 1}"
    lines.append(f" hint {last}  [data, ?]  a.py:1")
    return parse_graph("\n".join(lines))


def test_six_thousand_operations_take_well_under_a_second() -> None:
    graph = chain_of(6000)
    started = time.process_time()
    result = propagate(graph, MESH)
    seconds = time.process_time() - started
    assert result.shardings[graph.inputs[0]].axes[0] == 0  # data came all the way up
    assert seconds < 1.0
