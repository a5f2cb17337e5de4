"""Does the planned function give the numbers of the plain one?  Both run, from the same arguments.

At every step plain `jax.jit` on one device starts from what the planned function has come to, so
that differences do not pile up: training is chaotic, and a harmless change of rounding would show
after a hundred steps. Arguments that are only shapes are filled with small numbers.

How far apart may two roundings of one result lie? At most as far as its type suggests, for most. A
train step in bf16 over f32 returns f32 with the noise of bf16, though, and a gradient that is 0 but
for rounding (of the bias of attention's keys, which softmax takes out) is nothing but noise. So
plain `jax.jit` also runs on arguments moved by one rounding of the coarsest type it computes in;
what that changes, a harmless difference may be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from autoshard.jax_compat import open_jaxpr

# Relative to an array's largest element: sums are made in another order.
_TOLERANCES = {8: 1e-8, 4: 1e-3, 2: 5e-2, 1: 0.25}

# How many times a result may differ by what one rounding of the arguments makes of it.
_MARGIN = 4.0


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference of one result over all steps, relative to its largest element.

    finite: whether it has no NaN and no infinity; where both have the same ones they agree.
    """

    path: str
    type: str
    largest: float
    tolerance: float
    finite: bool

    @property
    def ok(self) -> bool:
        """Whether it is within the tolerance."""
        return self.largest <= self.tolerance


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences, the worst first, and seconds of a step (the median, without the first)."""

    differences: tuple[Difference, ...]
    sharded_seconds: float
    plain_seconds: float

    @property
    def ok(self) -> bool:
        """Whether every result is within its tolerance."""
        return all(d.ok for d in self.differences)


def compare(
    fn: Callable[..., Any],
    sharded: Callable[..., Any],
    args: Sequence[Any],
    state: Sequence[tuple[int, int]],
    steps: int,
    tolerance: float | None = None,
    tell: Callable[[str], None] | None = None,
) -> Comparison:
    """Run fn and its sharded form side by side.

    state: (argument, result) places in flattened order; the result becomes the argument of the next
    step. tolerance: for all results; None for one that suits each dtype, or the result's own
    sensitivity to rounding where that is more.
    """
    flat, tree = jax.tree.flatten(tuple(args))
    device = jax.devices()[0]
    plain = jax.jit(fn)
    unit = rounding(fn, args)
    worst: dict[int, float] = {}
    noise: dict[int, float] = {}
    seconds: list[tuple[float, float]] = []
    outs: list[tuple[Any, Any]] = []
    for step in range(steps):
        if tell:
            tell(f"step {step + 1} of {steps}")
        # Copies: the sharded step may take its arguments' memory.
        here = [_copied(x, device) for x in flat]
        result, ours = _timed(sharded, jax.tree.unflatten(tree, flat))
        expected, theirs = _timed(plain, jax.tree.unflatten(tree, here))
        seconds.append((ours, theirs))
        outs = jax.tree_util.tree_leaves_with_path(result)
        gaps = _gaps([x for _, x in outs], expected)
        worst = {k: max(worst.get(k, 0.0), gap) for k, gap in enumerate(gaps)}
        if tolerance is None and any(
            gap > _allowed(x.dtype) for gap, (_, x) in zip(gaps, outs, strict=True)
        ):
            shaken = _noise(lambda flat: plain(*jax.tree.unflatten(tree, flat)), here, unit)
            noise = {k: max(noise.get(k, 0.0), gap) for k, gap in enumerate(shaken)}
        for argument, given in state:
            flat[argument] = outs[given][1]
    found = [
        _difference(path, x, worst[k], tolerance, noise.get(k, 0.0))
        for k, (path, x) in enumerate(outs)
    ]
    found.sort(key=lambda d: (d.ok, -d.largest / d.tolerance if d.tolerance else -d.largest))
    medians = np.median(seconds[1:] or seconds, axis=0)
    return Comparison(tuple(found), float(medians[0]), float(medians[1]))


def _gaps(ours: Any, theirs: Any) -> list[float]:
    """The difference of each array of two results."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return [difference(_host(x), _host(y)) for x, y in pairs]


def _noise(run: Callable[[list[Any]], Any], flat: list[Any], unit: float) -> list[float]:
    """How far each result moves when every argument is rounded up or down.

    A result that differs from itself is no function of the arguments: that is not rounding.
    """
    once, again, moved = run(flat), run(flat), run([_moved(x, unit) for x in flat])
    own = zip(jax.tree.leaves(once), _gaps(once, again), _gaps(moved, once), strict=True)
    return [0.0 if differs > _allowed(x.dtype) else gap for x, differs, gap in own]


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference relative to the largest element; infinite where only one is finite.

    >>> difference(np.array([1.0, 2.0]), np.array([1.0, 2.5]))
    0.2
    """
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return math.inf
    if not np.issubdtype(ours.dtype, np.number) and not jnp.issubdtype(ours.dtype, jnp.number):
        return float(bool(np.any(ours != theirs)))
    wide = np.complex128 if jnp.issubdtype(ours.dtype, jnp.complexfloating) else np.float64
    a, b = ours.astype(wide), theirs.astype(wide)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return math.inf
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return math.inf
    gap = float(np.max(np.abs(a[finite] - b[finite]), initial=0.0))
    return gap / max(float(np.max(np.abs(b[finite]), initial=0.0)), 1e-30) if gap else 0.0


def rounding(fn: Callable[..., Any], args: Sequence[Any]) -> float:
    """Spacing of the numbers around 1 in the coarsest floating type fn computes in, at least f32's.

    That of bf16 at most: what is rounded to fewer bits than that is scaled to use them well.

    >>> rounding(lambda x: jnp.sin(x.astype(jnp.bfloat16)).sum(), [jnp.ones(3)])
    0.0078125
    """
    coarsest = _spacing(jnp.float32)
    rest = [jax.jit(fn).trace(*args).jaxpr]
    while rest:
        for eqn in open_jaxpr(rest.pop())[0].eqns:
            rest += jaxprs_in_params(eqn.params)
            for v in eqn.outvars:
                dtype = getattr(v.aval, "dtype", None)
                if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                    coarsest = max(coarsest, _spacing(dtype))
    return min(coarsest, _spacing(jnp.bfloat16))


def _spacing(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def fill(args: Any) -> Any:
    """The same arguments with arrays in place of shapes: numbers in [0, 0.1), integers 0 or 1."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: _numbers(rng, x) if isinstance(x, jax.ShapeDtypeStruct) else x, args
    )


def _numbers(rng: np.random.Generator, x: jax.ShapeDtypeStruct) -> Any:
    """Never negative, so that an optimizer's second moments have a root; never out of bounds."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        keys = jax.random.split(jax.random.key(0, impl=_implementation(x.dtype)), x.size)
        return keys.reshape(x.shape)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return (rng.random(x.shape) * 0.1).astype(x.dtype)
    return rng.integers(0, 2, x.shape).astype(x.dtype)


def _implementation(dtype: Any) -> str:
    """`fry` in `key<fry>` stands for the generator threefry2x32, and so on."""
    names = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}
    return names.get(str(dtype).removeprefix("key<").rstrip(">"), "threefry2x32")


def _copied(x: Any, device: jax.Device) -> Any:
    """A copy on one device, of the same type."""
    if isinstance(x, bool | int | float | complex):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        bits = jax.device_put(_host(x), device)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))
    if getattr(x, "weak_type", False) and x.ndim == 0:
        return x.item()  # through numpy it would lose its weak type
    return jax.device_put(_host(x), device)


def _moved(x: Any, unit: float) -> Any:
    """An array of floating numbers with each of them rounded up or down; anything else as it is."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    signs = np.random.default_rng(0).choice([-0.5, 0.5], x.shape)
    moved = (np.asarray(x, np.float64) * (1 + unit * signs)).astype(x.dtype)
    return jax.device_put(moved, x.sharding)


def _host(x: Any) -> Any:
    """A copy in host memory; keys of random generators as their bits."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.array(jax.random.key_data(x))
    return np.array(x)


def _timed(step: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    out = jax.block_until_ready(step(*args))
    return out, time.perf_counter() - start


def _difference(
    path: Any, x: Any, largest: float, tolerance: float | None, noise: float
) -> Difference:
    dtype = x.dtype
    allowed = tolerance
    if allowed is None:
        allowed = _allowed(dtype)
        if jnp.issubdtype(dtype, jnp.inexact):
            allowed = max(allowed, _MARGIN * noise)
    finite = not jnp.issubdtype(dtype, jnp.inexact) or bool(jnp.isfinite(x).all())
    return Difference(f"result{jax.tree_util.keystr(path)}", _type(x), largest, allowed, finite)


def _allowed(dtype: Any) -> float:
    """The tolerance that suits a dtype."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 0.0
    parts = 2 if jnp.issubdtype(dtype, jnp.complexfloating) else 1
    return _TOLERANCES.get(np.dtype(dtype).itemsize // parts, 0.25)


def _type(x: Any) -> str:
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"
