"""Run each factor's shards one by one, combine them as the rule says, and compare with the whole.

How the shards of a factor are run depends on what a split of it means:

* the plain way: every operand that has the factor is cut, the operation runs on the local shapes;
* rows that are looked up (gather, scatter, dynamic_update_slice, ragged_dot): as XLA masks them;
* a halo: operands are whole, but all that lies outside the piece and its halo is replaced by
  other numbers, which must not change the piece of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from jax import lax

import passes.rules  # noqa: F401
from autoshard.jax_compat import Literal, open_jaxpr
from autoshard.signature import signature
from passes.ir.rule import Dim, Rule
from passes.rules.factors import Factors
from passes.rules.registry import hand_rule
from passes.rules.windows import Window, split_window

RNG = np.random.default_rng(0)


def real(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def below(limit: int, *shape: int) -> Any:
    return RNG.integers(-2, limit + 2, shape, dtype=np.int32)  # some out of bounds


def positive_definite(*shape: int) -> Any:
    a = real(*shape)
    return a @ np.swapaxes(a, -1, -2) + 3 * np.eye(shape[-1], dtype=np.float32)


# Finding one equation of a function, and the numbers that reach it.


def equations(fn: Callable[..., Any], args: tuple[Any, ...], name: str) -> list[Any]:
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


def find(name: str, fn: Callable[..., Any], *args: Any) -> tuple[Any, list[Any], Rule]:
    eqn, ins = equations(fn, args, name)[-1]
    rule = hand_rule(signature(eqn))
    assert rule is not None
    return eqn, ins, rule


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


DROP = jax.lax.GatherScatterMode.FILL_OR_DROP


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
    return run(eqn, mine, slice_sizes=sizes, mode=DROP, fill_value=0)


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
    return run(eqn, [local[0], indices, local[2]], mode=DROP)


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
            strange.append(np.where(far.reshape(shape), real(*x.shape) * 10, x).astype(x.dtype))
        for got, want, dims in zip(run(eqn, strange), expected, rule.results, strict=True):
            np.testing.assert_allclose(
                piece(got, rule, dims, factor, j, n), piece(want, rule, dims, factor, j, n), 1e-5
            )


def parts_of(size: int) -> int:
    return next(n for n in range(2, size + 1) if size % n == 0)


def check(name: str, fn: Callable[..., Any], *args: Any) -> Rule:
    """Every factor of the rule means what it says; returns the rule."""
    eqn, ins, rule = find(name, fn, *args)
    check_rule(eqn, ins, rule)
    return rule


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
        first = [real(*x.shape).astype(x.dtype) if k in group else x for k, x in enumerate(ins)]
        rest = [x - first[k] if k in group else x for k, x in enumerate(ins)]
        whole, a, b = (run(eqn, x)[0] for x in (ins, first, rest))
        np.testing.assert_allclose(a + b, whole, 1e-3, 1e-3, err_msg=f"linear in {group}: {rule}")


def split_sizes(rule: Rule, kind: str) -> list[int]:
    return sorted(f.size for f in rule.factors if f.kind == kind and f.size > 1)


# Gather.

# Each example is compiled; shrinking a failure would take minutes.
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
MODES = ("clip", "fill", "promise_in_bounds")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("fn", "parallel", "reduced"),
    [
        (lambda x, i, mode: x.at[i].get(mode=mode), [4, 6, 10], [8]),
        (lambda x, i, mode: x.at[:, i].get(mode=mode), [4, 6, 8], [10]),
        (lambda x, i, mode: x.at[i, i[::-1]].get(mode=mode), [4, 6], [8, 10]),
        (lambda x, i, mode: x.at[None, :, i].get(mode=mode), [4, 6, 8], [10]),
        (lambda x, i, mode: x.at[i, 2:4].get(mode=mode), [4, 6], [8]),
    ],
    ids=["rows", "columns", "both", "a new dim", "rows of a stretch"],
)
def test_gather(mode: str, fn: Any, parallel: list[int], reduced: list[int]) -> None:
    i = below(8, 4, 6) if mode != "promise_in_bounds" else np.abs(below(5, 4, 6))
    rule = check("gather", partial(fn, mode=mode), real(8, 10), i)
    assert split_sizes(rule, "parallel") == parallel
    assert split_sizes(rule, "reduction") == reduced


@pytest.mark.parametrize("mode", MODES)
def test_gather_along_an_axis(mode: str) -> None:
    i = np.abs(below(5, 6, 10))
    take = partial(jnp.take_along_axis, mode=mode)
    rule = check("gather", lambda x, i: take(x, i, 0), real(8, 10), i)
    assert split_sizes(rule, "parallel") == [6, 10]
    assert split_sizes(rule, "reduction") == [8]


def test_gather_of_stretches_keeps_the_cut_dim_whole() -> None:
    cut = jax.vmap(lambda x, i: lax.dynamic_slice(x, (i, 0), (3, 8)))
    rule = check("gather", cut, real(4, 6, 8), below(4, 4))
    assert split_sizes(rule, "parallel") == [4, 8]
    assert split_sizes(rule, "reduction") == []
    assert 6 in split_sizes(rule, "whole")


def test_gather_linearity_depends_on_what_is_filled_in() -> None:
    i = below(8, 4)
    for fill, linear in ((None, True), (0, True), (np.nan, True), (7, False)):
        get = partial(lambda x, i, fill: x.at[i].get(mode="fill", fill_value=fill), fill=fill)
        assert bool(find("gather", get, real(8), i)[2].linear) is linear
    integers = np.arange(8, dtype=np.int32)
    rule = find("gather", lambda x, i: x.at[i].get(mode="fill"), integers, i)[2]
    assert rule.linear == ()


@settings(deadline=None, max_examples=15, derandomize=True, phases=NO_SHRINKING)
@given(st.data())
def test_any_gather(data: st.DataObject) -> None:
    """Random dimension numbers: collapsed, window, batching and cut dims in any order."""
    rank = data.draw(st.integers(1, 4))
    roles = [data.draw(st.sampled_from(["row", "window", "cut", "batch"])) for _ in range(rank)]
    sizes = [data.draw(st.sampled_from([4, 6] if r == "cut" else [2, 4, 6])) for r in roles]
    batching = [d for d in range(rank) if roles[d] == "batch"]
    looked_up = [d for d in range(rank) if roles[d] in ("row", "cut")]
    collapsed = [d for d in range(rank) if roles[d] == "row" and data.draw(st.booleans())]
    slices = [
        {"row": 1, "batch": 1, "window": n, "cut": n // 2}[role]
        for role, n in zip(roles, sizes, strict=True)
    ]
    index_shape = [sizes[d] for d in batching] + [data.draw(st.sampled_from([2, 3]))]
    windows = rank - len(batching) - len(collapsed)
    out_rank = len(index_shape) + windows
    offsets = sorted(data.draw(st.permutations(range(out_rank)))[:windows])
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(offsets),
        collapsed_slice_dims=tuple(collapsed),
        start_index_map=tuple(looked_up),
        operand_batching_dims=tuple(batching),
        start_indices_batching_dims=tuple(range(len(batching))),
    )
    mode = data.draw(st.sampled_from(MODES[:2]))
    indices = below(4, *index_shape, len(looked_up))
    rule = check(
        "gather",
        lambda x, i: lax.gather(x, i, numbers, slices, mode=mode),
        real(*sizes),
        indices,
    )
    rows = [n for n, role in zip(sizes, roles, strict=True) if role == "row"]
    assert split_sizes(rule, "reduction") == sorted(rows)


# Scatter.

SCATTERS = {
    "scatter": "set",
    "scatter-add": "add",
    "scatter-max": "max",
    "scatter-min": "min",
    "scatter-mul": "multiply",
    "scatter-sub": "subtract",
}


@pytest.mark.parametrize("mode", ["clip", "drop"])
@pytest.mark.parametrize("name", SCATTERS)
def test_scatter_of_rows(name: str, mode: str) -> None:
    def fn(x: Any, i: Any, u: Any) -> Any:
        return getattr(x.at[i], SCATTERS[name])(u, mode=mode)

    rule = check(name, fn, real(8, 10), below(8, 4, 6), real(4, 6, 10))
    assert split_sizes(rule, "parallel") == [8, 10]
    combined = ([], [4, 6]) if name == "scatter" else ([4, 6], [])
    assert (split_sizes(rule, "reduction"), split_sizes(rule, "whole")) == combined


@pytest.mark.parametrize("name", ["scatter", "scatter-add", "scatter-max"])
def test_scatter_with_batching_dims(name: str) -> None:
    def fn(x: Any, i: Any, u: Any) -> Any:
        return jax.vmap(lambda x, i, u: getattr(x.at[i], SCATTERS[name])(u))(x, i, u)

    rule = check(name, fn, real(4, 8, 6), below(8, 4, 3), real(4, 3, 6))
    assert split_sizes(rule, "parallel") == [4, 6, 8]


def test_scatter_of_single_elements() -> None:
    rule = check(
        "scatter-add",
        lambda x, i, u: x.at[i, i[::-1]].add(u),
        real(8, 10),
        below(8, 6),
        real(6),
    )
    assert split_sizes(rule, "parallel") == [8, 10]
    assert split_sizes(rule, "reduction") == [6]


def test_scatter_of_stretches_keeps_the_cut_dim_whole() -> None:
    update = jax.vmap(lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)))
    rule = check("scatter", update, real(4, 6, 8), real(4, 3, 8), below(4, 4))
    assert split_sizes(rule, "parallel") == [4, 8]
    assert 6 in split_sizes(rule, "whole")


def test_cache_update_for_each_batch_element_may_split_the_cache() -> None:
    update = jax.vmap(lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)))
    rule = check("scatter", update, real(4, 6, 8), real(4, 1, 8), below(4, 4))
    assert split_sizes(rule, "parallel") == [4, 6, 8]


def test_embedding_gradient() -> None:
    def loss(table: Any, i: Any) -> Any:
        return jnp.sum(jnp.sin(table[i]))

    rule = check("scatter-add", jax.grad(loss), real(8, 6), np.abs(below(6, 10)))
    assert split_sizes(rule, "parallel") == [6, 8]
    assert split_sizes(rule, "reduction") == [10]
    assert rule.linear == ((0, 2),)


def test_a_scatter_with_the_users_own_function_is_not_linear() -> None:
    rule = find("scatter", lambda x, i: x.at[i].apply(jnp.sin), real(8, 6), below(8, 4))[2]
    assert rule.linear == ()
    assert split_sizes(rule, "whole") == [4]


# Dynamic slices.


def test_dynamic_slice() -> None:
    rule = check(
        "dynamic_slice",
        lambda x, i: lax.dynamic_slice(x, (i, 0, 0), (4, 6, 4)),
        real(8, 6, 4),
        np.int32(7),
    )
    assert split_sizes(rule, "parallel") == [4, 6]


@pytest.mark.parametrize(("rows", "parallel"), [(1, [6, 8]), (4, [6]), (8, [6, 8])])
@pytest.mark.parametrize("start", [-3, 0, 5, 7, 30])
def test_dynamic_update_slice(rows: int, parallel: list[int], start: int) -> None:
    rule = check(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0), allow_negative_indices=False),
        real(8, 6),
        real(rows, 6),
        np.int32(start),
    )
    assert split_sizes(rule, "parallel") == parallel


# Convolution.


def conv(strides: Any = (1, 1), padding: Any = "SAME", **more: Any) -> Callable[..., Any]:
    return lambda x, w: lax.conv_general_dilated(x, w, strides, padding, **more)


NHWC = ("NHWC", "HWIO", "NHWC")
CONVS = {
    "plain": (conv(), (2, 4, 8, 8), (6, 4, 3, 3), [2, 6], [4], [8, 8]),
    "nhwc": (conv(dimension_numbers=NHWC), (2, 8, 8, 4), (3, 3, 4, 6), [2, 6], [4], [8, 8]),
    "1x1": (conv(), (2, 4, 8, 6), (6, 4, 1, 1), [2, 6, 6, 8], [4], []),
    "1x1 stride 2": (conv((2, 2)), (2, 4, 8, 8), (6, 4, 1, 1), [2, 4, 4, 6], [4], []),
    "patches": (conv((4, 4), "VALID"), (2, 3, 8, 16), (6, 3, 4, 4), [2, 2, 4, 6], [3], []),
    "stride 2": (conv((2, 2)), (2, 4, 8, 16), (6, 4, 3, 3), [2, 6], [4], [4, 8]),
    "valid": (conv(padding="VALID"), (2, 4, 8, 8), (6, 4, 3, 3), [2, 6], [4], []),
    "dilated window": (conv(rhs_dilation=(2, 2)), (2, 4, 8, 8), (6, 4, 3, 3), [2, 6], [4], [8, 8]),
    "transposed": (
        lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=NHWC),
        (2, 4, 8, 4), (3, 3, 4, 6), [2, 6], [4], [4, 8],
    ),
    "transposed, no overlap": (
        lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=NHWC),
        (2, 4, 8, 4), (2, 2, 4, 6), [2, 4, 6, 8], [4], [],
    ),
    "groups": (conv(feature_group_count=2), (2, 8, 8, 8), (12, 4, 3, 3), [2, 2, 6], [4], [8, 8]),
    "depthwise": (conv(feature_group_count=8), (2, 8, 8, 8), (8, 1, 3, 3), [2, 8], [], [8, 8]),
    "depthwise, multiplied": (
        conv(feature_group_count=4), (2, 4, 8, 8), (12, 1, 3, 3), [2, 3, 4], [], [8, 8],
    ),
    "batch groups": (
        conv(batch_group_count=2), (6, 4, 8, 8), (10, 4, 3, 3), [2, 3, 5], [4], [8, 8],
    ),
    "causal": (
        lambda x, w: lax.conv_general_dilated(x, w, (1,), [(2, 0)]),
        (2, 4, 8), (6, 4, 3), [2, 6], [4], [8],
    ),
    "no space": (
        lambda x, w: lax.conv_general_dilated(x, w, (), ()), (4, 6), (8, 6), [4, 8], [6], [],
    ),
    "3d": (
        lambda x, w: lax.conv_general_dilated(x, w, (1, 2, 1), "SAME"),
        (2, 2, 4, 4, 4), (2, 2, 3, 3, 1), [2, 2, 4], [2], [2, 4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVS)
def test_convolution(case: str) -> None:
    fn, left, right, parallel, reduced, halos = CONVS[case]
    rule = check("conv_general_dilated", fn, real(*left), real(*right))
    assert split_sizes(rule, "parallel") == parallel
    assert split_sizes(rule, "reduction") == reduced
    assert split_sizes(rule, "halo") == halos


@pytest.mark.parametrize(
    ("case", "reduced", "halo"),
    [
        ("plain", [2, 8, 8], 2),  # the batch and both spatial dims
        ("stride 2", [2, 4, 8], 1),
        ("patches", [2, 2, 4], 0),
        ("depthwise", [2, 8, 8], 2),
        ("groups", [2, 8, 8], 2),
        ("batch groups", [3, 8, 8], 2),
    ],
)
def test_gradient_of_the_weights(case: str, reduced: list[int], halo: int) -> None:
    fn, left, right, *_ = CONVS[case]

    def loss(w: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(fn(x, w)))

    x, w = real(*left), real(*right)
    eqn, ins, rule = find("conv_general_dilated", jax.grad(loss), w, x)
    check_rule(eqn, ins, rule)
    assert split_sizes(rule, "reduction") == reduced
    assert max(f.halo for f in rule.factors if f.kind == "reduction") == halo


@pytest.mark.parametrize("case", ["plain", "stride 2", "patches", "dilated window", "groups"])
def test_gradient_of_the_picture(case: str) -> None:
    fn, left, right, *_ = CONVS[case]
    x, w = real(*left), real(*right)
    out = jax.eval_shape(fn, x, w)

    def pull(g: Any, w: Any) -> Any:
        return jax.linear_transpose(lambda x: fn(x, w), x)(g)[0]

    rule = check("conv_general_dilated", pull, real(*out.shape), w)
    assert left[0] in split_sizes(rule, "parallel")


def test_flops_of_a_convolution() -> None:
    rule = find("conv_general_dilated", conv(), real(2, 4, 8, 8), real(6, 4, 3, 3))[2]
    assert rule.flops == 2 * (2 * 6 * 8 * 8) * (4 * 3 * 3)
    grouped = conv(feature_group_count=2)
    rule = find("conv_general_dilated", grouped, real(2, 8, 8, 8), real(12, 4, 3, 3))[2]
    assert rule.flops == 2 * (2 * 12 * 8 * 8) * (4 * 3 * 3)


# Windows: the halo against a count of the elements that each result reads.


def reads(w: Window, read: int, p: int) -> set[int]:
    """Operand elements that result p reads (possibly outside the operand), counted one by one."""
    places = (p * w.stride - w.low + q * w.dilation for q in range(w.size))
    return {at // w.base for at in places if at % w.base == 0}


WINDOWS = st.builds(
    Window,
    size=st.integers(1, 5),
    stride=st.integers(1, 3),
    low=st.integers(-2, 4),
    base=st.integers(1, 3),
    dilation=st.integers(1, 3),
)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(WINDOWS, st.integers(1, 4), st.integers(2, 4))
def test_the_halo_holds_all_that_a_piece_reads(w: Window, units: int, pieces: int) -> None:
    made = w.base * units * pieces
    read = made * w.stride // w.base
    assume(made * w.stride == read * w.base)
    f = Factors()
    dims = split_window(f, read, made, w)
    rule = f.rule([[dims[0]]], [[dims[1]]])
    kinds = {factor.kind for factor in rule.factors}
    j = pieces // 2
    mine = range(j * made // pieces, (j + 1) * made // pieces)
    own = range(j * read // pieces, (j + 1) * read // pieces)
    wanted = set().union(*(reads(w, read, p) for p in mine))
    before = max([0, *(own.start - at for at in wanted)])
    after = max([0, *(at - own.stop + 1 for at in wanted)])
    assert w.halo >= before + after
    if w.base == 1 or (w.stride == w.dilation == 1 and w.size >= w.base):  # reaches both ends
        assert w.halo == before + after
    assert ("parallel" in kinds) <= (w.halo == 0)
    assert ("halo" in kinds) <= (0 < w.halo <= read // 2)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(1, 4))
def test_the_halo_back_holds_every_window_that_touches_a_piece(
    size: int, stride: int, low: int, units: int
) -> None:
    w = Window(size, stride, low)
    made, read = 3 * units, 3 * units * stride
    own = range(read // 3, 2 * read // 3)
    touching = [reads(w, read, p) for p in range(-20, made + 20)]
    wanted = set().union(*(t for t in touching if t & set(own)))
    before = max([0, *(own.start - at for at in wanted)])
    after = max([0, *(at - own.stop + 1 for at in wanted)])
    if wanted:
        assert w.back_halo == before + after


POOLS = {
    "apart": ((1, 2, 2), (1, 2, 2), "VALID", [2, 4, 4], []),
    "overlapping": ((1, 3, 3), (1, 2, 2), "SAME", [2], [4, 4]),
    "stride 1": ((1, 3, 3), (1, 1, 1), "SAME", [2], [8, 8]),
    "valid": ((1, 3, 1), (1, 1, 1), "VALID", [2, 8], []),
    "everything": ((1, 8, 8), (1, 1, 1), "VALID", [2], []),
}


@pytest.mark.parametrize("case", POOLS)
@pytest.mark.parametrize("kind", ["max", "min", "sum", ""])
def test_pooling(case: str, kind: str) -> None:
    window, strides, padding, parallel, halos = POOLS[case]
    combine, start = {
        "max": (lax.max, -jnp.inf),
        "min": (lax.min, jnp.inf),
        "sum": (lax.add, 0.0),
        "": (lambda a, b: jnp.maximum(a, jnp.abs(b)), 0.0),
    }[kind]
    name = f"reduce_window_{kind}" if kind else "reduce_window"
    rule = check(
        name,
        lambda x: lax.reduce_window(x, start, combine, window, strides, padding),
        real(2, 8, 8),
    )
    assert split_sizes(rule, "parallel") == parallel
    assert split_sizes(rule, "halo") == halos
    assert rule.linear == (((0,),) if kind == "sum" else ())


def test_dilated_pooling() -> None:
    rule = check(
        "reduce_window_sum",
        lambda x: lax.reduce_window(x, 0.0, lax.add, (3,), (1,), [(2, 2)], window_dilation=(2,)),
        real(8),
    )
    assert split_sizes(rule, "halo") == [8]
    assert rule.factors[0].halo == 4


@pytest.mark.parametrize("case", ["apart", "overlapping", "stride 1"])
def test_gradient_and_tangent_of_max_pooling(case: str) -> None:
    window, strides, padding, parallel, _ = POOLS[case]

    def pool(x: Any) -> Any:
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)

    def loss(x: Any) -> Any:
        return jnp.sum(jnp.sin(pool(x)))

    x = real(2, 16, 16)
    assert 2 in split_sizes(check("select_and_scatter_add", jax.grad(loss), x), "parallel")
    tangent = check(
        "select_and_gather_add", lambda x, t: jax.jvp(pool, (x,), (t,)), x, real(*x.shape)
    )
    assert len(split_sizes(tangent, "parallel")) == len(parallel)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"])
def test_cumulative(name: str, reverse: bool) -> None:
    fn = getattr(lax, name)
    rule = check(name, lambda x: fn(x, axis=1, reverse=reverse), real(4, 6, 8))
    assert split_sizes(rule, "parallel") == [4, 8]
    assert split_sizes(rule, "whole") == [6]


# Sorts.


def test_sort_with_companions() -> None:
    rule = check(
        "sort", lambda a, b: lax.sort((a, b), dimension=1, num_keys=1), real(4, 6, 8), real(4, 6, 8)
    )
    assert split_sizes(rule, "parallel") == [4, 8]


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("top_k", lambda x: lax.top_k(x, 3)),
        ("approx_top_k", lambda x: lax.approx_max_k(x, 3)),
        ("approx_top_k", lambda x: lax.approx_min_k(x, 3, reduction_dimension=-1)),
    ],
)
def test_selection(name: str, fn: Any) -> None:
    rule = check(name, fn, real(4, 6, 8))
    assert split_sizes(rule, "parallel") == [4, 6]


# Linear algebra.

LINALG = {
    "cholesky": (lax.linalg.cholesky, (positive_definite(4, 6, 6),)),
    "eig": (lambda a: lax.linalg.eig(a, compute_left_eigenvectors=False), (real(4, 6, 6),)),
    "eigh": (lax.linalg.eigh, (positive_definite(4, 6, 6),)),
    "hessenberg": (lax.linalg.hessenberg, (real(4, 6, 6),)),
    "householder_product": (lax.linalg.householder_product, (real(4, 6, 5), real(4, 5))),
    "lu": (lax.linalg.lu, (real(4, 6, 5),)),
    "lu_pivots_to_permutation": (
        partial(lax.linalg.lu_pivots_to_permutation, permutation_size=6),
        (np.tile(np.array([2, 1, 5, 3], np.int32), (4, 1)),),
    ),
    "qr": (lax.linalg.qr, (real(4, 6, 5),)),
    "schur": (lax.linalg.schur, (real(4, 6, 6),)),
    "svd": (lax.linalg.svd, (real(4, 6, 5),)),
    "symmetric_product": (
        lambda a, c: lax.linalg.symmetric_product(a, c, alpha=2.0, symmetrize_output=True),
        (real(4, 6, 8), np.zeros((4, 6, 6), np.float32)),
    ),
    "triangular_solve": (
        partial(lax.linalg.triangular_solve, left_side=True, lower=True),
        (positive_definite(4, 6, 6), real(4, 6, 2)),
    ),
    "tridiagonal": (lax.linalg.tridiagonal, (positive_definite(4, 6, 6),)),
    "tridiagonal_solve": (
        lax.linalg.tridiagonal_solve,
        (real(4, 6), 5 + real(4, 6), real(4, 6), real(4, 6, 3)),
    ),
    "fft": (jnp.fft.rfft2, (real(4, 6, 8),)),
}


@pytest.mark.parametrize("name", LINALG)
def test_batch_dims_of_linear_algebra(name: str) -> None:
    fn, args = LINALG[name]
    rule = check(name, fn, *args)
    assert 4 in split_sizes(rule, "parallel")
    assert rule.flops > 0


def test_right_hand_sides_of_a_triangular_solve() -> None:
    for left, shape in ((True, (4, 6, 2)), (False, (4, 2, 6))):
        solve = partial(lax.linalg.triangular_solve, left_side=left, lower=True)
        rule = check("triangular_solve", solve, positive_definite(4, 6, 6), real(*shape))
        assert split_sizes(rule, "parallel") == [2, 4]


@pytest.mark.parametrize("fn", [jnp.fft.fft, jnp.fft.ifft2, jnp.fft.irfft, jnp.fft.fftn])
def test_fourier_transforms(fn: Any) -> None:
    rule = check("fft", fn, real(4, 6, 8) + 0j)
    assert split_sizes(rule, "parallel") == {
        jnp.fft.fft: [4, 6], jnp.fft.irfft: [4, 6], jnp.fft.ifft2: [4], jnp.fft.fftn: []
    }[fn]  # fmt: skip


# Ragged products.


def test_ragged_rows() -> None:
    sizes = np.array([3, 0, 4, 1], np.int32)
    rule = check("ragged_dot_general", lax.ragged_dot, real(8, 6), real(4, 6, 10), sizes)
    assert split_sizes(rule, "parallel") == [8, 10]
    assert split_sizes(rule, "reduction") == [4, 6]
    assert rule.flops == 2 * 8 * 6 * 10


def test_ragged_gradients() -> None:
    sizes = np.array([3, 0, 4, 1], np.int32)

    def loss(x: Any, w: Any) -> Any:
        return jnp.sum(jnp.sin(lax.ragged_dot(x, w, sizes)))

    x, w = real(8, 6), real(4, 6, 10)
    found = equations(jax.grad(loss, (0, 1)), (x, w), "ragged_dot_general")
    assert len(found) == 3
    for eqn, ins in found:
        rule = hand_rule(signature(eqn))
        assert rule is not None
        check_rule(eqn, ins, rule)
        assert rule.flops == 2 * 8 * 6 * 10


def test_ragged_rows_with_sizes_for_each_batch_element() -> None:
    sizes = np.array([[3, 5], [8, 0], [1, 2], [0, 8]], np.int32)
    product = jax.vmap(lax.ragged_dot)
    rule = check("ragged_dot_general", product, real(4, 8, 6), real(4, 2, 6, 10), sizes)
    assert split_sizes(rule, "parallel") == [4, 8, 10]


# What must fail.


def test_a_wrong_rule_is_caught() -> None:
    """The cut dim of a dynamic slice called parallel, as a lazy author might."""
    eqn, ins, rule = find(
        "dynamic_slice", lambda x, i: lax.dynamic_slice(x, (i,), (4,)), real(8), np.int32(3)
    )
    f = Factors()
    cut = f.parallel(4)
    wrong = f.rule([[cut + f.whole(2)], []], [[cut]])
    parts = [
        run(eqn, [piece(ins[0], wrong, wrong.operands[0], 0, j, 2), ins[1]], slice_sizes=(2,))
        for j in range(2)
    ]
    assert not np.allclose(combine(parts, wrong, 0)[0], run(eqn, ins)[0])
    assert split_sizes(rule, "parallel") == []


def test_a_halo_that_is_too_small_is_caught() -> None:
    eqn, ins, rule = find("conv_general_dilated", conv(), real(2, 4, 8, 8), real(6, 4, 3, 3))
    f = next(k for k, factor in enumerate(rule.factors) if factor.kind == "halo")
    factors = list(rule.factors)
    factors[f] = type(factors[f])(factors[f].name, factors[f].size, "halo", "", 0)
    too_small = Rule(tuple(factors), rule.operands, rule.results)
    with pytest.raises(AssertionError):
        check_halo(eqn, ins, too_small, f, 2)
