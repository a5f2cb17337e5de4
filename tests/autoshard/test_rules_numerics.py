"""A rule is true: the equation run piece by piece, and put together as the rule says, is the whole.

For each sample equation and each factor that our rule lets a mesh axis split, into two pieces:

* *locally*: operands are cut along the factor, the primitive runs on each piece with parameters to
  match (`autoshard.localize`), results are joined or reduced;
* *by dependence*, where a piece's result depends on its place (look-ups, counters, halos): the
  primitive runs in full, once for each device, with all that the device does not hold replaced:
  by noise when the factor is parallel, by the neutral element when it is reduced. The device's
  share of the result must not change; reduced results must come out whole.

And for each group of operands in which an equation is said to be linear: f(x + y) = f(x) + f(y).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import passes.rules  # noqa: F401
from autoshard.localize import local_params
from autoshard.rule_samples import Sample, arguments, equation
from autoshard.rule_samples_all import all_samples
from autoshard.signature import signature
from passes.ir.rule import Dim, Rule
from passes.rules.registry import hand_rule

pytestmark = pytest.mark.usefixtures("in_a_hurry")

Arrays = list[Any]

# Primitives whose results depend on the place of an element, not only on the elements.
BY_PLACE = frozenset(
    {"dynamic_update_slice", "empty", "gather", "iota", "ragged_dot_general", "random_bits",
     "random_split", "scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul",
     "scatter-sub"}
)  # fmt: skip
# The array that a scatter writes into enters once, however many devices bring updates.
ENTERS_ONCE = frozenset(p for p in BY_PLACE if p.startswith("scatter"))
NEUTRAL = {
    "add": 0,
    "mul": 1,
    "max": "least",
    "min": "greatest",
    "and": True,
    "or": False,
    "xor": 0,
}
COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "add": jnp.add, "mul": jnp.multiply, "max": jnp.maximum, "min": jnp.minimum,
    "and": jnp.bitwise_and, "or": jnp.bitwise_or, "xor": jnp.bitwise_xor,
}  # fmt: skip


def run(eqn: Any, args: Arrays, **changed: Any) -> Arrays:
    params = eqn.primitive.get_bind_params({**eqn.params, **changed})
    out = eqn.primitive.bind(*args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def cut(x: Any, dims: Sequence[Dim], rule: Rule, factor: int, part: slice) -> Any:
    """The part of x along one factor; all of x when it does not have the factor."""
    for d, names in enumerate(dims):
        if factor in names:
            sizes = [rule.factors[f].size for f in names]
            at = d + names.index(factor)
            inner = x.reshape(x.shape[:d] + tuple(sizes) + x.shape[d + 1 :])
            inner = inner[(slice(None),) * at + (part,)]
            return inner.reshape(
                (*x.shape[:d], math.prod(inner.shape[d : d + len(sizes)]), *x.shape[d + 1 :])
            )
    return x


def has(dims: Sequence[Dim], factor: int) -> bool:
    return any(factor in names for names in dims)


def parts(size: int) -> list[slice]:
    """Two pieces; as many as the smallest prime factor when two do not divide the length."""
    n = next(n for n in range(2, size + 1) if size % n == 0)
    return [slice(k * size // n, (k + 1) * size // n) for k in range(n)]


def close(got: Any, want: Any, coarse: bool = False) -> bool:
    if jax.dtypes.issubdtype(want.dtype, jax.dtypes.prng_key):
        got, want = jax.random.key_data(got), jax.random.key_data(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    tolerance = 0.05 if coarse or want.dtype.itemsize < 4 else 2e-4
    kind = np.complex128 if jnp.iscomplexobj(want) else np.float64
    return np.allclose(
        np.asarray(got).astype(kind), np.asarray(want).astype(kind),
        rtol=tolerance, atol=tolerance, equal_nan=True,
    )  # fmt: skip


def difference(got: Arrays, want: Arrays) -> str:
    texts = []
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape or not jnp.issubdtype(b.dtype, jnp.number):
            texts.append(f"{a.dtype}{a.shape}, not {b.dtype}{b.shape}")
        else:
            apart = np.abs(np.asarray(a).astype(complex) - np.asarray(b).astype(complex))
            texts.append(f"{apart.max(initial=0):.3g} off")
    return "; ".join(texts)


# The equation run on pieces.


def locally(eqn: Any, rule: Rule, factor: int, args: Arrays, want: Arrays) -> Iterator[str]:
    """What is wrong with splitting one factor; nothing when it is right."""
    pieces, made = [], []
    shapes = [v.aval.shape for v in eqn.invars]
    for part in parts(rule.factors[factor].size):
        local = [cut(x, d, rule, factor, part) for x, d in zip(args, rule.operands, strict=True)]
        expect = [cut(y, d, rule, factor, part) for y, d in zip(want, rule.results, strict=True)]
        params = local_params(
            eqn.primitive.name, eqn.params, shapes,
            [x.shape for x in local], [y.shape for y in expect],
        )  # fmt: skip
        pieces.append(local)
        made.append((run(eqn, local, **params), expect))
    if rule.factors[factor].kind == "reduction":
        got = reduced(eqn, rule, factor, pieces, [m for m, _ in made])
        if not all(map(close, got, want)):
            yield f"the reduced results are {difference(got, want)}"
        return
    for got, expect in made:
        if not all(map(close, got, expect)):
            yield f"a piece of the result is {difference(got, expect)}"


def reduced(eqn: Any, rule: Rule, factor: int, pieces: list[Arrays], made: list[Arrays]) -> Arrays:
    """The partial results put together as the factor's `op` says."""
    op = rule.factors[factor].op
    if op in ("argmax", "argmin"):
        return [best_index(eqn, rule, factor, pieces, made)]
    if op == "custom":
        starts = pieces[0][len(made[0]) :]
        stacked = [jnp.stack([m[n] for m in made]) for n in range(len(made[0]))]
        return run(eqn, stacked + starts, dimensions=(0,))
    return [functools.reduce(COMBINE[op], parts) for parts in zip(*made, strict=True)]


def best_index(eqn: Any, rule: Rule, factor: int, pieces: list[Arrays], made: list[Arrays]) -> Any:
    """Of the best index of each piece the one whose element is best in the whole."""
    axis = eqn.params["axes"][0]
    values, places = [], []
    start = 0
    for (x,), (index,) in zip(pieces, made, strict=True):
        values.append(jnp.take_along_axis(x, jnp.expand_dims(index, axis), axis).squeeze(axis))
        places.append(index + start)
        start += x.shape[axis]
    choose = jnp.argmax if rule.factors[factor].op == "argmax" else jnp.argmin
    winner = choose(jnp.stack(values), axis=0)
    return jnp.take_along_axis(jnp.stack(places), winner[None], 0)[0].astype(made[0][0].dtype)


# The equation run in full on operands of which a device knows only its part.


def by_dependence(eqn: Any, rule: Rule, factor: int, args: Arrays, want: Arrays) -> Iterator[str]:
    """What is wrong with splitting one factor; nothing when it is right."""
    f = rule.factors[factor]
    if f.kind == "reduction":
        yield from _partial_sums(eqn, rule, factor, args, want)
        return
    # The margin on the left is the same for every device.
    if not any(
        all(_unchanged(eqn, rule, factor, args, want, part, left) for part in parts(f.size))
        for left in range(f.halo + 1)
    ):
        yield "a piece of the result depends on other pieces of the operands"


def _unchanged(
    eqn: Any, rule: Rule, factor: int, args: Arrays, want: Arrays, part: slice, left: int
) -> bool:
    """Whether noise outside of a part (and `left` elements before it) leaves the part's result."""
    margin = (left, rule.factors[factor].halo - left)
    known = [
        keep(x, d, rule, factor, part, margin, None)
        for x, d in zip(args, rule.operands, strict=True)
    ]
    return all(
        close(cut(a, dims, rule, factor, part), cut(b, dims, rule, factor, part))
        for a, b, dims in zip(run(eqn, known), want, rule.results, strict=True)
    )


def _partial_sums(eqn: Any, rule: Rule, factor: int, args: Arrays, want: Arrays) -> Iterator[str]:
    """A halo of a reduced factor lies on the left operand, and noise beyond it must not matter."""
    f = rule.factors[factor]
    for left in range(f.halo + 1):
        made = []
        for k, part in enumerate(parts(f.size)):
            margins = [
                (left, f.halo - left) if f.halo and not n else None for n in range(len(args))
            ]
            known = [
                keep(x, d, rule, factor, part, margin or (0, 0), None if margin else f.op)
                for x, d, margin in zip(args, rule.operands, margins, strict=True)
            ]
            if k and eqn.primitive.name in ENTERS_ONCE:
                known[0] = jnp.full_like(args[0], neutral(f.op, args[0].dtype))
            made.append(run(eqn, known))
        got = [functools.reduce(COMBINE[f.op], partial) for partial in zip(*made, strict=True)]
        if all(map(close, got, want)):
            return
    yield f"the reduced results are {difference(got, want)}"


def keep(
    x: Any, dims: Sequence[Dim], rule: Rule, factor: int, part: slice,
    more: tuple[int, int], op: str | None,
) -> Any:  # fmt: skip
    """x with everything outside of the part (and of a margin around it) replaced."""
    if not has(dims, factor):
        return x
    axis = next(d for d, names in enumerate(dims) if factor in names)
    names = dims[axis]
    inner = math.prod(rule.factors[g].size for g in names[names.index(factor) + 1 :])
    place = jnp.arange(x.shape[axis])
    block = (place // inner) % rule.factors[factor].size
    inside = (block >= part.start) & (block < part.stop)
    if any(more):
        assert names[0] == factor, "only a major factor has neighbours"
        inside = (place >= part.start * inner - more[0]) & (place < part.stop * inner + more[1])
    mask = jnp.expand_dims(inside, [d for d in range(x.ndim) if d != axis])
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        noise = jax.random.key(99, impl=jax.random.key_impl(x))
        return jnp.where(mask, x, jax.random.split(noise, x.shape))
    if op is None:
        return jnp.where(mask, x, x[::-1] if x.dtype == bool else x * 0 + 3).astype(x.dtype)
    return jnp.where(mask, x, neutral(op, x.dtype)).astype(x.dtype)


def neutral(op: str, dtype: Any) -> Any:
    value = NEUTRAL[op]
    if value in ("least", "greatest"):
        info = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype)
        return info.min if value == "least" else info.max
    return value


def wrong(eqn: Any, rule: Rule, factor: int, args: Arrays, want: Arrays) -> list[str]:
    """All that is wrong with splitting one factor of a rule."""
    f = rule.factors[factor]
    places = eqn.primitive.name in BY_PLACE or f.halo
    check = by_dependence if places else locally
    return list(check(eqn, rule, factor, args, want))


def nonlinear(eqn: Any, group: tuple[int, ...], args: Arrays, want: Arrays) -> list[str]:
    """What is wrong with calling an equation linear in a group of operands."""
    first, second = list(args), list(args)
    for n in group:
        share = args[n] // 2 if jnp.issubdtype(args[n].dtype, jnp.integer) else args[n] * 0.25
        first[n], second[n] = share.astype(args[n].dtype), (args[n] - share).astype(args[n].dtype)
    total = [a + b for a, b in zip(run(eqn, first), run(eqn, second), strict=True)]
    coarse = any(args[n].dtype.itemsize < 2 for n in group)
    if not all(close(t.astype(w.dtype), w, coarse) for t, w in zip(total, want, strict=True)):
        return [f"not linear in operands {group}: sums are {difference(total, want)}"]
    return []


def can_be_partial(eqn: Any, group: tuple[int, ...]) -> bool:
    """Whether these operands can be partial sums at all: booleans and keys can not."""
    values = [*(eqn.invars[n] for n in group), *eqn.outvars]
    return all(jnp.issubdtype(v.aval.dtype, jnp.number) for v in values)


def faults(sample: Sample, rule: Rule) -> list[str]:
    """All that is wrong with a rule for a sample."""
    eqn = equation(sample)
    args = arguments(sample)
    want = run(eqn, args)
    found = []
    for n, f in enumerate(rule.factors):
        if rule.splittable(n):
            found += [f"{f.name} of {rule}: {x}" for x in wrong(eqn, rule, n, args, want)]
    for group in rule.linear:
        if can_be_partial(eqn, group):
            found += nonlinear(eqn, group, args, want)
    return found


def our_rule(sample: Sample) -> Rule:
    rule = hand_rule(signature(equation(sample)))
    assert rule is not None
    return rule


def named(primitive: str, label: str = "") -> Sample:
    return next(s for s in all_samples() if (s.primitive, s.label) == (primitive, label))


@pytest.mark.parametrize("sample", all_samples(), ids=str)
def test_pieces_make_the_whole(sample: Sample) -> None:
    rule = our_rule(sample)
    found = faults(sample, rule)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("sample", all_samples(), ids=str)
def test_factors_multiply_to_the_dims(sample: Sample) -> None:
    rule, eqn = our_rule(sample), equation(sample)
    tensors = (*rule.operands, *rule.results)
    for dims, var in zip(tensors, (*eqn.invars, *eqn.outvars), strict=True):
        lengths = [math.prod(rule.factors[f].size for f in names) for names in dims]
        assert lengths == list(var.aval.shape), f"{rule} for a value of shape {var.aval.shape}"
        used = [f for names in dims for f in names]
        assert len(set(used)) == len(used), f"{rule} has a factor twice in one value"


# Rules that are wrong, so that we know that the oracle would notice.


def with_kind(rule: Rule, factor: int, **changes: Any) -> Rule:
    factors = list(rule.factors)
    factors[factor] = replace(factors[factor], **changes)
    return replace(rule, factors=tuple(factors))


def parsed(text: str, **options: Any) -> Rule:
    return Rule.parse(text, {"i": 4, "j": 6, "k": 8, "h": 2, "r": 2, "s": 3}, **options)


WRONG = {
    "a running sum cut along its dim": (
        named("cumsum", "last dim"), lambda r: parsed("i j -> i j"),
    ),
    "a sort cut along its dim": (named("sort", "last dim"), lambda r: parsed("i j -> i j")),
    "a maximum whose parts are added": (
        named("reduce_max", "axes (1,)"), lambda r: with_kind(r, 1, op="add"),
    ),
    "a sum that needs no reduction": (
        named("dot_general", "matrices"), lambda r: with_kind(r, 1, kind="parallel"),
    ),
    "a reversed dim cut": (named("rev", "dims (0,)"), lambda r: parsed("i j -> i j")),
    "major and minor factor exchanged": (
        named("reshape", "(4, 6) to (24,)"), lambda r: parsed("i j -> (j i)"),
    ),
    "a halo too small": (
        named("conv_general_dilated", "dilated kernel"), lambda r: with_kind(r, 3, halo=2),
    ),
    "a halo too small under a reduction": (
        named("conv_general_dilated", "gradient of the kernel"),
        lambda r: with_kind(r, next(n for n, f in enumerate(r.factors) if f.op and f.halo), halo=1),
    ),
    "a stretch without a halo": (
        named("reduce_window_max", "overlapping"),
        lambda r: with_kind(r, 1, kind="parallel", halo=0),
    ),
    "rows of a table without a reduction": (
        named("gather", "rows of a table, clip"),
        lambda r: with_kind(r, 1, kind="parallel", op=""),
    ),
    "updates that overwrite, added up": (
        named("scatter", "rows of a table"),
        lambda r: replace(
            parsed("i j, k ., k j -> i j", reduce={"k": "add"}), linear=()
        ),
    ),
    "an exponential of a partial sum": (named("exp"), lambda r: replace(r, linear=((0,),))),
    "a product of two partial sums": (named("mul"), lambda r: replace(r, linear=((0, 1),))),
    "a sum of a partial sum and a whole": (named("add"), lambda r: replace(r, linear=((0,),))),
    "a rounded partial sum": (
        named("convert_element_type", "float32 to int32"), lambda r: replace(r, linear=((0,),)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(WRONG))
def test_a_wrong_rule_is_noticed(case: str) -> None:
    sample, spoil = WRONG[case]
    right = our_rule(sample)
    assert not faults(sample, right)
    assert faults(sample, spoil(right))
