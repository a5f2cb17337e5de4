"""Does a rule mean what it says?  The shards of each factor, run one by one and put together.

How the shards of a factor are run depends on what a split of it means:

* the plain way: every operand that has the factor is cut, the operation runs on the local shapes;
* rows that are looked up (gather, scatter, dynamic_update_slice, ragged_dot): as XLA masks them;
* a halo: operands are whole, but all that lies outside the piece and its halo is replaced by
  other numbers, which must not change the piece of the result.

Fixtures: `find(primitive, fn, *args)` gives the last such equation of a function, the numbers that
reach it, and its rule; `find_all` gives all of them; `check(primitive, fn, *args)` runs the shards
of every factor of that equation and returns the rule; `check_found` does so for one that was found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.lax import GatherScatterMode

import passes.rules  # noqa: F401
from autoshard.jax_compat import Literal, open_jaxpr
from autoshard.signature import signature
from passes.ir.rule import Dim, Rule
from passes.rules.registry import hand_rule

Found = tuple[Any, list[Any], Rule]


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test draws the same numbers from np.random, whatever ran before it."""
    np.random.seed(0)


@pytest.fixture(scope="session")
def find() -> Callable[..., Found]:
    return find_equation


@pytest.fixture(scope="session")
def find_all() -> Callable[..., list[Found]]:
    return lambda *args: [(eqn, ins, rule_of(eqn)) for eqn, ins in equations(*args)]


@pytest.fixture(scope="session")
def check_found() -> Callable[[Any, list[Any], Rule], None]:
    return check_rule


@pytest.fixture(scope="session")
def check() -> Callable[..., Rule]:
    def check(name: str, fn: Callable[..., Any], *args: Any) -> Rule:
        eqn, ins, rule = find_equation(name, fn, *args)
        check_rule(eqn, ins, rule)
        return rule

    return check


def noise(x: Any) -> Any:
    made = np.random.default_rng(x.size).standard_normal((2, *x.shape))
    return (
        (made[0] + 1j * made[1]).astype(x.dtype) if np.iscomplexobj(x) else made[0].astype(x.dtype)
    )


# Finding one equation of a function, and the numbers that reach it.


def equations(name: str, fn: Callable[..., Any], *args: Any) -> list[tuple[Any, list[Any]]]:
    """The equations of this primitive, each with its operands' numbers."""
    found: list[Any] = []

    def walk(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env |= zip(jaxpr.invars, args, strict=True)
        for eqn in jaxpr.eqns:
            ins = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
            body = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            if eqn.primitive.name in ("jit", "pjit", "custom_jvp_call", "custom_vjp_call"):
                outs = walk(*open_jaxpr(body), ins)
            else:
                if eqn.primitive.name == name:
                    found.append((eqn, ins))
                outs = bind(eqn, ins)
            env |= zip(eqn.outvars, outs, strict=True)
        return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]

    def operands(*args: Any) -> Any:
        walk(*open_jaxpr(traced), args)
        return [ins for _, ins in found]

    traced = jax.jit(fn).trace(*args).jaxpr
    values = jax.jit(operands)(*args)  # one compilation for all of the function
    return [
        (eqn, [np.asarray(x) for x in ins]) for (eqn, _), ins in zip(found, values, strict=True)
    ]


def bind(eqn: Any, operands: Any, **changed: Any) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    functions = ()
    if isinstance(params, tuple):
        functions, params = params
    out = eqn.primitive.bind(*functions, *operands, **(params | changed))
    return list(out) if eqn.primitive.multiple_results else [out]


def run(eqn: Any, operands: Any, **changed: Any) -> list[Any]:
    return [np.asarray(x) for x in bind(eqn, operands, **changed)]


def find_equation(name: str, fn: Callable[..., Any], *args: Any) -> Found:
    eqn, ins = equations(name, fn, *args)[-1]
    return eqn, ins, rule_of(eqn)


def rule_of(eqn: Any) -> Rule:
    rule = hand_rule(signature(eqn))
    assert rule is not None
    return rule


# Pieces of arrays.


def where(dims: tuple[Dim, ...], factor: int) -> int | None:
    found = [d for d, dim in enumerate(dims) if factor in dim]
    assert len(found) < 2, "a factor stands twice in one tensor"
    return found[0] if found else None


def piece(x: Any, rule: Rule, dims: tuple[Dim, ...], factor: int, j: int, n: int) -> Any:
    """The j-th of n pieces of an array along a factor, the whole array when it lacks the factor."""
    d = where(dims, factor)
    if d is None:
        return x
    sizes = [rule.factors[f].size for f in dims[d]]
    at = dims[d].index(factor)
    apart = x.reshape(*x.shape[:d], *sizes, *x.shape[d + 1 :])
    length = sizes[at] // n
    cut = np.take(apart, range(j * length, (j + 1) * length), axis=d + at)
    return cut.reshape(*x.shape[:d], x.shape[d] // n, *x.shape[d + 1 :])


def joined(pieces: list[Any], rule: Rule, dims: tuple[Dim, ...], factor: int) -> Any:
    d = where(dims, factor)
    assert d is not None
    sizes = [rule.factors[f].size for f in dims[d]]
    at = dims[d].index(factor)
    sizes[at] //= len(pieces)
    x = pieces[0]
    apart = [p.reshape(*x.shape[:d], *sizes, *x.shape[d + 1 :]) for p in pieces]
    together = np.concatenate(apart, axis=d + at)
    return together.reshape(*x.shape[:d], -1, *x.shape[d + 1 :])


REDUCE = {"add": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum}
NEUTRAL = {"add": 0.0, "mul": 1.0, "min": np.inf, "max": -np.inf}


def combine(parts: list[list[Any]], rule: Rule, factor: int) -> list[Any]:
    out = []
    for k, dims in enumerate(rule.results):
        pieces = [p[k] for p in parts]
        if where(dims, factor) is not None:
            out.append(joined(pieces, rule, dims, factor))
        else:
            assert rule.factors[factor].kind == "reduction", "a parallel factor left the result"
            total = pieces[0]
            for p in pieces[1:]:
                total = REDUCE[rule.factors[factor].op](total, p)
            out.append(total)
    return out


# Running one shard.


def shard(eqn: Any, ins: list[Any], rule: Rule, factor: int, j: int, n: int) -> list[Any]:
    name = eqn.primitive.name
    local = [piece(x, rule, dims, factor, j, n) for x, dims in zip(ins, rule.operands, strict=True)]
    if name == "gather":
        return gather_shard(eqn, ins, local, rule, factor, j)
    if name.startswith("scatter"):
        return scatter_shard(eqn, ins, local, rule, factor, j)
    if name == "dynamic_slice":
        return run(eqn, local, slice_sizes=local_slices(eqn, ins, local))
    if name == "dynamic_update_slice":
        return update_shard(eqn, ins, local, rule, factor, j)
    if name == "conv_general_dilated":
        return conv_shard(eqn, ins, local, rule, factor, j, n)
    if name == "ragged_dot_general":
        return ragged_shard(eqn, ins, local, rule, factor, j, n)
    return run(eqn, local)


def local_slices(eqn: Any, ins: list[Any], local: list[Any]) -> tuple[int, ...]:
    shapes = zip(eqn.params["slice_sizes"], ins[0].shape, local[0].shape, strict=True)
    return tuple(part if size == whole else size for size, whole, part in shapes)


def clipped(indices: Any, last: list[int], mode: Any) -> Any:
    return indices if "FILL" in str(mode) else np.clip(indices, 0, np.array(last, np.int32))


def gather_shard(eqn: Any, ins: Any, local: Any, rule: Rule, factor: int, j: int) -> list[Any]:
    looked_up = eqn.params["dimension_numbers"].start_index_map
    d = where(rule.operands[0], factor)
    sizes = local_slices(eqn, ins, local)
    if rule.factors[factor].kind != "reduction":
        return run(eqn, local, slice_sizes=sizes, fill_value=0)
    assert d is not None
    last = [ins[0].shape[k] - eqn.params["slice_sizes"][k] for k in looked_up]
    indices = clipped(local[1], last, eqn.params["mode"]).copy()
    indices[..., looked_up.index(d)] -= j * local[0].shape[d]
    mine = [local[0], np.where(indices < 0, 10**6, indices).astype(np.int32)]
    return run(eqn, mine, slice_sizes=sizes, mode=GatherScatterMode.FILL_OR_DROP, fill_value=0)


def scatter_shard(eqn: Any, ins: Any, local: Any, rule: Rule, factor: int, j: int) -> list[Any]:
    numbers = eqn.params["dimension_numbers"]
    d = where(rule.operands[0], factor)
    if d is None:  # look-ups are split: all devices but one start from the neutral element
        if j:
            local[0] = np.full_like(local[0], NEUTRAL[rule.factors[factor].op])
        return run(eqn, local)
    if where(rule.operands[2], factor) is not None:
        return run(eqn, local)
    looked_up = numbers.scatter_dims_to_operand_dims
    last = [ins[0].shape[k] - 1 for k in looked_up]
    indices = clipped(local[1], last, eqn.params["mode"]).copy()
    indices[..., looked_up.index(d)] -= j * local[0].shape[d]
    indices = np.where(indices < 0, 10**6, indices).astype(np.int32)
    return run(eqn, [local[0], indices, local[2]], mode=GatherScatterMode.FILL_OR_DROP)


def update_shard(eqn: Any, ins: Any, local: Any, rule: Rule, factor: int, j: int) -> list[Any]:
    d = where(rule.operands[0], factor)
    assert d is not None
    if where(rule.operands[1], factor) is not None:
        return run(eqn, local)
    begin = j * local[0].shape[d]
    at = int(np.clip(ins[2 + d], 0, ins[0].shape[d] - 1)) - begin
    if not 0 <= at < local[0].shape[d]:
        return [local[0]]
    local[2 + d] = np.int32(at)
    return run(eqn, local)


def conv_shard(
    eqn: Any, ins: Any, local: Any, rule: Rule, factor: int, j: int, n: int
) -> list[Any]:
    if rule.factors[factor].kind == "reduction" and rule.factors[factor].halo:
        mine = np.zeros_like(ins[1])  # the left operand whole, as if its halo had come
        d = where(rule.operands[1], factor)
        assert d is not None
        length = ins[1].shape[d] // n
        at = [slice(None)] * mine.ndim
        at[d] = slice(j * length, (j + 1) * length)
        mine[tuple(at)] = ins[1][tuple(at)]
        return run(eqn, [ins[0], mine])
    (_, left_feature, *_), (_, right_in, *_), _ = eqn.params["dimension_numbers"]
    feature_groups = local[0].shape[left_feature] // local[1].shape[right_in]
    batch_groups = eqn.params["batch_group_count"]
    if batch_groups > 1:
        feature_groups = 1
        if where(rule.operands[0], factor) == eqn.params["dimension_numbers"].lhs_spec[0]:
            both = where(rule.operands[1], factor) is not None
            batch_groups //= n if both else 1
    return run(eqn, local, feature_group_count=feature_groups, batch_group_count=batch_groups)


def ragged_shard(
    eqn: Any, ins: Any, local: Any, rule: Rule, factor: int, j: int, n: int
) -> list[Any]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ragged = numbers.lhs_ragged_dimensions[0]
    if where(rule.operands[0], factor) == ragged:
        rows = local[0].shape[ragged]
        ends = np.clip(np.cumsum(ins[2], -1) - j * rows, 0, rows)
        local[2] = np.diff(ends, prepend=0 * ends[..., :1]).astype(np.int32)
    elif where(rule.operands[0], factor) is None and where(rule.operands[1], factor) is not None:
        d = where(rule.operands[1], factor)
        if d in numbers.rhs_group_dimensions:  # other devices' experts: their rows are zero
            mine = np.zeros_like(ins[1])
            length = ins[1].shape[d] // n
            at = tuple(
                slice(j * length, (j + 1) * length) if k == d else slice(None)
                for k in range(mine.ndim)
            )
            mine[at] = ins[1][at]
            local[1] = mine
    elif all(where(dims, factor) is None for dims in rule.operands):  # groups of the result
        out = run(eqn, ins)
        return [piece(x, rule, rule.results[k], factor, j, n) for k, x in enumerate(out)]
    return run(eqn, local)


def check_halo(eqn: Any, ins: list[Any], rule: Rule, factor: int, n: int) -> None:
    """What lies beyond a piece and its halo does not change the piece of the result."""
    expected = run(eqn, ins)
    halo = rule.factors[factor].halo
    for j in range(n):
        strange = []
        for x, dims in zip(ins, rule.operands, strict=True):
            d = where(dims, factor)
            if d is None:
                strange.append(x)
                continue
            length = x.shape[d] // n
            places = np.arange(x.shape[d])
            far = (places < j * length - halo) | (places >= (j + 1) * length + halo)
            shape = [-1 if k == d else 1 for k in range(x.ndim)]
            strange.append(np.where(far.reshape(shape), 10 * noise(x), x).astype(x.dtype))
        for got, want, dims in zip(run(eqn, strange), expected, rule.results, strict=True):
            np.testing.assert_allclose(
                piece(got, rule, dims, factor, j, n), piece(want, rule, dims, factor, j, n), 1e-5
            )


def parts_of(size: int) -> int:
    return next(n for n in range(2, size + 1) if size % n == 0)


def check_rule(eqn: Any, ins: list[Any], rule: Rule) -> None:
    # A gather is cut before the mask that puts other values there than zero.
    changed = {"fill_value": 0} if eqn.primitive.name == "gather" else {}
    expected = run(eqn, ins, **changed)
    for f, factor in enumerate(rule.factors):
        if factor.kind == "whole" or factor.size < 2:
            continue
        n = parts_of(factor.size)
        if factor.kind == "halo":
            check_halo(eqn, ins, rule, f, n)
            continue
        got = combine([shard(eqn, ins, rule, f, j, n) for j in range(n)], rule, f)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, 2e-4, 2e-4, err_msg=f"{factor} of {rule}")
    check_linear(eqn, ins, rule)


def check_linear(eqn: Any, ins: list[Any], rule: Rule) -> None:
    """Two addends on the operands of a linear group make two addends of the result."""
    for group in rule.linear:
        if not all(np.issubdtype(ins[k].dtype, np.inexact) for k in group):
            continue
        first = [noise(x) if k in group else x for k, x in enumerate(ins)]
        rest = [x - first[k] if k in group else x for k, x in enumerate(ins)]
        whole, a, b = (run(eqn, x)[0] for x in (ins, first, rest))
        np.testing.assert_allclose(a + b, whole, 1e-3, 1e-3, err_msg=f"linear in {group}: {rule}")
