"""Hints that fit no value or contradict each other are refused; others on one value are merged."""

from __future__ import annotations

import pytest

from passes.anchors import HintConflict, anchors
from passes.hints import HintError
from passes.ir.graph import Hint
from passes.ir.mesh import Mesh
from passes.ir.parse import parse_graph
from passes.propagate import propagate

MESH = Mesh.parse("data=4,model=2")


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
    graph = parse_graph(
        """
        graph f
        arg x  f32[8,16]
        tie %0 %1
        hint %0  [data, ?]  a.py:1
        hint %1  [model, ?]  b.py:2
        %0 = loop_enter x  f32[8,16]  i j -> i j
        scan x3 {
          %1 = loop_next %0  f32[8,16]  i j -> i j
        }
        """
    )
    with pytest.raises(HintConflict, match=r"a\.py:1 wants .* b\.py:2 wants"):
        propagate(graph, MESH)


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
    graph = parse_graph("graph f\n" + CONFLICTS.format(one, a, two, b))
    assert " ".join(str(propagate(graph, MESH)).split()) == wanted


def test_anchors_say_which_dims_a_search_must_keep() -> None:
    graph = parse_graph("graph f\n" + CONFLICTS.format("[data, ?]", "", "[?, .]", "soft"))
    anchor = anchors(graph, MESH, graph.hints)[0]
    assert anchor.dims == ((0,), ())
    assert anchor.hard == (True, False)
    assert anchors(graph, MESH, [Hint(0, (None, None), "a.py:1")]) == {}
