"""Rules from signatures alone: what they print, what they cost, and reshapes of any shape."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import passes.rules  # noqa: F401
from passes.ir.graph import LINKS, Signature, Type
from passes.ir.rule import Rule
from passes.rules.factors import Factors, letter
from passes.rules.registry import hand_rule, registered, rule, whole_rule

BITS = {"float32": 32, "int32": 32, "bool": 1, "bfloat16": 16, "key<fry>": 64, "float8_e4m3fn": 8}


def types(text: str) -> tuple[Type, ...]:
    """`4x6 int32:8 -` as types; `-` is a scalar, float32 where no dtype is given."""
    out = []
    for word in text.split():
        dtype, _, shape = word.rpartition(":")
        dims = () if shape == "-" else tuple(map(int, shape.split("x")))
        out.append(Type(dims, dtype or "float32", BITS[dtype or "float32"]))
    return tuple(out)


def the_rule(name: str, operands: str, results: str, **params: Any) -> Rule:
    found = hand_rule(Signature(name, types(operands), types(results), params))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "operands", "results", "params", "notation"),
    [
        ("add", "4x6 4x6", "4x6", {}, "i j, i j -> i j"),
        ("mul", "4x6 4x1", "4x6", {}, "i j, i . -> i j"),
        ("mul", "- 4x6", "4x6", {}, "[], i j -> i j"),
        ("select_n", "bool:- 4x6 4x6", "4x6", {}, "[], i j, i j -> i j"),
        ("optimization_barrier", "4x6 8", "4x6 8", {}, "i j, k -> i j, k"),
        ("optimization_barrier", "4x6 4x6", "4x6 4x6", {}, "i j, i j -> i j, i j"),
        ("dot_general", "2x4x6 2x6x8", "2x4x8",
         {"dimension_numbers": (((2,), (1,)), ((0,), (0,)))}, "b i k, b k j -> b i j"),
        ("reduce_sum", "4x6x8", "6", {"axes": (0, 2)}, "i j k -> j"),
        ("argmax", "4x6", "int32:4", {"axes": (1,)}, "i j -> i"),
        ("broadcast_in_dim", "4x1", "4x6", {"broadcast_dimensions": (0, 1)}, "i . -> i j"),
        ("transpose", "4x6", "6x4", {"permutation": (1, 0)}, "i j -> j i"),
        ("squeeze", "1x4x1x6", "4x6", {"dimensions": (0, 2)}, ". i . j -> i j"),
        ("reshape", "4x6", "24", {}, "i j -> (i j)"),
        ("reshape", "24", "4x6", {}, "(i j) -> i j"),
        ("reshape", "4x6", "4x6", {"dimensions": (1, 0)}, "(l n) (i j) -> (i k) (m n)"),
        ("iota", "", "4x6", {}, "-> i j"),
        ("pad", "4x6 -", "4x8", {"padding_config": ((0, 0, 0), (1, 1, 0))}, "i j, [] -> i k"),
        ("random_bits", "key<fry>:3", "3x4x6", {}, "i -> i j k"),
        ("scan_slice", "5x4x6", "4x6", {}, "l j k -> j k"),
        ("scan_stack", "4x6", "5x4x6", {}, "j k -> l j k"),
        ("branch_join", "4x6 4x6 4x6", "4x6", {}, "i j, i j, i j -> i j"),
        ("loop_next", "4x1", "4x1", {}, "i . -> i ."),
    ],
)  # fmt: skip
def test_notation(
    name: str, operands: str, results: str, params: dict[str, Any], notation: str
) -> None:
    assert the_rule(name, operands, results, **params).notation() == notation


@pytest.mark.parametrize(
    ("name", "operands", "results", "linear"),
    [
        ("add", "4 4", "4", ((0, 1),)),
        ("mul", "4 4", "4", ((0,), (1,))),
        ("div", "4 4", "4", ((0,),)),
        ("div", "int32:4 int32:4", "int32:4", ()),
        ("exp", "4", "4", ()),
        ("select_n", "bool:4 4 4", "4", ((1, 2),)),
        ("convert_element_type", "4", "bfloat16:4", ((0,),)),
        ("convert_element_type", "4", "float8_e4m3fn:4", ()),
        ("convert_element_type", "4", "int32:4", ()),
        ("convert_element_type", "int32:4", "4", ()),
        ("tie", "4 4", "4", ((1,),)),
    ],
)
def test_what_lets_partial_sums_pass(
    name: str, operands: str, results: str, linear: tuple[tuple[int, ...], ...]
) -> None:
    assert the_rule(name, operands, results).linear == linear


def test_costs() -> None:
    numbers = (((1,), (0,)), ((), ()))
    product = the_rule("dot_general", "4x6 6x8", "4x8", dimension_numbers=numbers)
    assert product.flops == 2 * 4 * 6 * 8
    assert not product.fuses
    assert the_rule("add", "4x6 4x6", "4x6").flops == 24
    assert the_rule("exp", "4x6", "4x6").flops == 240
    assert the_rule("copy", "4x6", "4x6").flops == 0
    cut = the_rule("slice", "4x6", "4x2")
    assert cut.moved == 2 * 4 * 2 * 4
    assert cut.fuses
    assert not the_rule("reduce_sum", "4x6", "4", axes=(1,)).fuses


def test_every_link_has_a_rule_that_costs_nothing() -> None:
    assert set(registered()) >= LINKS
    for name in ("loop_enter", "loop_next", "region_enter", "region_exit", "branch_join"):
        link = the_rule(name, "4x6", "4x6")
        assert (link.flops, link.fuses) == (0, True)


def test_many_factors_have_different_names() -> None:
    names = [letter(n) for n in range(100)]
    assert len(set(names)) == 100
    assert names[:3] == ["i", "j", "k"]
    shapes = " ".join(map(str, range(2, 62)))
    barrier = the_rule("optimization_barrier", shapes, shapes)
    assert len({f.name for f in barrier.factors}) == 60


def test_two_rules_for_one_primitive_are_refused() -> None:
    with pytest.raises(KeyError, match="'add' has two rules"):
        rule("add")(whole_rule)


def test_an_unknown_primitive_has_no_rule_and_stays_whole() -> None:
    unknown = Signature("frobnicate", types("4x6"), types("4"))
    assert hand_rule(unknown) is None
    assert not any(whole_rule(unknown).splittable(f) for f in range(3))


def test_a_dim_of_length_one_gets_no_factor() -> None:
    f = Factors()
    assert f.parallel(1) == f.whole(1) == f.reduction(1, "add") == ()
    assert f.parallel(0) == (0,)


# Reshapes of any shape, against numpy.


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes with equally many elements: prime factors dealt out to dims, in two ways."""
    primes = draw(st.lists(st.sampled_from([2, 2, 3, 5]), max_size=6))

    def shape() -> tuple[int, ...]:
        rank = draw(st.integers(1, 4))
        dims = [1] * rank
        for p in draw(st.permutations(primes)):
            dims[draw(st.integers(0, rank - 1))] *= p
        return tuple(dims)

    return shape(), shape()


def shares(x: np.ndarray, dims: Any, found: Rule, factor: int) -> np.ndarray:
    """For each element of x its place along a factor, -1 where x has not got it."""
    for d, names in enumerate(dims):
        if factor in names:
            sizes = [found.factors[f].size for f in names]
            place = np.unravel_index(np.arange(x.shape[d]), sizes)[names.index(factor)]
            shape = [-1 if k == d else 1 for k in range(x.ndim)]
            return np.broadcast_to(place.reshape(shape), x.shape)
    return np.full(x.shape, -1)


@given(reshapes())
@settings(deadline=None, max_examples=200)
def test_reshape_keeps_each_factor_in_place(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    before, after = shapes
    found = hand_rule(Signature("reshape", (Type(before, "f", 32),), (Type(after, "f", 32),)))
    assert found is not None
    for shape, dims in ((before, found.operands[0]), (after, found.results[0])):
        assert shape == tuple(math.prod(found.factors[f].size for f in names) for names in dims)
    x = np.zeros(before)
    for n, f in enumerate(found.factors):
        if f.kind == "parallel":
            read = shares(x, found.operands[0], found, n)
            made = shares(x.reshape(after), found.results[0], found, n)
            np.testing.assert_array_equal(read.reshape(after), made)


@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), st.data())
@settings(deadline=None, max_examples=50)
def test_merging_neighbours_and_splitting_them_keeps_all_factors(
    shape: list[int], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(shape)))
    merged = (math.prod(shape[:cut]), *shape[cut:])
    one, other = (Type(tuple(s), "f", 32) for s in (shape, merged))
    for a, b in ((one, other), (other, one)):
        found = hand_rule(Signature("reshape", (a,), (b,)))
        assert found is not None
        assert [f.size for f in found.factors] == shape
        assert all(f.kind == "parallel" for f in found.factors)
