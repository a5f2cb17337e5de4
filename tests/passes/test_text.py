"""A graph's print-out is readable, and reads back as the same graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.ir.graph import Graph, Hint, Op, Region, Type, Value
from passes.ir.parse import TextError, parse_graph, parse_type
from passes.ir.rule import Factor, Rule
from passes.ir.text import print_graph, type_text, value_names

LOOP = """
graph train
  arg    params['w']              f32[12,16,16]                      donated
  arg    x                        f32[8,16]
  const  %0                       i32[4]
  lit    %10                      f32[2]                             [1., 2.]
  hint   params['w']              [., ., model]                      hints['params/*']  priority=1
  hint   x                        [data+model, ?]                    train.py:3         soft
  tie    %1 %4
  scan x12 {
    %1 = loop_enter x             f32[8,16]      i j -> i j
    %2 = scan_slice params['w']   f32[16,16]     l j k -> j k        whole(l)
    %3 = dot_general %1 %2        f32[8,16]      b k, k n -> b n     add(k) linear(0, 1)  train.py:9
    remat x1 {
      %4 = add %3 1.0:f32[]       f32[8,16]      i j, [] -> i j      linear(0 1)
    }
    %5 = loop_next %4             f32[8,16]      i j -> i j
  }
  _ = debug_callback %5 %10          -              i j, . ->              effects
  %6 %7 = split %5                f32[4,16] i32[4,16]  whole
  %8 = reshape %5                 f32[8,4,4]     b (h d) -> b h d    {h=4 d=4}
  %9 = random_bits                key<fry>/64[]  -> []               from(shardy)
  out    %8                       result
  out    %5                       result['loss']
  out    1.0:f32[]                one
  note   one sentence, with = in it
"""


def test_all_that_is_printed_reads_back() -> None:
    graph = parse_graph(LOOP)
    text = str(graph)
    assert parse_graph(text) == graph
    assert str(parse_graph(text)) == text
    assert [r.kind for r in graph.regions] == ["top", "scan", "remat"]
    assert graph.regions[1] == Region(1, 0, "scan", 12.0, 0, 5)
    assert graph.ops[3].region == 2
    assert graph.trips(2) == 12
    assert graph.hints[0] == Hint(0, ((), (), ("model",)), "hints['params/*']", 1, True)
    assert graph.hints[1].dims == (("data", "model"), None)
    assert graph.donated == {0}
    assert graph.ops[5].effects


def test_columns_line_up() -> None:
    lines = str(parse_graph(LOOP)).splitlines()
    rules = [line.index(" -> ") for line in lines if " = " in line and "f32[8,16]" in line]
    types = {line.index("f32[8,16]") for line in lines if "= " in line and "f32[8,16]" in line}
    assert len(types) == 1
    assert rules


@pytest.mark.parametrize(
    "name",
    ["params['a b']", "x y", "a,b", "a`b", "_", "%3", "", "a  b", "s[<flat index 0>]", "a:b"],
)
def test_any_argument_name_survives(name: str) -> None:
    t = Type((2,), "float32", 32)
    rule = Rule.parse("i -> i", {"i": 2})
    graph = Graph(
        "f",
        (Value(0, t, "argument", name), Value(1, t)),
        (Op(0, "neg", (0,), (1,), rule, {}),),
        (Region(0, 0, "top", 1.0, 0, 1),),
        (0,),
        (1,),
    )
    back = parse_graph(str(graph))
    assert back.values == graph.values
    assert str(back) == str(graph)


def test_two_arguments_of_one_name_get_made_names() -> None:
    t = Type((2,), "float32", 32)
    graph = Graph(
        "f",
        (Value(0, t, "argument", "x"), Value(1, t, "argument", "x")),
        (), (Region(0, 0, "top", 1.0, 0, 0),), (0, 1), (1, 0),
    )  # fmt: skip
    assert value_names(graph) == ("%0", "%1")


def test_factors_with_one_name_are_told_apart() -> None:
    rule = Rule((Factor("l", 2), Factor("l", 3)), (((0,), (1,)),), (((1,), (0,)),))
    t = Type((2, 3), "float32", 32)
    graph = Graph(
        "f",
        (Value(0, t, "argument", "x"), Value(1, Type((3, 2), "float32", 32))),
        (Op(0, "transpose", (0,), (1,), rule, {}),),
        (Region(0, 0, "top", 1.0, 0, 1),),
        (0,), (1,),
    )  # fmt: skip
    assert "l l_1 -> l_1 l" in str(graph)
    assert parse_graph(str(graph)).ops[0].rule.results == rule.results


def test_costs_are_printed_when_asked_for() -> None:
    graph = parse_graph("graph f\n  arg x  f32[8]\n  %0 = neg x  f32[8]  i -> i\n  out %0")
    op = graph.ops[0]
    dear = replace(
        graph, ops=(replace(op, rule=replace(op.rule, flops=8.0, moved=64.0, fuses=True)),)
    )
    assert print_graph(dear) == print_graph(graph)
    assert "flops=8.0 moved=64.0 fuses" in print_graph(dear, costs=True)
    assert parse_graph(print_graph(dear, costs=True)) == dear


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("graph f\n  %0 = neg x  f32[8]  i -> i", "line 2.*x is used before it is defined"),
        ("graph f\n  arg x  f8", "is not a type"),
        ("graph f\n  arg x  key<fry>[]", "how many bits"),
        ("graph f\n  arg x  f32[8]\n  arg x  f32[8]", "line 3.*x is defined twice"),
        ("graph f\n  loop x3 {", "no kind of region"),
        ("graph f\n  scan x3 {", "never closed"),
        ("graph f\n  }", "closes no region"),
        ("graph f\n  tie a b", "no value is named a"),
        ("graph f\n  something else", "cannot begin with 'something'"),
        ("graph f\n  arg x  f32[8]\n  %0 %1 = neg x  f32[8]  i -> i", "2 results but 1 types"),
        ("graph f\n  arg x  f32[8]\n  %0 = neg x  f32[8]", "line 3"),
        ("graph f\n  arg x  f32[8]\n  %0 = neg x  f32[8]  i i", "one '->'"),
    ],
)
def test_text_that_is_no_graph_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(TextError, match=said):
        parse_graph(text)


DTYPES = {"float32": 32, "bfloat16": 16, "int4": 4, "bool": 8, "complex64": 64, "float8_e4m3fn": 8,
          "key<fry>": 64, "AbstractToken": 0, "int32": 32, "float8_e8m0fnu": 8}  # fmt: skip


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 1000), max_size=4))
@settings(deadline=None, max_examples=50)
def test_types_read_back(dtype: str, shape: list[int]) -> None:
    t = Type(tuple(shape), dtype, DTYPES[dtype])
    assert parse_type(type_text(t)) == t


@st.composite
def rules(draw: st.DrawFn, operand: tuple[int, ...]) -> tuple[Rule, tuple[int, ...]]:
    """A rule with one operand of this shape, and its result's shape."""
    kinds = st.sampled_from(["parallel", "reduction", "whole", "halo"])
    factors, dims = [], []
    for n in operand:
        parts = [n] if n % 2 or not n or draw(st.booleans()) else [2, n // 2]
        first = len(factors)
        for part in parts:
            kind = draw(kinds)
            factors.append(
                Factor(f"f{len(factors)}", part, kind, "max" if kind == "reduction" else "",
                       draw(st.integers(1, 4)) if kind == "halo" else 0)
            )  # fmt: skip
        dims.append(tuple(range(first, len(factors))))
    # A rule need not number its factors in the order of its dims.
    order = draw(st.permutations(range(len(factors))))
    factors = [factors[order.index(k)] for k in range(len(factors))]
    dims = [tuple(order[k] for k in dim) for dim in dims]
    kept = [k for k, f in enumerate(factors) if f.kind != "reduction"]
    kept = draw(st.permutations(kept)) if kept else []
    rule = Rule(
        tuple(factors), (tuple(dims),), (tuple((k,) for k in kept),),
        draw(st.sampled_from([(), ((0,),)])), source=draw(st.sampled_from(["hand", "shardy"])),
    )  # fmt: skip
    return rule, tuple(factors[k].size for k in kept)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A chain of operations with random rules, regions and hints; ids in the order of printing."""
    shape = tuple(draw(st.lists(st.integers(0, 12), min_size=0, max_size=3)))
    values = [Value(0, Type(shape, "float32", 32), "argument", "x")]
    ops: list[Op] = []
    for n in range(draw(st.integers(1, 6))):
        rule, shape = draw(rules(shape))
        source = draw(st.sampled_from(["", "a.py:3 (f)"]))
        values.append(Value(n + 1, Type(shape, "float32", 32)))
        ops.append(Op(n, "op", (n,), (n + 1,), rule, {}, source, effects=draw(st.booleans())))
    hints = [
        Hint(v.id, tuple(draw(st.sampled_from([None, (), (f"a{d}",), (f"a{d}", f"b{d}")]))
                         for d in range(len(v.shape))), "a.py:1", draw(st.integers(0, 2)))
        for v in values if draw(st.booleans())
    ]  # fmt: skip
    cuts = sorted(draw(st.lists(st.integers(0, len(ops)), min_size=4, max_size=4)))
    regions = [
        Region(0, 0, "top", 1.0, 0, len(ops)),
        Region(1, 0, "scan", 3.0, cuts[0], cuts[3]),
        Region(2, 1, "branch", 0.5, cuts[1], cuts[2]),
    ]
    ops = [
        replace(op, region=2 if cuts[1] <= n < cuts[2] else int(cuts[0] <= n < cuts[3]))
        for n, op in enumerate(ops)
    ]
    return Graph("f", tuple(values), tuple(ops), tuple(regions), (0,), (len(ops),), ("y",),
                 ((0, 0),), frozenset({0}), tuple(hints), ("a note",))  # fmt: skip


def by_letter(graph: Graph) -> Graph:
    """The graph with each rule's factors in order of first mention, as text keeps them."""
    ops = []
    for op in graph.ops:
        tensors = (*op.rule.operands, *op.rule.results)
        order = list(dict.fromkeys(f for dims in tensors for dim in dims for f in dim))
        place = {f: k for k, f in enumerate(order)}
        sides = [
            tuple(tuple(tuple(place[f] for f in dim) for dim in dims) for dims in side)
            for side in (op.rule.operands, op.rule.results)
        ]
        factors = tuple(op.rule.factors[f] for f in order)
        rule = replace(op.rule, factors=factors, operands=sides[0], results=sides[1])
        ops.append(replace(op, rule=rule))
    return replace(graph, ops=tuple(ops))


@given(graphs())
@settings(deadline=None, max_examples=80)
def test_any_graph_reads_back(graph: Graph) -> None:
    back = parse_graph(str(graph))
    assert str(back) == str(graph)
    assert back == by_letter(graph)
