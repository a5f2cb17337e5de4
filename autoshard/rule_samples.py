"""Which equations do we try the rules on?  Small functions, each with one primitive to look at.

The samples serve three readers: the comparison with Shardy, the numeric oracle (both under
`tests/autoshard`) and the table of rules in `docs/rules.md` (`autoshard.rules_doc`). Lengths are
small, differ from dim to dim and are even where a dim may be split.

>>> sample = Sample("exp", "", lax.exp, (f32(4, 6),))
>>> equation(sample).primitive.name
'exp'
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.jax_compat import Literal, is_jaxpr, open_jaxpr

Spec = jax.ShapeDtypeStruct


@dataclass(frozen=True, slots=True)
class Sample:
    """A function and its arguments' types, for one equation in it.

    low, high: where its real arguments are drawn from. index_high: integer arguments lie below it.
    """

    primitive: str
    label: str
    function: Callable[..., Any]
    arguments: tuple[Spec, ...]
    low: float = 0.1
    high: float = 0.9
    index_high: int = 4

    def __str__(self) -> str:
        return f"{self.primitive}: {self.label}" if self.label else self.primitive


def f32(*shape: int) -> Spec:
    """The type of an array of 32-bit floats."""
    return Spec(shape, np.float32)


def i32(*shape: int) -> Spec:
    """The type of an array of 32-bit integers."""
    return Spec(shape, np.int32)


def u32(*shape: int) -> Spec:
    """The type of an array of unsigned 32-bit integers."""
    return Spec(shape, np.uint32)


def flags(*shape: int) -> Spec:
    """The type of an array of booleans."""
    return Spec(shape, np.bool_)


def c64(*shape: int) -> Spec:
    """The type of an array of complex numbers of two 32-bit floats."""
    return Spec(shape, np.complex64)


def keys(*shape: int, impl: str = "threefry2x32") -> Spec:
    """The type of an array of random keys."""
    key = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    return Spec(shape, key.dtype)


@cache
def equation(sample: Sample) -> Any:
    """The first equation of the sample's primitive; raises LookupError when there is none."""
    jaxpr = jax.jit(sample.function).trace(*sample.arguments).jaxpr
    for eqn in _equations(jaxpr):
        if eqn.primitive.name == sample.primitive:
            return eqn
    found = sorted({e.primitive.name for e in _equations(jaxpr)})
    raise LookupError(f"the sample {sample} has no such equation, only {', '.join(found)}")


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner jaxprs after the equation that holds them."""
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        yield eqn
        for value in eqn.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if is_jaxpr(part):
                    yield from _equations(part)


def arguments(sample: Sample, seed: int = 0) -> list[Any]:
    """Values for the sample's equation: one array (or key array) for each of its operands.

    Operands that the function itself fixes, such as the start value of a reduction, stay.
    """
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(v.val) if isinstance(v, Literal) else _draw(v.aval, sample, rng)
        for v in equation(sample).invars
    ]


def _draw(aval: Any, sample: Sample, rng: np.random.Generator) -> Any:
    shape = tuple(aval.shape)
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(jnp.zeros((), aval.dtype))
        return jax.random.split(jax.random.key(7, impl=impl), shape)
    kind = np.dtype(aval.dtype).kind
    if kind == "b":
        return jnp.asarray(rng.random(shape) < 0.5)
    if kind in "iu":
        return jnp.asarray(rng.integers(0, sample.index_high, shape), aval.dtype)
    drawn = rng.uniform(sample.low, sample.high, shape)
    if kind == "c":
        drawn = drawn + 1j * rng.uniform(sample.low, sample.high, shape)
    return jnp.asarray(drawn, aval.dtype)


def has(name: str) -> bool:
    """Whether this jax has a function `jax.lax.name`."""
    return hasattr(lax, name)
