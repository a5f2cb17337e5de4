"""Functions over time axes, how far their numbers are from others, and random programs to try."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.time_axes import begun, in_steps_of
from autoshard.trace import trace
from passes.ir.plan import TimeAxis


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape) * 0.3, "f4")


def near(got: Any, want: Any, tolerance: float = 2e-4) -> bool:
    def one(x: Any, y: Any) -> bool:
        most = tolerance * (0.1 + float(jnp.abs(y).max(initial=0.0)))
        return x.shape == y.shape and x.dtype == y.dtype and bool(jnp.allclose(x, y, 0, most))

    assert jax.tree.structure(got) == jax.tree.structure(want)
    return all(jax.tree.leaves(jax.tree.map(one, got, want)))


def cut(
    fn: Callable[..., Any], args: Sequence[Any], *axes: TimeAxis
) -> tuple[Callable[..., Any], str]:
    """The function over time axes, and what is said of them."""
    traced, said = trace(fn, *args), []
    made = fn
    for each in reversed([begun(traced, axis) for axis in axes]):
        made, notes = in_steps_of(fn, traced, each, {})
        traced = trace(made, *args)
        said += notes
    return made, "\n".join(said)


# Random programs: steps over a growing pool of arrays. A step that does not apply is left out.

PLACES = jnp.asarray([3, 1, 4, 1, 5, 0, 2, 3])
Step = Callable[[Any, Any], Any]


def product(a: Any, b: Any) -> Any:
    if not a.ndim or b.ndim != 2 or b.shape[0] != b.shape[1]:
        return None
    return jnp.tanh(a @ b) if a.shape[-1] == b.shape[0] else None


def product_over_rows(a: Any, b: Any) -> Any:
    return a.T @ b / 4 if a.ndim == b.ndim == 2 and len(a) == len(b) else None


def products_side_by_side(a: Any, b: Any) -> Any:
    return jnp.einsum("bij,bkj->bik", a, b) if a.ndim == 3 and a.shape == b.shape else None


def outer(a: Any, b: Any) -> Any:
    return jnp.einsum("i...,j->ij...", a, b[:3]) if 0 < a.ndim < 3 and b.ndim == 1 else None


def add(a: Any, b: Any) -> Any:
    return a + jnp.sin(b) if a.shape == b.shape else a * jnp.cos(b).mean()


def over(dim: int, what: Callable[..., Any]) -> Step:
    def step(a: Any, b: Any) -> Any:
        return what(a, axis=dim) if dim < a.ndim else None

    step.__name__ = f"{what.__name__}_over_{dim}"
    return step


def softmax(a: Any, axis: int) -> Any:
    return jax.nn.softmax(a, axis)


def less_its_mean(a: Any, axis: int) -> Any:
    return a - a.mean(axis, keepdims=True)


def largest(a: Any, axis: int) -> Any:
    """Gradients of a maximum look for values equal to it. Where XLA:CPU computes them once more,
    in another fusion, none is: then plain jit divides by zero."""
    return lax.stop_gradient(a.max(axis)) * jnp.sin(a).mean(axis)


def total(a: Any, axis: int) -> Any:
    return a.sum(axis)


def chosen(a: Any, axis: int) -> Any:
    return jnp.take(a, PLACES % a.shape[axis], axis)


def by_places(a: Any, axis: int) -> Any:
    return jnp.take_along_axis(a, jnp.argsort(a, axis), axis)


def shifted(a: Any, axis: int) -> Any:
    return a + jnp.roll(a, 1, axis)


def first_half(a: Any, axis: int) -> Any:
    return lax.slice_in_dim(a, 0, a.shape[axis] // 2, axis=axis) if a.shape[axis] > 1 else None


def sums_by_segment(a: Any, axis: int) -> Any:
    return jax.ops.segment_sum(a, PLACES[: len(a)] % 4, 4) if axis == 0 and len(a) < 9 else None


def carried(a: Any, axis: int) -> Any:
    """A scan along a dim."""
    moved = jnp.moveaxis(a, axis, 0)
    last, all_of_them = lax.scan(lambda c, x: (0.5 * c + x, jnp.sin(c)), moved[0] * 0, moved)
    return last + all_of_them.mean(0)


def each_by_itself(a: Any, axis: int) -> Any:
    return jax.vmap(lambda row: jnp.tanh(row) * jnp.cos(row).sum(), axis, axis)(a)


def transposed(a: Any, b: Any) -> Any:
    return jnp.moveaxis(a, 0, -1) if a.ndim > 1 else None


def merged(a: Any, b: Any) -> Any:
    return a.reshape(-1, *a.shape[2:]) if a.ndim > 1 else None


def apart(a: Any, b: Any) -> Any:
    return a.reshape(*a.shape[:-1], 2, -1) if 0 < a.ndim < 4 and a.shape[-1] % 2 == 0 else None


def dropped(a: Any, b: Any) -> Any:
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.7, a.shape), a, 0)


def chosen_branch(a: Any, b: Any) -> Any:
    return lax.cond(PLACES[0] > 2, lambda x: jnp.sin(x) + 1, lambda x: x * 2, a)


MOVES = (jnp.flip, jnp.cumsum, jnp.sort)
ALONG = (*MOVES, softmax, less_its_mean, largest, total, chosen, by_places, shifted, first_half)
ALONG = (*ALONG, carried, each_by_itself, sums_by_segment)
STEPS: tuple[Step, ...] = (product, product_over_rows, products_side_by_side, outer, add)
STEPS = (*STEPS, transposed, merged, apart, dropped, chosen_branch)
STEPS = (*STEPS, *[over(d, what) for what in ALONG for d in range(3)])
ARGS = (numbers(4, 8, 6), numbers(6, 6), numbers(8, seed=1), numbers(8, 6, seed=2))


def program(taken: Sequence[tuple[Step, int, int]], grad: bool, first: int) -> Callable[..., Any]:
    """first: the argument that the first step is likely to take."""

    def run(*args: Any) -> Any:
        pool = [*args[first + 1 :], *args[: first + 1]]
        for step, i, j in taken:
            a, b = pool[-1 - i % len(pool)], pool[-1 - j % len(pool)]
            made = step(a, b)
            if made is not None and made.size and made.ndim <= 4 and made.size < 5000:
                pool.append(made)
        return pool[len(args) :] or [args[first] * 2]

    def loss(*args: Any) -> Any:
        return sum((x**2).mean() for x in run(*args))

    return (lambda *args: (jax.value_and_grad(loss, range(4))(*args), run(*args))) if grad else run
