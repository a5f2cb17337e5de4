"""Every check lets a right graph pass and catches the mistake it is there for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from passes.ir.graph import Graph, Hint
from passes.ir.parse import parse_graph
from passes.ir.verify import CHECKS, InvalidGraph, verify

GOOD = """
graph train
  arg    w   f32[12,16,16]  donated
  arg    x   f32[8,16]
  const  %0  f32[16]
  hint   x   [data, ?]  train.py:3
  tie    %1 %9
  %1 = loop_enter x  f32[8,16]  i j -> i j
  scan x12 {
    %2 = scan_slice w  f32[16,16]  l j k -> j k  whole(l)
    %3 = dot_general %1 %2  f32[8,16]  b k, k n -> b n  add(k)
    remat x1 {
      %5 = exp %3  f32[8,16]  i j -> i j
    }
    %7 = add %5 2.0:f32[]  f32[8,16]  i j, [] -> i j
    %8 = scan_stack %7  f32[12,8,16]  i j -> l i j  whole(l)
    %9 = loop_next %7  f32[8,16]  i j -> i j
  }
  branch x0.5 {
    %11 = neg %9  f32[8,16]  i j -> i j
  }
  branch x0.5 {
    %13 = exp %9  f32[8,16]  i j -> i j
  }
  %14 = branch_join %11 %13  f32[8,16]  i j, i j -> i j
  %15 = mul %14 %0  f32[8,16]  i j, j -> i j
  out    %15
  out    %8
"""

Change = Callable[[Graph], Graph]


def op(n: int, **changes: object) -> Change:
    def change(g: Graph) -> Graph:
        ops = list(g.ops)
        ops[n] = replace(ops[n], **changes)
        return replace(g, ops=tuple(ops))

    return change


def rule(n: int, **changes: object) -> Change:
    return lambda g: op(n, rule=replace(g.ops[n].rule, **changes))(g)


def factor(n: int, k: int, **changes: object) -> Change:
    def change(g: Graph) -> Graph:
        factors = list(g.ops[n].rule.factors)
        factors[k] = replace(factors[k], **changes)
        return rule(n, factors=tuple(factors))(g)

    return change


def region(n: int, **changes: object) -> Change:
    def change(g: Graph) -> Graph:
        regions = list(g.regions)
        regions[n] = replace(regions[n], **changes)
        return replace(g, regions=tuple(regions))

    return change


BAD: list[tuple[str, Change]] = [
    ("ids_are_dense", lambda g: replace(g, values=g.values[1:])),
    ("ids_are_dense", op(3, id=7)),
    ("ids_are_dense", op(3, inputs=(99,))),
    ("ids_are_dense", op(3, region=9)),
    ("ids_are_dense", region(1, id=2)),
    ("inputs_and_outputs_exist", lambda g: replace(g, inputs=(0,))),
    ("inputs_and_outputs_exist", lambda g: replace(g, outputs=(99,))),
    ("inputs_and_outputs_exist", lambda g: replace(g, output_names=("one",))),
    ("inputs_and_outputs_exist", lambda g: replace(g, donated=frozenset({5}))),
    ("values_are_defined_before_use", lambda g: op(2, inputs=(g.ops[4].outputs[0], 0))(g)),
    ("values_are_defined_before_use", lambda g: op(2, outputs=g.ops[1].outputs)(g)),
    ("values_are_defined_before_use", op(2, outputs=())),
    ("regions_are_nested", region(0, end=3)),
    ("regions_are_nested", region(1, parent=1)),
    ("regions_are_nested", region(2, end=20)),
    ("regions_are_nested", region(3, begin=3)),
    ("regions_are_nested", region(1, trips=float("nan"))),
    ("ops_know_their_region", op(3, region=1)),
    ("ops_know_their_region", op(1, region=0)),
    ("rule_fits_types", op(2, inputs=(1,))),
    ("rule_fits_types", rule(0, operands=(((0,),),))),
    ("rule_fits_types", factor(0, 0, size=4)),
    ("rule_fits_types", rule(0, operands=(((0,), (7,)),))),
    ("factors_make_sense", rule(2, linear=((2,),))),
    ("factors_make_sense", factor(2, 1, op="")),
    ("factors_make_sense", factor(0, 0, kind="reduction", op="add")),
    ("links_cross_borders", op(0, name="exp")),
    ("links_cross_borders", op(1, name="exp")),
    ("links_cross_borders", op(5, name="exp")),
    ("links_cross_borders", op(7, name="scan_slice")),
    ("links_cross_borders", lambda g: op(7, inputs=g.ops[4].outputs)(g)),
    ("links_cross_borders", lambda g: replace(g, outputs=g.ops[2].outputs)),
    ("ties_are_alike", lambda g: replace(g, ties=((0, 1),))),
    ("hints_fit", lambda g: replace(g, hints=(Hint(1, ((),), "a.py:1"),))),
    ("hints_fit", lambda g: replace(g, hints=(Hint(99, (), "a.py:1"),))),
]


def test_a_right_graph_passes() -> None:
    verify(parse_graph(GOOD))


def test_every_check_is_tested() -> None:
    assert {name for name, _ in BAD} == {check.__name__ for check in CHECKS}


@pytest.mark.parametrize(("name", "change"), BAD)
def test_a_wrong_graph_is_caught_by_the_check_that_is_for_it(name: str, change: Change) -> None:
    with pytest.raises(InvalidGraph, match=f"^{name}: "):
        verify(change(parse_graph(GOOD)))


def test_a_factor_twice_on_one_tensor_is_refused() -> None:
    square = parse_graph("graph f\n  arg x  f32[4,4]\n  %0 = op x  f32[4]  i j -> i\n  out %0")
    with pytest.raises(InvalidGraph, match=r"factors_make_sense: op 0 \(op\): a factor is twice"):
        verify(rule(0, operands=(((0,), (0,)),))(square))


def test_the_message_names_the_op_and_its_source() -> None:
    text = "graph f\n  arg x  f32[8]\n  %0 = neg x  f32[9]  i -> i  train.py:7\n  out %0"
    with pytest.raises(InvalidGraph, match=r"op 0 \(neg\) at train.py:7: dim 0 of %0 has length 9"):
        verify(parse_graph(text))
