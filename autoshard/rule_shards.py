"""Does a rule mean what it says?  Its shards, run one by one and put together, make up the whole.

For whoever writes a rule. Each factor that may be split is split into a few pieces, and the
equation is run once for each piece, as XLA's partitioner would run it:

* the plain way: every operand that has the factor is cut, the equation runs on the local shapes;
* rows that are looked up (`gather`, `scatter`, `dynamic_update_slice`, `ragged_dot`): every device
  has its rows, and masks what is another's;
* a halo: operands are whole, but all that lies outside the piece and its halo is replaced by other
  numbers, which must not change the piece of the result.

>>> eqn, numbers, rule = find("sort", jax.lax.sort, np.array([[3.0, 1.0, 2.0], [0.0, 2.0, 1.0]]))
>>> faults(eqn, numbers, rule)
[]
>>> faults(eqn, numbers, Rule.parse("i j -> i j", {"i": 2, "j": 3}))
['j of i j -> i j  {i=2 j=3}: 3 shards do not make up the whole']
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.lax import GatherScatterMode

import passes.rules  # noqa: F401
from autoshard.jax_compat import Literal, open_jaxpr
from autoshard.localize import local_params
from autoshard.signature import signature
from passes.ir.rule import Dim, Rule
from passes.rules.registry import hand_rule

Arrays = list[Any]
Found = tuple[Any, Arrays, Rule]

_CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call")
_NOWHERE = 10**6  # an index that is out of bounds on every device
_REDUCE: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
}  # fmt: skip
_NEUTRAL = {"add": 0.0, "mul": 1.0, "min": np.inf, "max": -np.inf}


# One equation of a function, and the numbers that reach it.


def find_all(name: str, fn: Callable[..., Any], *args: Any) -> list[Found]:
    """The equations of this primitive in a function, their operands, and their hand-written rules.

    Raises LookupError when the function has no such equation or the primitive no rule.
    """
    equations: list[tuple[Any, Arrays]] = []

    def walk(body: Any, args: Any) -> Arrays:
        jaxpr, consts = open_jaxpr(body)
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env |= zip(jaxpr.invars, args, strict=True)
        for eqn in jaxpr.eqns:
            operands = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
            body = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            if eqn.primitive.name in _CALLS:
                results = walk(body, operands)
            else:
                if eqn.primitive.name == name:
                    equations.append((eqn, operands))
                results = _bind(eqn, operands)
            env |= zip(eqn.outvars, results, strict=True)
        return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]

    def operands_of_all(*args: Any) -> list[Arrays]:
        walk(traced, args)
        return [operands for _, operands in equations]

    traced = jax.jit(fn).trace(*args).jaxpr
    values = jax.jit(operands_of_all)(*args)  # one compilation for all of the function
    if not equations:
        raise LookupError(f"the function has no equation {name}")
    return [
        (eqn, [np.asarray(x) for x in operands], _rule_of(eqn))
        for (eqn, _), operands in zip(equations, values, strict=True)
    ]


def find(name: str, fn: Callable[..., Any], *args: Any) -> Found:
    """The last equation of this primitive in a function (in a gradient: the backward one)."""
    return find_all(name, fn, *args)[-1]


def _rule_of(eqn: Any) -> Rule:
    rule = hand_rule(signature(eqn))
    if rule is None:
        raise LookupError(f"the primitive {eqn.primitive.name} has no hand-written rule")
    return rule


def _bind(eqn: Any, operands: Arrays, **changed: Any) -> Arrays:
    params = eqn.primitive.get_bind_params({**eqn.params, **changed})
    out = eqn.primitive.bind(*operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _run(eqn: Any, operands: Arrays, **changed: Any) -> Arrays:
    return [np.asarray(x) for x in _bind(eqn, operands, **changed)]


# Pieces of arrays.


def _where(dims: Sequence[Dim], factor: int) -> int | None:
    """The dim that has the factor."""
    return next((d for d, dim in enumerate(dims) if factor in dim), None)


def _cut(x: Any, rule: Rule, dims: Sequence[Dim], factor: int, j: int, n: int) -> Any:
    """The j-th of n pieces of an array along a factor; the whole array when it lacks the factor."""
    d = _where(dims, factor)
    if d is None:
        return x
    sizes = [rule.factors[f].size for f in dims[d]]
    at = dims[d].index(factor)
    apart = x.reshape(*x.shape[:d], *sizes, *x.shape[d + 1 :])
    length = sizes[at] // n
    piece = np.take(apart, range(j * length, (j + 1) * length), axis=d + at)
    return piece.reshape(*x.shape[:d], x.shape[d] // n, *x.shape[d + 1 :])


def _joined(pieces: Arrays, rule: Rule, dims: Sequence[Dim], factor: int) -> Any:
    """The pieces of one result put together, or reduced when the result lacks the factor."""
    d = _where(dims, factor)
    if d is None:
        op = rule.factors[factor].op
        return functools.reduce(_REDUCE[op], pieces) if op else None
    sizes = [rule.factors[f].size for f in dims[d]]
    at = dims[d].index(factor)
    sizes[at] //= len(pieces)
    before, after = pieces[0].shape[:d], pieces[0].shape[d + 1 :]
    apart = [p.reshape(*before, *sizes, *after) for p in pieces]
    whole = np.concatenate(apart, axis=d + at)
    return whole.reshape(*before, pieces[0].shape[d] * len(pieces), *after)


def _other_numbers(x: Any) -> Any:
    """Numbers of the same shape and type that have nothing to do with x."""
    drawn = np.random.default_rng(x.size).standard_normal((2, *x.shape))
    return (drawn[0] + 1j * drawn[1] if np.iscomplexobj(x) else drawn[0]).astype(x.dtype)


# One shard.


@dataclass(frozen=True, slots=True)
class _Shard:
    """The j-th of n pieces of an equation along one factor of its rule."""

    eqn: Any
    whole: Arrays
    rule: Rule
    factor: int
    j: int
    n: int

    def dim(self, operand: int) -> int | None:
        """The dim of an operand that has the factor."""
        return _where(self.rule.operands[operand], self.factor)

    def local(self) -> Arrays:
        """The piece of every operand."""
        pairs = zip(self.whole, self.rule.operands, strict=True)
        return [_cut(x, self.rule, dims, self.factor, self.j, self.n) for x, dims in pairs]

    def only(self, operand: int) -> Any:
        """An operand with zeros everywhere but in the piece."""
        x, d = self.whole[operand], self.dim(operand)
        assert d is not None, "the operand lacks the factor"
        length = x.shape[d] // self.n
        place = np.arange(x.shape[d]).reshape([-1 if k == d else 1 for k in range(x.ndim)])
        return np.where(place // length == self.j, x, 0).astype(x.dtype)

    def run(self, operands: Arrays, **changed: Any) -> Arrays:
        """The equation on local shapes."""
        made = [
            _cut(np.empty(v.aval.shape, bool), self.rule, dims, self.factor, self.j, self.n).shape
            for v, dims in zip(self.eqn.outvars, self.rule.results, strict=True)
        ]
        shapes = [x.shape for x in self.whole], [x.shape for x in operands]
        fitted = local_params(self.eqn.primitive.name, self.eqn.params, *shapes, made)
        return _run(self.eqn, operands, **{**fitted, **changed})


def _gather(s: _Shard) -> Arrays:
    operand, indices = s.local()
    if s.rule.factors[s.factor].kind != "reduction":
        return s.run([operand, indices], fill_value=0)
    numbers, slices = s.eqn.params["dimension_numbers"], s.eqn.params["slice_sizes"]
    indices = _owned(s, indices, numbers.start_index_map, slices, operand.shape)
    return s.run([operand, indices], mode=GatherScatterMode.FILL_OR_DROP, fill_value=0)


def _owned(
    s: _Shard, indices: Any, looked_up: Sequence[int], slices: Sequence[int], local: Sequence[int]
) -> Any:
    """Indices as one device counts its rows; those of other devices point nowhere."""
    d = s.dim(0)
    assert d is not None, "no rows are split"
    if s.eqn.params["mode"] != GatherScatterMode.FILL_OR_DROP:
        last = [s.whole[0].shape[k] - slices[k] for k in looked_up]
        indices = np.clip(indices, 0, np.array(last, indices.dtype))
    shift = np.array([s.j * local[d] if k == d else 0 for k in looked_up], indices.dtype)
    mine = indices - shift
    return np.where(mine < 0, _NOWHERE, mine).astype(indices.dtype)


def _scatter(s: _Shard) -> Arrays:
    operand, indices, updates = s.local()
    if s.dim(0) is None:  # look-ups are split: all devices but one start from the neutral element
        if s.j:
            operand = np.full_like(operand, _NEUTRAL[s.rule.factors[s.factor].op])
        return s.run([operand, indices, updates])
    if s.dim(2) is not None:
        return s.run([operand, indices, updates])
    looked_up = s.eqn.params["dimension_numbers"].scatter_dims_to_operand_dims
    indices = _owned(s, indices, looked_up, [1] * operand.ndim, operand.shape)
    return s.run([operand, indices, updates], mode=GatherScatterMode.FILL_OR_DROP)


def _dynamic_update_slice(s: _Shard) -> Arrays:
    operand, update, *starts = s.local()
    d = s.dim(0)
    if s.dim(1) is None and d is not None:
        row = int(np.clip(starts[d], 0, s.whole[0].shape[d] - 1)) - s.j * operand.shape[d]
        if not 0 <= row < operand.shape[d]:
            return [operand]
        starts[d] = np.asarray(row, starts[d].dtype)
    return s.run([operand, update, *starts])


def _convolution(s: _Shard) -> Arrays:
    if s.rule.factors[s.factor].kind == "reduction" and s.rule.factors[s.factor].halo:
        return _run(s.eqn, [s.whole[0], s.only(1)])  # as if the halo had come
    return s.run(s.local())


def _ragged_dot(s: _Shard) -> Arrays:
    numbers = s.eqn.params["ragged_dot_dimension_numbers"]
    ragged = numbers.lhs_ragged_dimensions[0]
    left, right, sizes = s.local()
    if s.dim(0) == ragged:
        rows = left.shape[ragged]
        ends = np.clip(np.cumsum(s.whole[2], -1) - s.j * rows, 0, rows)
        sizes = np.diff(ends, prepend=0 * ends[..., :1]).astype(sizes.dtype)
    elif s.dim(1) in numbers.rhs_group_dimensions:  # the rows of other devices' experts are zero
        right = s.only(1)
    elif s.dim(0) is None and s.dim(1) is None:  # groups of the result
        made = _run(s.eqn, s.whole)
        dims = s.rule.results
        return [_cut(x, s.rule, dims[k], s.factor, s.j, s.n) for k, x in enumerate(made)]
    return s.run([left, right, sizes])


_BY_PLACE: dict[str, Callable[[_Shard], Arrays]] = {
    "conv_general_dilated": _convolution,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "ragged_dot_general": _ragged_dot,
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub"),
        _scatter,
    ),
}


def _run_shard(s: _Shard) -> Arrays:
    by_place = _BY_PLACE.get(s.eqn.primitive.name)
    return by_place(s) if by_place else s.run(s.local())


# All of a rule.


def faults(eqn: Any, numbers: Arrays, rule: Rule) -> list[str]:
    """What is wrong with a rule, one sentence for each factor and linear group."""
    # A gather is cut before the mask that puts other values there than zero.
    changed = {"fill_value": 0} if eqn.primitive.name == "gather" else {}
    whole = _run(eqn, numbers, **changed)
    found = []
    for f, factor in enumerate(rule.factors):
        if not rule.splittable(f):
            continue
        n = next(n for n in range(2, factor.size + 1) if factor.size % n == 0)
        shards = [_Shard(eqn, numbers, rule, f, j, n) for j in range(n)]
        if factor.kind == "halo":
            found += [f"{factor.name} of {rule}: {x}" for x in map(_beyond_halo, shards) if x]
        elif not _make_up(shards, whole):
            found.append(f"{factor.name} of {rule}: {n} shards do not make up the whole")
    groups = [g for g in rule.linear if not _is_linear(eqn, numbers, g)]
    return found + [f"operands {group} of {rule}: not linear" for group in groups]


def _make_up(shards: Sequence[_Shard], whole: Arrays) -> bool:
    made = [_run_shard(s) for s in shards]
    rule, factor = shards[0].rule, shards[0].factor
    for k, (dims, want) in enumerate(zip(rule.results, whole, strict=True)):
        got = _joined([m[k] for m in made], rule, dims, factor)
        if got is None or got.shape != want.shape or not _close(got, want):
            return False
    return True


def _close(got: Any, want: Any) -> bool:
    return bool(np.allclose(got, want, rtol=2e-4, atol=2e-4, equal_nan=True))


def _beyond_halo(s: _Shard) -> str:
    """Whether what lies beyond a piece and its halo changes the piece of the result."""
    halo = s.rule.factors[s.factor].halo
    strange = []
    for k, x in enumerate(s.whole):
        d = s.dim(k)
        if d is None:
            strange.append(x)
            continue
        length = x.shape[d] // s.n
        place = np.arange(x.shape[d]).reshape([-1 if a == d else 1 for a in range(x.ndim)])
        far = (place < s.j * length - halo) | (place >= (s.j + 1) * length + halo)
        strange.append(np.where(far, 10 * _other_numbers(x), x).astype(x.dtype))
    pairs = zip(_run(s.eqn, strange), _run(s.eqn, s.whole), s.rule.results, strict=True)
    for got, want, dims in pairs:
        pieces = [_cut(y, s.rule, dims, s.factor, s.j, s.n) for y in (got, want)]
        if not _close(*pieces):
            return f"piece {s.j} of {s.n} depends on more than its halo of {halo}"
    return ""


def _is_linear(eqn: Any, numbers: Arrays, group: Sequence[int]) -> bool:
    """Two addends on the operands of a linear group make two addends of the result."""
    if not all(np.issubdtype(numbers[k].dtype, np.inexact) for k in group):
        return True
    first = [_other_numbers(x) if k in group else x for k, x in enumerate(numbers)]
    rest = [x - first[k] if k in group else x for k, x in enumerate(numbers)]
    whole, a, b = (_run(eqn, x)[0] for x in (numbers, first, rest))
    return bool(np.allclose(a + b, whole, rtol=1e-3, atol=1e-3, equal_nan=True))
