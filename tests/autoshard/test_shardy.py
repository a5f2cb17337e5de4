"""Rules joined from many operations: known ones, and random programs checked by their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from autoshard.shardy import function_rule
from autoshard.shardy_atoms import Atoms
from autoshard.shardy_text import NoRule, OpRule
from passes.ir.rule import Rule


def rule_of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> str:
    return str(function_rule(function, [jax.ShapeDtypeStruct(s, np.float32) for s in shapes]))


@pytest.mark.parametrize(
    ("function", "shapes", "rule"),
    [
        (lambda x: jax.nn.gelu(x) + 1, ((4, 6),), "i j -> i j  {i=4 j=6}"),
        (jax.nn.softmax, ((4, 6),), "i j -> i k  {i=4 j=6 k=6}  whole(j k)"),
        (
            lambda x, v, w: x @ v @ w, ((4, 6), (6, 8), (8, 10)),
            "i j, k l, l m -> i m  {i=4 j=6 k=6 l=8 m=10}  whole(j k) add(l)",
        ),
        (
            lambda x, v, w: jax.nn.relu(x @ v) @ w, ((4, 6), (6, 8), (8, 10)),
            "i j, k l, l m -> i m  {i=4 j=6 k=6 l=8 m=10}  whole(j k) add(l)",
        ),
        (lambda x: (x @ x.T).sum(), ((4, 6),), "i j -> []  {i=4 j=6}  whole(i j)"),
        (
            lambda x: x.reshape(4, 2, 3).transpose(1, 0, 2), ((4, 6),),
            "i (j k) -> j i k  {i=4 j=2 k=3}",
        ),
        (lambda x: x.reshape(4, 2, 3) + x.reshape(4, 3, 2)[:, :2, :1], ((4, 6),),
         "i (j k) -> i l m  {i=4 j=2 k=3 l=2 m=3}  whole(j k l m)"),
        (lambda x: x.sum(1).reshape(2, 2).T, ((4, 6),), "(i j) k -> j i  {i=2 j=2 k=6}  add(k)"),
        (lambda x: lax.fori_loop(0, 3, lambda _, y: y * 2 + x, x), ((4, 6),),
         "i j -> i j  {i=4 j=6}"),
        (lambda x: lax.fori_loop(0, 3, lambda _, y: y + y.sum(0), x), ((4, 6),),
         "i j -> k j  {i=4 j=6 k=4}  whole(i k)"),
        (lambda x: lax.cond(x.sum() > 0, lambda y: y * 2, lambda y: -y, x), ((4, 6),),
         "i j -> k l  {i=4 j=6 k=4 l=6}  whole(i j k l)"),
        (lambda x, y: x, ((4,), (6,)), "i, j -> i  {i=4 j=6}"),
        (lambda x: jnp.linalg.cholesky(x), ((2, 4, 4),),
         "i j k -> i l m  {i=2 j=4 k=4 l=4 m=4}  whole(j k l m)"),
    ],
)  # fmt: skip
def test_joined_rule(
    function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], rule: str
) -> None:
    assert rule_of(function, *shapes) == rule


def test_an_operation_without_a_rule_is_named() -> None:
    with pytest.raises(NoRule, match=r"chlo\.top_k"):
        rule_of(lambda x: lax.top_k(x * 2, 2)[0], (4, 6))


def test_a_text_that_is_no_rule() -> None:
    with pytest.raises(NoRule, match="can not be read"):
        OpRule.parse("#sdy.sharding<@mesh, []>")


# Random programs over arrays of shape (4, 6), (6, 4) and (24,), and their numbers.

STEPS: dict[str, Callable[[Any, Any], Any]] = {
    "exp": lambda x, y: jnp.exp(-x * x),
    "add": lambda x, y: x + y if x.shape == y.shape else x,
    "transpose": lambda x, y: x.T,
    "flat": lambda x, y: x.reshape(24),
    "rows": lambda x, y: x.reshape(4, 6),
    "columns": lambda x, y: x.reshape(6, 4),
    "mean": lambda x, y: x - x.mean(0),
    "last mean": lambda x, y: x * x.mean(-1, keepdims=True),
    "product": lambda x, y: x @ y @ x if x.ndim == y.ndim == 2 and x.T.shape == y.shape else x,
    "reverse": lambda x, y: x[::-1],
    "running": lambda x, y: jnp.cumsum(x, 0),
    "maximum": lambda x, y: jnp.maximum(x, y.max()),
    "swap": lambda x, y: y,
}
LAST: dict[str, Callable[[Any], Any]] = {
    "all": lambda x: x, "sum": lambda x: x.sum(0), "max": lambda x: x.max(-1),
    "doubled sum": lambda x: 2 * x.sum(0) + 1,
}  # fmt: skip


def pick(x: np.ndarray, dims: Any, rule: Rule, factor: int) -> np.ndarray:
    """Where x lies in the first half of a factor."""
    mask = np.ones(x.shape, bool)
    for d, names in enumerate(dims):
        if factor in names:
            sizes = [rule.factors[f].size for f in names]
            at = np.arange(x.shape[d])
            index = np.unravel_index(at, sizes)[names.index(factor)]
            shape = [-1 if k == d else 1 for k in range(x.ndim)]
            mask &= (index < max(1, rule.factors[factor].size // 2)).reshape(shape)
    return mask


COMBINE = {"add": np.add, "max": np.maximum}
NEUTRAL = {"add": 0.0, "max": -np.inf}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=5), st.sampled_from(sorted(LAST)))
@settings(deadline=None, max_examples=40)
def test_a_joined_rule_is_sound(steps: list[str], last: str) -> None:
    def program(x: Any, y: Any) -> Any:
        for step in steps:
            x, y = STEPS[step](x, y), x
        return LAST[last](x)

    shapes = [(4, 6), (6, 4)]
    rule = function_rule(program, [jax.ShapeDtypeStruct(s, np.float32) for s in shapes])
    rng = np.random.default_rng(0)
    args = [rng.uniform(0.2, 1, s).astype(np.float32) for s in shapes]
    run = jax.jit(program)
    want = np.asarray(run(*args))
    for n, f in enumerate(rule.factors):
        if not rule.splittable(n):
            continue
        inside = [pick(x, d, rule, n) for x, d in zip(args, rule.operands, strict=True)]
        if f.kind == "parallel":
            noise = [np.where(m, x, 7 - x) for x, m in zip(args, inside, strict=True)]
            shown = pick(want, rule.results[0], rule, n)
            np.testing.assert_allclose(np.asarray(run(*noise))[shown], want[shown], rtol=1e-4)
        else:
            part, rest = (
                np.asarray(run(*(np.where(m == side, x, NEUTRAL[f.op]) for x, m in pairs)))
                for side, pairs in ((True, zip(args, inside, strict=True)),
                                    (False, zip(args, inside, strict=True)))
            )  # fmt: skip
            np.testing.assert_allclose(COMBINE[f.op](part, rest), want, rtol=1e-4)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
@settings(deadline=None, max_examples=60)
def test_atoms_cut_one_length_alike(pieces: list[int], data: st.DataObject) -> None:
    other = data.draw(st.permutations(pieces))
    atoms = Atoms()
    left = [a for n in pieces for a in atoms.dim(n)]
    right = [a for n in other for a in atoms.dim(n)]
    whole = [a for n in [int(np.prod(pieces))] for a in atoms.dim(n)]
    atoms.same(whole, left)
    atoms.same(whole, right)
    for side in (left, right, whole):
        assert np.prod([atoms.size(a) for a in atoms.expand(side)]) == np.prod(pieces)
    free = [[a for a in atoms.expand(s) if not atoms.is_whole(a)] for s in (left, right, whole)]
    assert free[0] == free[2] or any(atoms.is_whole(a) for a in atoms.expand(whole))
    if pieces == list(other):
        assert atoms.expand(left) == atoms.expand(right)
