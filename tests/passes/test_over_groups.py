"""What groups do on their parts, put together, is what one does on the whole.

The oracle is numpy: random updates of a few arrays are computed once as they are, and once by each
of several groups on its own parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.ir.rule import Rule
from passes.over_groups import Ends, Parts, Work, parts_of_update

GROUPS = 2
SIZES = {"i": 4, "j": 6, "k": 4}
ADD = Rule.parse("i j, i j -> i j", SIZES)


@dataclass(frozen=True)
class Kind:
    """An operation with its rule, over arrays of so many dims, and how numpy does it."""

    rule: Rule
    run: Callable[..., Any]
    takes: tuple[tuple[int, ...], ...]
    makes: tuple[int, ...]
    puts: Callable[..., Any] | None = None  # summands of groups together


def kind(text: str, run: Callable[..., Any], puts: Any = None, **options: Any) -> Kind:
    rule = Rule.parse(text, SIZES, **options)
    if not rule.results:
        rule = replace(rule, results=((),))  # a scalar
    tensors = [tensor for side in text.split("->") for tensor in side.split(",")]
    shapes = [tuple(SIZES[letter] for letter in tensor.split()) for tensor in tensors]
    return Kind(rule, run, tuple(shapes[:-1]), shapes[-1], puts)


KINDS = (
    kind("i j, i j -> i j", lambda x, y: x + 2 * y),
    kind("i j -> i j", np.tanh),
    kind("i j -> j i", np.transpose),
    kind("j i -> i j", np.transpose),
    kind("i j -> i", lambda x: x.sum(1), np.sum, reduce={"j": "add"}),
    kind("i j -> j", lambda x: x.max(0), np.max, reduce={"i": "max"}),
    kind("i j -> ", lambda x: np.array((x * x).sum()), np.sum, reduce={"i": "add", "j": "add"}),
    kind("i j, -> i j", lambda x, y: x / (1 + abs(y))),
    kind("i j, i -> i j", lambda x, y: x * y[:, None]),
    kind("i j, j -> i j", lambda x, y: x - y[None]),
    kind("i k, k j -> i j", np.matmul, np.sum, reduce={"k": "add"}),
    kind("i j -> i j", lambda x: np.cumsum(x, 1), whole=("j",)),
)


@st.composite
def updates(draw: st.DrawFn) -> tuple[list[Work], list[Kind], Ends, dict[int, Any]]:
    """State, parameters and gradients, operations on them, and which results replace the state."""
    shapes: dict[int, tuple[int, ...]] = {p: (4, 6) for p in range(4)}
    shapes |= {4: (4, 4), 5: (6,)}
    works, kinds = [], []
    for _ in range(draw(st.integers(1, 8))):
        k = draw(st.sampled_from(KINDS))
        fit = [[p for p, s in shapes.items() if s == wanted] for wanted in k.takes]
        if not all(fit):
            continue
        ins = tuple(draw(st.sampled_from(places)) for places in fit)
        new = len(shapes)
        shapes[new] = k.makes
        works.append(Work("op", k.rule, ins, (new,)))
        kinds.append(k)
    state: dict[int, int] = {}
    for a in (0, 1, 4):
        results = [
            p for p in shapes if p > 5 and shapes[p] == shapes[a] and p not in state.values()
        ]
        state[a] = draw(st.sampled_from([*results, a]))
    results = frozenset(draw(st.sets(st.sampled_from(sorted(shapes)))) | set(state.values()))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    given_ = {p: rng.standard_normal(shapes[p]) for p in range(6)}
    early = frozenset(draw(st.sets(st.sampled_from([0, 1]))))
    ends = Ends(state, sums=frozenset({2}), results=results, early=early)
    return works, kinds, ends, given_


def part(x: Any, dim: int, group: int) -> Any:
    return np.split(x, GROUPS, dim)[group]


@settings(deadline=None, max_examples=300)
@given(updates())
def test_parts_are_parts_of_the_whole(case: Any) -> None:
    works, kinds, ends, values = case
    whole = dict(values)
    for work, k in zip(works, kinds, strict=True):
        whole[work.outs[0]] = k.run(*(whole[p] for p in work.ins))
    shapes = {p: np.shape(x) for p, x in whole.items()}
    found = parts_of_update(works, ends, shapes, GROUPS)
    held: list[dict[int, Any]] = [
        {p: part(x, found.dims[p], g) if p in found.dims else x for p, x in values.items()}
        for g in range(GROUPS)
    ]
    for work, k in zip(works, kinds, strict=True):
        (out,), made = work.outs, []
        for g, own in enumerate(held):
            operands = [taken(found, work, n, own, g) for n in range(len(work.ins))]
            made.append(k.run(*operands))
        if out in found.summed:
            assert k.puts is not None
            made = [k.puts(np.stack(made), 0)] * GROUPS
        for g, x in enumerate(made):
            wanted = whole[out]
            if out in found.dims:
                wanted = part(wanted, found.dims[out], g)
            np.testing.assert_allclose(x, wanted, rtol=1e-9, atol=1e-12)
            held[g][out] = x
    for a in found.rest:
        assert found.dims[a] == found.dims[ends.state[a]]
        assert ends.state[a] not in found.gathered
    apart = {p for p in ends.results if p in found.dims}
    assert set(found.gathered) == apart - {ends.state[a] for a in found.rest}


def taken(found: Parts, work: Work, n: int, own: dict[int, Any], group: int) -> Any:
    p = work.ins[n]
    assert p is not None
    dim = found.taken.get((work.outs[0], n))
    return own[p] if dim is None else part(own[p], dim, group)


def test_a_longer_dim_is_taken_first_and_one_that_must_be_whole_not() -> None:
    scan = Rule.parse("i j -> i j", SIZES, whole=("j",))
    works = [Work("add", ADD, (0, 1), (2,)), Work("cumsum", scan, (2,), (3,))]
    shapes = dict.fromkeys(range(4), (4, 6))
    free = parts_of_update(works[:1], Ends({0: 2}, sums=frozenset({1})), shapes, GROUPS)
    assert free.dims == {0: 1, 1: 1, 2: 1}
    ends = Ends({0: 3}, sums=frozenset({1}))
    assert parts_of_update(works, ends, shapes, GROUPS).dims == {0: 0, 1: 0, 2: 0, 3: 0}


def test_what_a_branch_needs_stays_whole() -> None:
    works = [Work("add", ADD, (0, 1), (2,)), Work("cond", None, (2,), (3,))]
    shapes = dict.fromkeys(range(4), (4, 6))
    assert not parts_of_update(works, Ends({0: 2}), shapes, GROUPS).dims


def test_inside_a_group_the_parts_can_be_split_further() -> None:
    """4 of dim 0 can not be shared by 2 groups of 4 devices, and 6 of dim 1 neither."""
    works = [Work("add", ADD, (0, 1), (2,))]
    shapes = dict.fromkeys(range(3), (4, 6))
    assert parts_of_update(works, Ends({0: 2}), shapes, GROUPS, inner=2).dims[0] == 0
    assert not parts_of_update(works, Ends({0: 2}), shapes, GROUPS, inner=4).dims
