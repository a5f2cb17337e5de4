"""Globs find the arguments they describe, and specs say per dim what the user wrote."""

from __future__ import annotations

import copy
import fnmatch
import pickle
from collections import namedtuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.hints import OPEN, HintError, hints_for, match, named, parse_spec, path_of, spec_dims
from passes.ir.graph import Graph, Hint
from passes.ir.parse import parse_graph

GRAPH = parse_graph("""
graph step
  arg  params['embed']             f32[128,16]
  arg  params['layers'][0]['wq']   f32[16,16]
  arg  params['layers'][0]['wk']   f32[16,16]
  arg  params['layers'][1]['wq']   f32[16,16]
  arg  params['layers'][1]['b']    f32[16]
  arg  batch                       i32[8,32]
  arg  state.count                 i32[]
""")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("x", "x"),
        ("params['layers'][0]['wq']", "params/layers/0/wq"),
        ("state.params['w']", "state/params/w"),
        ("opt[0].mu['a.b']", "opt/0/mu/a.b"),
        ("""p["it's"]['a"b']""", """p/it's/a"b"""),
        ("p['mlp/~/linear_0']['w']", "p/mlp/~/linear_0/w"),
        ("p['[0]']", "p/[0]"),
        ("m[<flat index 3>]", "m/flat index 3"),
        ("args[0]", "args/0"),
        ("p[(1, 2)]", "p/(1, 2)"),
        ("p.*x", "p.*x"),
    ],
)
def test_paths(name: str, path: str) -> None:
    assert path_of(name) == path


@pytest.mark.parametrize(
    ("glob", "path", "yes"),
    [
        ("x", "x", True),
        ("x", "xy", False),
        ("batch*", "batch", True),
        ("batch*", "batch_2", True),
        ("batch*", "batch/x", False),
        ("params/*", "params/w", True),
        ("params/*", "params/a/w", False),
        ("params/**/wq", "params/wq", True),
        ("params/**/wq", "params/layers/0/wq", True),
        ("params/**/wq", "params/layers/0/wqx", False),
        ("params/**/wq", "params/xwq", False),
        ("params/**", "params", True),
        ("params/**", "params/a/b", True),
        ("params/**", "params2/a", False),
        ("**", "anything/at/all", True),
        ("**/w?", "a/b/wq", True),
        ("**/w?", "a/b/w", False),
        ("params/layers/[0]/wq", "params/layers/0/wq", False),
        ("a.c", "abc", False),
        ("**/0/**/w", "x/0/w", True),
        ("", "x", False),
    ],
)
def test_globs(glob: str, path: str, yes: bool) -> None:
    assert match(glob, path) is yes


PARTS = st.text("ab.", min_size=1, max_size=3)


@given(st.text("ab?*.", min_size=1, max_size=4), PARTS)
@settings(deadline=None, max_examples=200)
def test_inside_one_part_a_glob_is_what_fnmatch_says(glob: str, part: str) -> None:
    if glob != "**":
        assert match(glob, part) == fnmatch.fnmatchcase(part, glob)


@given(st.lists(PARTS, min_size=1, max_size=4), st.lists(PARTS, max_size=3))
@settings(deadline=None, max_examples=100)
def test_two_stars_stand_for_any_number_of_parts(ends: list[str], middle: list[str]) -> None:
    glob = "/".join([*ends, "**", ends[-1]])
    assert match(glob, "/".join([*ends, *middle, ends[-1]]))
    assert not match(glob, "/".join([*ends, *middle, ends[-1] + "c"]))


def hints(spec: object, glob: str = "params/embed", graph: Graph = GRAPH) -> tuple[Hint, ...]:
    return hints_for(graph, {glob: spec})


def test_a_glob_gives_one_hint_for_each_argument_it_matches() -> None:
    found = hints((None, "model"), "params/**/w?")
    assert [h.value for h in found] == [1, 2, 3]
    assert set(found) == {Hint(v, ((), ("model",)), "hints['params/**/w?']") for v in (1, 2, 3)}


def test_an_argument_may_be_given_by_its_own_name() -> None:
    assert [h.value for h in hints(("x", None), "params['layers'][0]['wq']")] == [1]


P = namedtuple("P", "first second")


@pytest.mark.parametrize(
    ("spec", "dims"),
    [
        (("data", None), (("data",), ())),
        (("data",), (("data",), ())),
        ((), ((), ())),
        ((("data", "model"), OPEN), (("data", "model"), None)),
        (("data", ...), (("data",), None)),
        ((...,), (None, None)),
        ((..., "data", None), (("data",), ())),
        (((), ["data"]), ((), ("data",))),
        ("data, ?", (("data",), None)),
        ("P('data', None)", (("data",), ())),
        ("data+model, .", (("data", "model"), ())),
        ("...", (None, None)),
        (P("data", None), (("data",), ())),
    ],
)
def test_specs(spec: object, dims: tuple[object, ...]) -> None:
    assert hints(spec)[0].dims == dims


def test_a_copy_of_open_is_open() -> None:
    assert pickle.loads(pickle.dumps(OPEN)) is OPEN
    assert copy.deepcopy({"x": ("data", OPEN)})["x"][1] is OPEN


def test_specs_as_text() -> None:
    assert parse_spec("None, model+seq, ?, ...") == (None, ("model", "seq"), OPEN, ...)
    assert parse_spec("P()") == ()
    assert parse_spec("") == ()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (("a", None, None), r"on params\['embed'\], f32\[128,16\]: 3 entries for 2 dims"),
        (("a", "a"), "axis 'a' is given twice"),
        ((("a", "a"), None), "axis 'a' is given twice"),
        ((3, None), "3 is no axis"),
        (("", None), "'' is no axis"),
        ((("a", 1), None), "is no axis"),
        ((..., ...), "may stand in one place only"),
        ((..., "a", None, None), "3 entries|4 entries"),
        (7, "7 is no spec"),
        ({"data": 0}, "is no spec"),
        ({"data"}, "is no spec"),
    ],
)
def test_specs_that_can_not_be(spec: object, said: str) -> None:
    with pytest.raises(HintError, match=said) as error:
        hints(spec)
    assert str(error.value).startswith("hints['params/embed']")


def test_without_short_every_dim_needs_an_entry() -> None:
    assert spec_dims(("a",), 2, short=True, where="x") == (("a",), ())
    with pytest.raises(HintError, match=r"x: 1 entry for 2 dims; .* or end with \.\.\."):
        spec_dims(("a",), 2, short=False, where="x")


def test_a_group_means_all_arrays_in_it() -> None:
    found = hints(("x", ...), "params/layers*")
    names = [GRAPH.values[h.value].name for h in found]
    assert names == [v.name for v in GRAPH.values if "layers" in v.name]
    assert {len(h.dims) for h in found} == {1, 2}


def test_a_group_is_meant_only_where_no_argument_is() -> None:
    assert named("a*", ["a", "ab", "a_group['x']"]) == [0, 1]
    assert named("a_group", ["a", "a_group['x']", "a_group['y'][0]"]) == [1, 2]


def test_scalars_of_a_group_are_left_alone_but_not_when_named() -> None:
    graph = parse_graph("graph f\n  arg  s.count  i32[]\n  arg  s.mu  f32[8]\n")
    (found,) = hints_for(graph, {"s": ("x",)})
    assert graph.values[found.value].name == "s.mu"
    with pytest.raises(HintError, match=r"s\.count, i32\[\]: 1 entry for 0 dims"):
        hints_for(graph, {"s/count": ("x",)})


def test_a_spec_too_long_for_one_of_a_group_names_that_one() -> None:
    with pytest.raises(HintError, match=r"params\['layers'\]\[1\]\['b'\], f32\[16\]: 2 entries"):
        hints((None, "x"), "params/layers")


@pytest.mark.parametrize(
    ("glob", "said"),
    [
        ("params/**/wqq", "nearest are params/layers/0/wq, params/layers/1/wq"),
        ("parms/embed", "nearest are params/embed"),
        ("btch*", "nearest are batch"),
    ],
)
def test_a_glob_that_matches_nothing_names_what_is_near(glob: str, said: str) -> None:
    with pytest.raises(HintError, match=said):
        hints(("x",), glob)


def test_a_glob_is_text() -> None:
    with pytest.raises(HintError, match=r"hints\[3\]: 3 is no glob"):
        hints_for(GRAPH, {3: ("x",)})  # type: ignore[dict-item]


def test_no_arguments_at_all() -> None:
    with pytest.raises(HintError, match="the function has no arguments"):
        hints((), "x", parse_graph("graph f"))
