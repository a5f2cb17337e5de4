"""Which slices of a product are cheaper taken of its operands?  `logits[:, :-1]`.

The last token has no label, so its logits are cut off: a slice of a huge value along the dim that
blocks are cut along, whose pieces are no blocks of the whole. A slice of a product is the product
of slices, and its gradient, which is padded with zeros, likewise:

    (a b)[:n] = a[:n] b        pad(d) b' = pad(d b')        a' pad(d) = a'[:n] d

so that the product itself is smaller. Only for products that expand (`passes.huge`), and where
nobody reads the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.flat import Flat
from autoshard.jax_compat import Literal, bind, open_jaxpr, traced_at
from autoshard.localize import local_params
from autoshard.rewalk import read
from autoshard.sources import is_at_a_line
from autoshard.trace import Path, Traced

Range = tuple[int, int]  # first and end of a dim


def of_operands(traced: Traced) -> Callable[..., list[Any]]:
    """The function over flat arguments. traced: a flat one."""
    jaxpr, consts = open_jaxpr(traced.jaxpr)

    def run(*args: Any) -> list[Any]:
        return _Slices().walk(jaxpr, consts, list(args))

    return run


@dataclass(frozen=True)
class _Padded:
    """A value with zeros around it, not yet there. ranges: where it is in the whole, by dim."""

    inner: Any
    ranges: tuple[Range, ...]
    shape: tuple[int, ...]

    def whole(self) -> Any:
        config = [(a, n - b, 0) for (a, b), n in zip(self.ranges, self.shape, strict=True)]
        return lax.pad(self.inner, np.zeros((), self.inner.dtype)[()], config)


class _Slices(Flat):
    """Computes a jaxpr; slices go before products, zeros around a value behind them."""

    def walk(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], path: Path = ()
    ) -> list[Any]:
        """The results of a body."""
        ranges = _read_of(jaxpr)
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for i, eqn in enumerate(jaxpr.eqns):
            outside = self.caller
            self.caller = eqn if is_at_a_line(eqn.source_info) else outside
            with traced_at(eqn, self.caller):
                found = self.moved(eqn, [read(v, env) for v in eqn.invars], ranges)
                if found is None:
                    operands = [_whole(read(v, env)) for v in eqn.invars]
                    found = self.equation(eqn, operands, (*path, i))
            self.caller = outside
            env.update(zip(eqn.outvars, found, strict=True))
        return [_whole(read(v, env)) for v in jaxpr.outvars]

    def moved(self, eqn: Any, operands: list[Any], ranges: dict[Any, Any]) -> list[Any] | None:
        """The results where a slice or zeros move through an equation; None where none do."""
        name = eqn.primitive.name
        if not eqn.outvars:
            return None
        if eqn.outvars[0] in ranges and name in (*_ALONG, "slice"):
            return self.smaller(eqn, operands, ranges)
        if name == "pad" and eqn.outvars[0].aval.shape in {v.aval.shape for v in ranges}:
            return _padded(eqn, operands)
        padded = [k for k, x in enumerate(operands) if isinstance(x, _Padded)]
        if len(padded) != 1:
            return None
        (k,) = padded
        if name == "dot_general":
            return [_product_of_padded(eqn, operands, k)]
        if name in _SAME:
            (made,) = bind(eqn, [operands[0].inner])
            return [_Padded(made, operands[0].ranges, operands[0].shape)]
        if name == "transpose":
            order = eqn.params["permutation"]
            ranges_, shape = operands[0].ranges, operands[0].shape
            made = lax.transpose(operands[0].inner, order)
            return [_Padded(made, tuple(ranges_[d] for d in order), tuple(shape[d] for d in order))]
        return None

    def smaller(self, eqn: Any, operands: list[Any], ranges: dict[Any, Any]) -> list[Any]:
        """What is read of a result only, of smaller operands."""
        name, wanted = eqn.primitive.name, ranges[eqn.outvars[0]]
        if name == "slice":
            return operands
        if name in _SAME:
            return bind(eqn, operands)
        taken = _operand_ranges(eqn, wanted)
        pieces = [_cut(_whole(x), r) for x, r in zip(operands, taken, strict=True)]
        before = [v.aval.shape for v in eqn.invars]
        made = tuple(b - a for a, b in wanted)
        local = [jnp.shape(x) for x in pieces]
        return bind(eqn, pieces, dict(local_params(name, eqn.params, before, local, [made])))


_SAME = ("convert_element_type", "copy", "neg")
_ALONG = ("dot_general", *_SAME)
_EXPANDS = 2


def _whole(x: Any) -> Any:
    return x.whole() if isinstance(x, _Padded) else x


def _cut(x: Any, ranges: Sequence[Range]) -> Any:
    if all(r == (0, n) for r, n in zip(ranges, jnp.shape(x), strict=True)):
        return x
    return lax.slice(x, [a for a, _ in ranges], [b for _, b in ranges])


def _expands(eqn: Any) -> bool:
    if eqn.primitive.name != "dot_general":
        return False
    left, right, made = (np.prod(v.aval.shape) for v in (*eqn.invars, *eqn.outvars))
    return bool(made >= _EXPANDS * (left + right))


def _read_of(jaxpr: Any) -> dict[Any, tuple[Range, ...]]:
    """By variable, what is read of it: of those on the way from an expanding product to a slice."""
    readers: dict[Any, list[Any]] = {}
    for eqn in jaxpr.eqns:
        for v in eqn.invars:
            if not isinstance(v, Literal):
                readers.setdefault(v, []).append(eqn)
    given = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    out: dict[Any, tuple[Range, ...]] = {}
    for eqn in jaxpr.eqns:
        if not _expands(eqn):
            continue
        way, v = [eqn.outvars[0]], eqn.outvars[0]
        while len(readers.get(v, ())) == 1 and v not in given:
            (reader,) = readers[v]
            v = reader.outvars[0]
            way.append(v)
            if reader.primitive.name == "slice" and reader.params["strides"] is None:
                starts, ends = reader.params["start_indices"], reader.params["limit_indices"]
                out.update(dict.fromkeys(way, tuple(zip(starts, ends, strict=True))))
                break
            if reader.primitive.name not in _SAME:
                break
    return out


def _dims(eqn: Any) -> tuple[list[int | None], list[int | None]]:
    """Of a product: by dim of each operand the result's, None for those that are summed."""
    (left_sum, right_sum), (left_both, right_both) = eqn.params["dimension_numbers"]
    left: list[int | None] = [None] * len(eqn.invars[0].aval.shape)
    right: list[int | None] = [None] * len(eqn.invars[1].aval.shape)
    for d, (a, b) in enumerate(zip(left_both, right_both, strict=True)):
        left[a] = right[b] = d
    at = len(left_both)
    for side, gone in ((left, {*left_sum, *left_both}), (right, {*right_sum, *right_both})):
        for d in range(len(side)):
            if d not in gone:
                side[d] = at
                at += 1
    return left, right


def _operand_ranges(eqn: Any, wanted: Sequence[Range]) -> list[list[Range]]:
    """What of a product's operands makes these ranges of its result."""
    return [
        [(0, n) if d is None else wanted[d] for d, n in zip(dims, v.aval.shape, strict=True)]
        for dims, v in zip(_dims(eqn), eqn.invars, strict=True)
    ]


def _padded(eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """A value with zeros around, if that is what it is."""
    x, value = operands
    config, shape = eqn.params["padding_config"], eqn.outvars[0].aval.shape
    zero = isinstance(eqn.invars[1], Literal) and not np.any(np.asarray(eqn.invars[1].val))
    if not zero or any(a < 0 or b < 0 or inner for a, b, inner in config) or not _is_float(x):
        return None
    del value
    ranges = tuple((a, n - b) for (a, b, _), n in zip(config, shape, strict=True))
    return [_Padded(_whole(x), ranges, shape)]


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(_whole(x).dtype, jnp.floating))


def _product_of_padded(eqn: Any, operands: Sequence[Any], k: int) -> Any:
    """A product one of whose operands has zeros around it."""
    padded, dims = operands[k], _dims(eqn)
    (sums, both) = eqn.params["dimension_numbers"]
    other = [(0, n) for n in eqn.invars[1 - k].aval.shape]
    for pairs in (sums, both):
        for mine, theirs in zip(pairs[k], pairs[1 - k], strict=True):
            other[theirs] = padded.ranges[mine]
    pieces = list(operands)
    pieces[k], pieces[1 - k] = padded.inner, _cut(operands[1 - k], other)
    (made,) = bind(eqn, pieces)
    shape = eqn.outvars[0].aval.shape
    ranges: list[Range] = [(0, n) for n in shape]
    for d, at in enumerate(dims[k]):
        if at is not None:
            ranges[at] = padded.ranges[d]
    if all(r == (0, n) for r, n in zip(ranges, shape, strict=True)):
        return made
    return _Padded(made, tuple(ranges), shape)
