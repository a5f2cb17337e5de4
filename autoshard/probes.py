"""Which small programs tell how fast the devices are?  Loops that every device runs at once.

All devices work at the same time, as they do in a sharded program: virtual devices share the cores
and the memory of one machine, and what one of them reaches alone is of no use. A step of a loop
depends on the step before, so that no compiler leaves one out or runs two at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from autoshard.measure import Probe
from cost_models.collectives import Collective

Body = Callable[[jax.Array], Any]
Elementwise = Callable[[jax.Array], jax.Array]

_ALL = P(("group", "member"))


def product(devices: Sequence[Any], rows: int, size: int, dtype: str) -> Probe:
    """A matrix of so many rows times a square one; a step is 2 * rows * size**2 FLOP a device.

    size: a power of two.
    """
    name = f"{dtype} product of {rows} x {size} x {size}"
    return _probe(name, devices, 1, (rows, size), jnp.dot, dtype, [_hadamard(size)])


def _hadamard(size: int) -> np.ndarray:
    """Two products with it give back what was there, so that no number ever grows or vanishes."""
    out = np.ones((1, 1), np.float32)
    while len(out) < size:
        out = np.block([[out, out], [out, -out]])
    return out / np.float32(np.sqrt(size))


def stream(devices: Sequence[Any], nbytes: int) -> Probe:
    """`x + 1` on an array of float32; a step reads it once and writes it once."""
    return _probe(f"stream of {nbytes >> 10} KiB", devices, 1, (nbytes // 4,), _add_one)


def chain(devices: Sequence[Any], elements: int, function: Elementwise) -> Probe:
    """A function of each element, one after the other; what is between them stays in registers."""
    name = f"{function.__name__} of {elements} elements"
    return _probe(name, devices, 1, (elements,), function)


def activation(x: jax.Array) -> jax.Array:
    """Functions that a vector unit evaluates in many instructions."""
    return jnp.tanh(jnp.exp(-x) - 0.5) + 0.1 * x


def polynomial(x: jax.Array) -> jax.Array:
    """Products and sums, as an optimizer's update has; x comes near 1."""
    for _ in range(8):
        x = x * 0.5 + 0.5
    return x


def kernels(devices: Sequence[Any], count: int) -> Probe:
    """So many operations on 4,096 numbers each, that are not allowed to become one."""

    def body(x: jax.Array) -> Any:
        for _ in range(count):
            x = lax.optimization_barrier(x + 1)
        return x

    return _probe(f"{count} small operations", devices, 1, (4096,), body)


def collective(devices: Sequence[Any], kind: Collective, group: int, nbytes: int) -> Probe:
    """One collective in every group of so many neighbours at once.

    nbytes: of the larger of its operand and its result on one device, as cost_models counts.
    """
    name = f"{kind.replace('_', '-')} of {nbytes >> 10} KiB over {group}"
    return _probe(name, devices, group, (nbytes // 4,), _BODIES[kind](group))


def _add_one(x: jax.Array) -> jax.Array:
    return x + 1


def _all_gather(group: int) -> Body:
    return lambda x: lax.all_gather(x[: x.size // group], "member", tiled=True)


def _reduce_scatter(group: int) -> Body:
    def body(x: jax.Array) -> Any:
        part = lax.psum_scatter(x, "member", scatter_dimension=0, tiled=True)
        return lax.dynamic_update_slice(x, part / group, (0,))

    return body


def _all_reduce(group: int) -> Body:
    return lambda x: lax.psum(x, "member")


def _all_to_all(group: int) -> Body:
    def body(x: jax.Array) -> Any:
        return lax.all_to_all(x.reshape(group, -1), "member", 0, 0, tiled=True).reshape(x.shape)

    return body


def _permute(group: int) -> Body:
    ring = [(i, (i + 1) % group) for i in range(group)]
    return lambda x: lax.ppermute(x, "member", ring)


_BODIES: dict[Collective, Callable[[int], Body]] = {
    "all_gather": _all_gather, "reduce_scatter": _reduce_scatter, "all_reduce": _all_reduce,
    "all_to_all": _all_to_all, "permute": _permute,
}  # fmt: skip
# Those that can be measured: `jax.lax` has no broadcast.
KINDS = tuple(_BODIES)


def _probe(
    name: str,
    devices: Sequence[Any],
    group: int,
    shape: tuple[int, ...],
    body: Callable[..., Any],
    dtype: str = "float32",
    constants: Sequence[np.ndarray] = (),
) -> Probe:
    """A loop of `body` on an array of this shape on each device, and on constants.

    Two steps make a turn: the second writes where the first one read, so that nothing has to be
    copied from one turn to the next.
    """
    grid = np.array(devices, dtype=object).reshape(-1, group)
    mesh = Mesh(grid, ("group", "member"), axis_types=(AxisType.Auto,) * 2)
    split, whole = NamedSharding(mesh, _ALL), NamedSharding(mesh, P())

    def local(turns: jax.Array, x: jax.Array, *rest: jax.Array) -> Any:
        def turn(_: int, x: jax.Array) -> Any:
            return body(lax.optimization_barrier(body(x, *rest)), *rest)

        return lax.fori_loop(0, turns, turn, x[0])[None]

    rest = [jax.device_put(jnp.asarray(c, dtype), whole) for c in constants]
    # Random, since zeros take less power, and clocks rise. Sums may overflow, which costs no time.
    normal = partial(jax.random.normal, shape=(len(devices), *shape), dtype=dtype)
    state = [jax.jit(normal, out_shardings=split)(jax.random.key(0))]
    specs = (P(), _ALL, *(P() for _ in rest))
    everywhere = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=_ALL, check_vma=False)
    none = jax.device_put(np.int32(0), whole)
    # Each run goes on where the one before has ended, so that none has to copy what it starts from.
    compiled = jax.jit(everywhere, donate_argnums=1).lower(none, *state, *rest).compile()

    def run(turns: int) -> None:
        count = none if turns == 0 else jax.device_put(np.int32(turns), whole)
        state[0] = jax.block_until_ready(compiled(count, *state, *rest))

    return Probe(name, run, steps=2)
