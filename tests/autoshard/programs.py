"""One small function for everything that jax.jit takes; test_trace and test_lower share them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

CONSTANT = np.linspace(0.0, 1.0, 16, dtype=np.float32)


@dataclass(frozen=True)
class Case:
    """A function, its arguments, and what its graph has to hold.

    ops: names of operations that must be there; regions: kinds of regions, in order. mesh: one the
    function demands.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    ops: frozenset[str] = frozenset()
    regions: tuple[str, ...] = ()
    donate: tuple[int, ...] = ()
    mesh: Mapping[str, int] | None = None


CASES: dict[str, Case] = {}


def numbers(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Any:
    """Random numbers between -1 and 1; small integers for an integer dtype."""
    rng = np.random.default_rng([seed, *shape])
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (rng.uniform(-1, 1, shape) + 1j * rng.uniform(-1, 1, shape)).astype(dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
        return rng.uniform(-1, 1, shape).astype(dtype)
    return rng.integers(0, 2 if dtype in (bool, np.bool_) else 8, shape).astype(dtype)


X = numbers(8, 16)
W = numbers(16, 16, seed=1)
STACK = numbers(4, 16, 16, seed=2)


def case(*args: Any, ops: str = "", **options: Any) -> Callable[[Any], Any]:
    def add(fn: Any) -> Any:
        CASES[fn.__name__] = Case(fn, args, frozenset(ops.split()), **options)
        return fn

    return add


# Differentiation and other transformations


@case(
    {"w1": W, "w2": numbers(16, 8, seed=3)},
    {"x": X, "y": numbers(8, 8, seed=4)},
    ops="dot_general tanh sub mul",
)
def train_step(params: Any, batch: Any) -> Any:
    def loss(params: Any) -> Any:
        hidden = jnp.tanh(batch["x"] @ params["w1"])
        return jnp.mean((hidden @ params["w2"] - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value


@case(X, W, ops="dot_general sin")
def vmapped(x: Any, w: Any) -> Any:
    return jax.vmap(lambda row: jnp.sin(row @ w).sum())(x)


@case(X, W, ops="dot_general cos mul add")
def jit_inside_jit(x: Any, w: Any) -> Any:
    @jax.jit
    def outer(x: Any) -> Any:
        inner = jax.jit(lambda y: jnp.cos(y) * 2.0)
        return inner(x) + inner(x @ w)

    return outer(x)


@jax.custom_jvp
def softsign(x: Any) -> Any:
    return x / (1.0 + jnp.abs(x))


@softsign.defjvp
def _softsign_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    return softsign(x), t / jnp.square(1.0 + jnp.abs(x))


@case(X, ops="abs div")
def custom_jvp(x: Any) -> Any:
    return softsign(x), jax.grad(lambda x: softsign(x).sum())(x)


@jax.custom_vjp
def clipped(x: Any) -> Any:
    return x * 2.0


clipped.defvjp(lambda x: (clipped(x), x), lambda x, g: (jnp.clip(g * x, -0.5, 0.5),))


@case(X, ops="mul")
def custom_vjp(x: Any) -> Any:
    return clipped(x), jax.grad(lambda x: (clipped(x) ** 2).sum())(x)


@case(X, W, ops="dot_general", regions=("remat",))
def remat(x: Any, w: Any) -> Any:
    @jax.checkpoint
    def block(x: Any) -> Any:
        return jnp.tanh(x @ w) @ w.T

    return jax.grad(lambda x: (block(x) ** 2).sum())(x)


# Control flow


@case(
    X, STACK, numbers(16, seed=5), ops="dot_general scan_slice scan_stack loop_enter loop_next",
    regions=("scan",),
)  # fmt: skip
def scan_layers(x: Any, stack: Any, bias: Any) -> Any:
    def layer(carry: Any, w: Any) -> Any:
        out = jnp.tanh(carry @ w + bias)
        return out, out.sum(axis=1)

    return lax.scan(layer, x, stack)


@case(X, STACK, ops="dot_general scan_slice scan_stack", regions=("scan",))
def scan_reversed_unrolled(x: Any, stack: Any) -> Any:
    return lax.scan(lambda c, w: (jnp.sin(c @ w), c), x, stack, reverse=True, unroll=2)


@case(X, STACK, ops="dot_general transpose", regions=("scan", "scan"))
def scan_grad(x: Any, stack: Any) -> Any:
    def loss(stack: Any) -> Any:
        return jnp.sum(lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, stack)[0] ** 2)

    return jax.grad(loss)(stack)


@case(X, STACK, ops="dot_general scan_slice scan_stack", regions=("scan", "scan", "remat"))
def scan_of_remat_grad(x: Any, stack: Any) -> Any:
    layer = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
    return jax.grad(lambda stack: jnp.sum(lax.scan(layer, x, stack)[0]))(stack)


@case(X, STACK.reshape(2, 2, 16, 16), ops="dot_general", regions=("scan", "scan"))
def nested_scan(x: Any, stack: Any) -> Any:
    def outer(carry: Any, ws: Any) -> Any:
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), c[0, 0]), carry, ws)

    return lax.scan(outer, x, stack)


@case(X, regions=("scan",))
def scan_without_xs(x: Any) -> Any:
    return lax.scan(lambda c, _: (c * 1.5, c.max()), x, None, length=3)


@case(X, ops="loop_enter loop_next", regions=("while_cond", "while_body"))
def while_loop(x: Any) -> Any:
    def go_on(state: Any) -> Any:
        return (state[1] < 5) & (jnp.abs(state[0]).sum() < 1e3)

    return lax.while_loop(go_on, lambda s: (s[0] * 1.5 + x, s[1] + 1), (x, 0))


@case(X, W, np.int32(3), ops="dot_general", regions=("while_cond", "while_body"))
def fori_loop(x: Any, w: Any, n: Any) -> Any:
    return lax.fori_loop(0, n, lambda i, c: jnp.tanh(c @ w) + i, x)


@case(X, W, np.float32(0.5), ops="dot_general branch_join", regions=("branch", "branch"))
def cond(x: Any, w: Any, flag: Any) -> Any:
    return lax.cond(flag > 0, lambda x: x @ w, lambda x: x * 2.0, x)


@case(X, np.int32(2), ops="branch_join sin cos", regions=("branch",) * 3)
def switch(x: Any, index: Any) -> Any:
    def both(x: Any) -> Any:
        return jnp.sin(x), jnp.cos(x)

    return lax.switch(index, [both, lambda x: (x, x), lambda x: (x * 2, -x)], x)


# Randomness, constants, effects


@case(jax.random.key(7), X, ops="random_bits random_split")
def random_keys(key: Any, x: Any) -> Any:
    first, second = jax.random.split(key)
    keep = jax.random.bernoulli(first, 0.5, x.shape)
    return jnp.where(keep, x, 0.0), jax.random.normal(second, (8, 4)), jax.random.split(second, 2)


@case(jax.random.PRNGKey(7), X, ops="random_wrap random_bits")
def raw_keys(key: Any, x: Any) -> Any:
    return x + jax.random.uniform(key, x.shape)


@case(X, ops="mul")
def closed_over(x: Any) -> Any:
    return x * CONSTANT + jnp.asarray(CONSTANT)[None, :]


@case(X, ops="add")
def prints(x: Any) -> Any:
    total = x.sum()
    jax.debug.print("total {}", total)
    return x + total


def _host(total: Any) -> Any:
    return np.float32(total * 2)


@case(X, ops="io_callback mul")
def calls_back(x: Any) -> Any:
    from jax.experimental import io_callback

    doubled = io_callback(_host, jax.ShapeDtypeStruct((), jnp.float32), x.sum(), ordered=False)
    return x * doubled


@case(X, ops="io_callback")
def calls_back_in_order(x: Any) -> Any:
    from jax.experimental import io_callback

    one = io_callback(_host, jax.ShapeDtypeStruct((), jnp.float32), x[0, 0], ordered=True)
    two = io_callback(_host, jax.ShapeDtypeStruct((), jnp.float32), one, ordered=True)
    return x * two


@case(X, ops="pure_callback")
def pure_callback(x: Any) -> Any:
    return jax.pure_callback(lambda x: np.asarray(x) * 2, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


# Buffers


@case(X, W, ops="dot_general", donate=(0,))
def donated(x: Any, w: Any) -> Any:
    return x @ w, x.sum()


@case((X, X + 1), X, X)
def outputs_that_are_inputs(pair: Any, same: Any, unused: Any) -> Any:
    del unused
    return pair[0], same, same, pair[1] * 2, pair[0]


@case(X, W, X, ops="dot_general")
def unused_arguments(x: Any, w: Any, nobody: Any) -> Any:
    del nobody
    dead = jnp.sin(x) @ w
    del dead
    return x @ w


@case(X)
def constant_result(x: Any) -> Any:
    return jnp.zeros((8, 8)), 3, x.shape[0], jnp.arange(16)


# Types and shapes


@case(numbers(8, 16, dtype=np.int32), numbers(8, 16, dtype=bool), ops="select_n and argmax")
def integers_and_booleans(i: Any, b: Any) -> Any:
    return jnp.where(b, i << 1, -i), (i > 2) & b, jnp.argmax(i, axis=1), i % 3, i.sum(), b.any(0)


@case(numbers(8, 16, dtype=np.complex64), ops="fft conj")
def complex_numbers(z: Any) -> Any:
    return jnp.conj(z) @ z.T, jnp.abs(z), jnp.fft.fft(z), z.real.sum()


@case(X.astype(jnp.bfloat16), W.astype(jnp.bfloat16), ops="dot_general tanh")
def bfloat16(x: Any, w: Any) -> Any:
    return jnp.tanh(x @ w), jnp.dot(x, w, preferred_element_type=jnp.float32).sum()


@case(X.astype(jnp.float8_e4m3fn), W.astype(jnp.float8_e5m2), ops="convert_element_type")
def float8(x: Any, w: Any) -> Any:
    return x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), x.T


@case(numbers(8, 16, dtype=np.int8), ops="dot_general")
def int8_product(x: Any) -> Any:
    return jnp.dot(x, x.T, preferred_element_type=jnp.int32)


@case(np.zeros((0, 16), np.float32), W, np.zeros((8, 0), np.float32))
def zero_size(x: Any, w: Any, y: Any) -> Any:
    return x @ w, x.sum(), jnp.concatenate([x, w]), y @ x[:, :4], y + 1


@case(np.float32(2.0), 3, 2.5, True)
def scalars(a: Any, b: Any, c: Any, d: Any) -> Any:
    return a * b, c + b, jnp.where(d, a, c), b, jnp.arange(8) * c


@case(numbers(7, 13), numbers(13, 5), ops="dot_general reduce_max")
def odd_sizes(x: Any, w: Any) -> Any:
    return jax.nn.softmax(x @ w), (x @ w).max(axis=0), x.T


@case(numbers(12, 6), numbers(6, 20), ops="dot_general cumsum sort")
def sizes_some_axes_divide(x: Any, w: Any) -> Any:
    y = x @ w
    return jnp.cumsum(y, axis=0), jnp.sort(y, axis=1), y.reshape(3, 4, 20), y.reshape(-1)


@case(numbers(32, 16), numbers(8, 4, dtype=np.int32), ops="gather scatter-add dot_general")
def embedding(table: Any, ids: Any) -> Any:
    def loss(table: Any) -> Any:
        return jnp.sum(jnp.square(table[ids] @ W))

    return jax.value_and_grad(loss)(table)


@case(numbers(8, 3, 16, 16), numbers(4, 3, 3, 3), ops="conv_general_dilated reduce_window_max")
def convolution(x: Any, kernel: Any) -> Any:
    y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME")
    return lax.reduce_window(y, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


@case(W, numbers(16, 8, seed=9), ops="lu triangular_solve")
def solve(a: Any, b: Any) -> Any:
    return jnp.linalg.solve(a + 4 * jnp.eye(16), b)


@case(numbers(4, 8, 4, 16), numbers(4, 8, 4, 16, seed=1), numbers(4, 8, 4, 16, seed=2))
def attention(q: Any, k: Any, v: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


@case(X, W, ops="shard_map tanh", mesh={"data": 4, "model": 2})
def manual(x: Any, w: Any) -> Any:
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))

    def body(x: Any, w: Any) -> Any:
        return lax.psum(x @ w, "model")

    run = jax.shard_map(
        body, mesh=mesh, in_specs=(P("data", "model"), P("model", None)), out_specs=P("data", None)
    )
    return jnp.tanh(run(x * 2, w)) + 1
