"""What did the published systems train?  GPT in plain jax, split by the plan that a paper tells.

A model is layers under `lax.scan`: layer norm, attention, gelu, biases, learned positions, a tied
embedding; mixed precision as those systems had it, and Adam. What stands in a paper's plan is
annotated: the batch on `data`, heads and hidden features on `model` (Megatron, arXiv 1909.08053),
the sequence too between them (sequence parallelism, arXiv 2205.05198), parameters split over `data`
and gathered for use (FSDP).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import autoshard

Tree = dict[str, Any]
Job = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]  # function, arguments, hints

# Dims of each parameter of a layer: `column` and `row` are split by tensor parallelism.
LAYER: dict[str, tuple[str, ...]] = {
    "scale1": ("width",),
    "bias1": ("width",),
    "wqkv": ("width", "three", "heads", "feature"),
    "bqkv": ("three", "heads", "feature"),
    "wo": ("heads", "feature", "width"),
    "bo": ("width",),
    "scale2": ("width",),
    "bias2": ("width",),
    "w1": ("width", "hidden"),
    "b1": ("hidden",),
    "w2": ("hidden", "width"),
    "b2": ("width",),
}
OUTSIDE: dict[str, tuple[str, ...]] = {
    "embed": ("vocab", "width"),
    "position": ("sequence", "width"),
    "scale": ("width",),
    "bias": ("width",),
}
ROWS = "rows"  # names what layer norm keeps of each row
TENSOR = ("heads", "hidden", "vocab")  # what Megatron splits


@dataclass(frozen=True, slots=True)
class Gpt:
    """A model and how it is trained.

    dropout: of attention and of both branches, 0 for none. recompute: of each layer in its backward
    pass nothing, all, or the core of attention. plan: how it is split; "megatron+sp" with sequence
    parallelism, "zero2" with the optimizer's state split, "fsdp" with the parameters too; "longest"
    splits each parameter along its longest dim, and says no more; "free" says nothing. copied:
    whether a narrow copy of the parameters is kept beside those in float32, or made in each step.
    fused_loss: whether the cross entropy is one kernel. compiled: whether the system was a
    compiler, that fuses what it likes; the others run the kernels they are told to, between
    barriers here.
    """

    layers: int
    width: int
    heads: int
    sequence: int
    vocab: int
    dtype: str = "float16"
    dropout: float = 0.0
    recompute: Literal["none", "full", "selective"] = "none"
    plan: Literal["megatron", "megatron+sp", "zero2", "fsdp", "longest", "free"] = "megatron"
    copied: bool = True
    fused_loss: bool = False
    compiled: bool = False

    @property
    def kernels(self) -> bool:
        """Whether it ran Megatron's own kernels for layer norm, bias with gelu, and softmax."""
        return not self.compiled and self.plan in ("megatron", "megatron+sp", "free")

    def size(self, dim: str) -> int:
        """How long a dim of this name is."""
        sizes = {
            "width": self.width,
            "three": 3,
            "heads": self.heads,
            "feature": self.width // self.heads,
            "hidden": 4 * self.width,
            "vocab": self.vocab,
            "sequence": self.sequence,
        }
        return sizes[dim]

    def spec(self, dims: tuple[str, ...], split: bool) -> tuple[str | None, ...]:
        """Along which mesh axis each dim of a parameter lies.

        split: over `data` too, at rest, along the longest dim that is divisible by any number of
        devices up to 128; a bias without one stays whole.
        """
        longest = self.plan == "longest"
        axes = ["model" if d in TENSOR and not longest else None for d in dims]
        split = split or longest
        free = [k for k, d in enumerate(dims) if axes[k] is None and self.size(d) % 128 == 0]
        if split and free:
            axes[max(free, key=lambda k: self.size(dims[k]))] = "data"
        return tuple(axes)

    def parameters(self, dtype: str) -> Tree:
        """All of them, as shapes; those of the layers stacked."""

        def shape(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, dtype)

        layers = {n: shape(self.layers, *map(self.size, dims)) for n, dims in LAYER.items()}
        return {"layers": layers} | {n: shape(*map(self.size, dims)) for n, dims in OUTSIDE.items()}

    def hints(self, prefix: str, split: bool) -> dict[str, Any]:
        """Where the parameters lie, or what is stored for each of them."""
        P = jax.sharding.PartitionSpec
        out = {f"{prefix}/{n}": P(*self.spec(dims, split)) for n, dims in OUTSIDE.items()}
        for n, dims in LAYER.items():
            out[f"{prefix}/layers/{n}"] = P(None, *self.spec(dims, split))
        return out


def annotate(model: Gpt, x: jax.Array, *spec: str | None) -> jax.Array:
    """Split as the plan says, where it says more than where parameters lie."""
    return x if model.plan in ("longest", "free") else autoshard.annotate(x, *spec)


# The forward pass


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """In float32."""
    wide = x.astype(jnp.float32)
    mean = checkpoint_name(jnp.mean(wide, axis=-1, keepdims=True), ROWS)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True) - jnp.square(mean)
    normed = (wide - mean) * checkpoint_name(jax.lax.rsqrt(variance + 1e-5), ROWS)
    return normed.astype(x.dtype) * scale + bias


def without(
    x: jax.Array, share: float, seed: jax.Array, lay: Callable[..., jax.Array], onto: Any = 0
) -> jax.Array:
    """With dropout where there is some, and added to `onto`. lay: how x lies, and its mask."""
    return dropped(x, share, seed, lay, onto) if share else x + onto


def dropped(
    x: jax.Array, share: float, seed: jax.Array, lay: Callable[..., jax.Array], onto: Any = 0
) -> jax.Array:
    """Without a share of its elements, which a hash of their places picks, and added to `onto`.

    The hash stands for the generators of GPU libraries (Philox of four words, some 25 operations
    for a number); jax's own costs a hundred. What is kept is stored for the backward pass, a byte
    for an element, as torch does; XLA would draw it again.
    """
    place = jnp.zeros((1,) * x.ndim, jnp.uint32) + seed
    for d in range(x.ndim):
        place = place * jnp.uint32(0x9E3779B1) + along(x, d, seed)
    for by in (0x85EBCA6B, 0xC2B2AE35):
        place = (place ^ (place >> 16)) * jnp.uint32(by)
    keep = lay(place > jnp.uint32(share * 2**32))
    zero = jnp.zeros((), x.dtype)
    return together(jnp.where(keep, x * jnp.asarray(1 / (1 - share), x.dtype), zero) + onto, keep)


@jax.custom_vjp
def together(x: jax.Array, mask: jax.Array) -> jax.Array:
    """What one kernel writes, and the mask beside it; another kernel reads it."""
    return jax.lax.optimization_barrier((x, mask))[0]


together.defvjp(
    lambda x, mask: (together(x, mask), None),
    lambda _, dx: (jax.lax.optimization_barrier(dx), None),
)


def along(x: jax.Array, dim: int, seed: jax.Array) -> jax.Array:
    """Places along a dim of x, to be broadcast.

    They wait for the seed, which changes nothing: what is the same for all layers jax would make
    once, as large as x, and hand to the loop.
    """
    places = jnp.arange(x.shape[dim], dtype=jnp.uint32) + jnp.minimum(seed, 0)
    return places.reshape([-1 if d == dim else 1 for d in range(x.ndim)])


def kernel(model: Gpt, x: jax.Array) -> jax.Array:
    """The result of a kernel of its own, where the system did not fuse what follows."""
    return x if model.compiled else jax.lax.optimization_barrier(x)


def fused(model: Gpt, fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A kernel of its own for layer norm, and for bias and gelu: it keeps what it was given.

    Of layer norm each row's mean and deviation, too. Its backward pass computes the rest again; jax
    keeps what the gradient of each step reads, of layer norm in float32.
    """
    kept = jax.checkpoint_policies.save_only_these_names(ROWS)
    return jax.checkpoint(fn, policy=kept) if model.kernels else fn


def softmax(model: Gpt, scores: jax.Array) -> jax.Array:
    """Over the last dim; Megatron's kernel keeps its short result for the gradient.

    jax keeps the one in float32.
    """
    return short(scores, model.dtype) if model.kernels else jax.nn.softmax(scores)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def short(scores: jax.Array, dtype: str) -> jax.Array:
    """Softmax in float32, and its result in another type."""
    return jax.nn.softmax(scores).astype(dtype)


def _short_back(dtype: str, y: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    y, dy = y.astype(jnp.float32), dy.astype(jnp.float32)
    return (y * (dy - jnp.sum(y * dy, axis=-1, keepdims=True)),)


def _short_forward(scores: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    y = jax.lax.optimization_barrier(short(scores, dtype))
    return y, y


short.defvjp(_short_forward, _short_back)


def core(model: Gpt, q: jax.Array, k: jax.Array, v: jax.Array, seed: jax.Array) -> jax.Array:
    """Causal attention over [batch, sequence, head, feature]."""
    scores = jnp.einsum("bqnf,bknf->bnqk", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1])
    low = -1e4 - jnp.minimum(seed, 0).astype(jnp.float32)
    scores = jnp.where(along(scores, 2, seed) >= along(scores, 3, seed), scores, low)
    weights = kernel(model, softmax(model, scores).astype(v.dtype))
    lay = partial(annotate, model)
    weights = without(weights, model.dropout, seed, lambda x: lay(x, "data", "model", None, None))
    return jnp.einsum("bnqk,bknf->bqnf", weights, v)


def layer(model: Gpt, p: Tree, x: jax.Array, seed: jax.Array) -> jax.Array:
    """One layer over the stream [batch, sequence, width]."""
    between = "model" if model.plan == "megatron+sp" else None

    def stream(x: jax.Array) -> jax.Array:
        return annotate(model, x, "data", between, None)

    def branch(x: jax.Array, summed: jax.Array, bias: jax.Array, seed: jax.Array) -> jax.Array:
        return stream(without(stream(summed) + bias, model.dropout, seed, stream, x))

    p = {n: used(model, LAYER[n], w) for n, w in p.items()}
    attend: Callable[..., jax.Array] = partial(core, model)
    if model.recompute == "selective":
        attend = again(attend)
    norm = fused(model, layer_norm)
    y = stream(norm(x, p["scale1"], p["bias1"]))
    qkv = product(model, "bsw,wcnf->bscnf", y, p["wqkv"], "wqkv") + p["bqkv"]
    qkv = annotate(model, qkv, "data", None, None, "model", None)
    mixed = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], seed)
    mixed = annotate(model, mixed, "data", None, "model", None)
    mixed = product(model, "bsnf,nfw->bsw", mixed, p["wo"], "wo")
    x = branch(x, mixed, p["bo"], seed + 1)
    y = stream(norm(x, p["scale2"], p["bias2"]))
    bend = fused(model, lambda x, bias: jax.nn.gelu(x + bias))
    hidden = annotate(
        model, bend(product(model, "bsw,wh->bsh", y, p["w1"], "w1"), p["b1"]), "data", None, "model"
    )
    hidden = product(model, "bsh,hw->bsw", hidden, p["w2"], "w2")
    return branch(x, hidden, p["b2"], seed + 2)


def whole_layer(model: Gpt) -> Callable[..., jax.Array]:
    """Of parameters, stream and seed; computed again in the backward pass where that is asked."""
    through = partial(layer, model)
    if model.recompute != "full":
        return through
    return jax.checkpoint(through) if model.compiled else again(through)


def again(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`fn`, all of it computed again in its backward pass, as torch's checkpoint does.

    `jax.checkpoint` leaves out what no gradient reads, such as the last product and its sum. Here
    a gradient reads nothing of them, times zero.
    """

    @jax.custom_vjp
    def outer(*args: Any) -> jax.Array:
        return fn(*args)

    def forward(*args: Any) -> tuple[jax.Array, Any]:
        return fn(*args), args

    def backward(args: Any, dy: jax.Array) -> Any:
        y, back = jax.vjp(fn, *args)
        dy, y = jax.lax.optimization_barrier((dy, y))
        grads = list(back(dy))
        like = next(k for k, x in enumerate(args) if getattr(x, "shape", None) == y.shape)
        grads[like] += 0 * y[..., :1]
        return tuple(grads)

    outer.defvjp(forward, backward)
    return outer


def used(model: Gpt, dims: tuple[str, ...], w: jax.Array) -> jax.Array:
    """A parameter in the dtype of the computation, gathered where it is stored in parts."""
    w = w.astype(model.dtype)
    return annotate(model, w, *model.spec(dims, False)) if model.plan == "fsdp" else w


def product(model: Gpt, letters: str, x: jax.Array, w: jax.Array, name: str) -> jax.Array:
    """x times a parameter of a layer, which Megatron uses where it lies, and gathers nowhere.

    Both are kept for the gradient as they were given: the parameter with all layers in one array,
    x split over the sequence where that is parallel, to be gathered again.
    """

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        if LAYER[name][0] == "width":  # gathered over the sequence
            x = annotate(model, kernel(model, x), "data", None, None)
        return jnp.einsum(letters, x, annotate(model, w, *model.spec(LAYER[name], False)))

    if not model.plan.startswith("megatron"):
        return jnp.einsum(letters, x, w)
    return jax.checkpoint(run)(x, w)


def embedded(model: Gpt, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the table; Alpa made a product of it (its monkey_patch.py, embed_call_one_hot)."""
    if not model.compiled:
        return table[tokens]
    return jax.nn.one_hot(tokens, model.vocab, dtype=table.dtype) @ table


def loss(model: Gpt, params: Tree, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the next token; tokens [batch, sequence + 1]."""
    outside = {n: used(model, dims, params[n]) for n, dims in OUTSIDE.items()}
    between = "model" if model.plan == "megatron+sp" else None
    x = embedded(model, outside["embed"], tokens[:, :-1]) + outside["position"]

    def stream(x: jax.Array) -> jax.Array:
        return annotate(model, x, "data", between, None)

    x = stream(without(x, model.dropout, jnp.uint32(3), stream))

    through = whole_layer(model)
    seeds = jnp.arange(model.layers, dtype=jnp.uint32)
    x, _ = jax.lax.scan(
        lambda x, given: (through(given[0], x, given[1]), None), x, (params["layers"], seeds)
    )
    x = annotate(model, layer_norm(x, outside["scale"], outside["bias"]), "data", None, None)
    scores = annotate(model, x @ outside["embed"].T, "data", None, "model")
    step = partial(kernel, replace(model, compiled=model.compiled or model.fused_loss))
    scores = step(scores.astype(jnp.float32))
    highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    shifted = step(scores - highest)
    total = jnp.log(step(jnp.exp(shifted)).sum(axis=-1))
    ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    right = jnp.where(ids == tokens[:, 1:, None], shifted, 0.0).sum(axis=-1)
    return jnp.mean(total - right)


# Programs


def layer_forward(model: Gpt, batch: int) -> Job:
    """One layer forward."""

    def forward(params: Tree, x: jax.Array, seed: jax.Array) -> Any:
        return layer(model, params, x, seed)

    return forward, _layer_arguments(model, batch), _layer_hints(model)


def layer_both(model: Gpt, batch: int) -> Job:
    """One layer forward and backward, to the gradients of its parameters and of its input."""

    def both(params: Tree, x: jax.Array, seed: jax.Array, dy: jax.Array) -> Any:
        y, back = jax.vjp(lambda p, x: whole_layer(model)(p, x, seed), params, x)
        return y, back(dy)

    params, x, seed = _layer_arguments(model, batch)
    return both, (params, x, seed, x), _layer_hints(model, "dy")


def _layer_arguments(model: Gpt, batch: int) -> tuple[Any, ...]:
    params = {
        n: jax.ShapeDtypeStruct(tuple(map(model.size, dims)), model.dtype)
        for n, dims in LAYER.items()
    }
    x = jax.ShapeDtypeStruct((batch, model.sequence, model.width), model.dtype)
    return params, x, jax.ShapeDtypeStruct((), "uint32")


def _layer_hints(model: Gpt, *more: str) -> dict[str, Any]:
    P = jax.sharding.PartitionSpec
    between = "model" if model.plan == "megatron+sp" else None
    hints = {f"params/{n}": P(*model.spec(dims, False)) for n, dims in LAYER.items()}
    return hints | {n: P("data", between, None) for n in ("x", *more)}


def micro_step(model: Gpt, batch: int) -> Job:
    """The gradients of one microbatch, added to those of the ones before."""

    def micro_step(params: Tree, grads: Tree, tokens: jax.Array) -> Tree:
        new = jax.grad(partial(loss, model))(params, tokens)
        return jax.tree.map(lambda g, n: g + n.astype(g.dtype), grads, new)

    stored = model.dtype if model.copied else "float32"
    split = model.plan == "fsdp"
    params = model.parameters(stored)
    hints = model.hints("params", split) | model.hints("grads", split)
    return micro_step, (params, params, _tokens(model, batch)), hints | _batch_hint(model)


def train_step(model: Gpt, batch: int) -> Job:
    """A whole step of one microbatch: gradients, their sum over `data`, Adam."""

    def train_step(state: Tree, tokens: jax.Array) -> tuple[Tree, jax.Array]:
        params = state["copy"] if model.copied else state["params"]
        value, grads = jax.value_and_grad(partial(loss, model))(params, tokens)
        new = jax.tree.map(
            partial(adam, model), state["params"], grads, state["mean"], state["square"]
        )
        at = {n: k for k, n in enumerate(("params", "mean", "square"))}
        outer = jax.tree.structure(state["params"])
        leaves = outer.flatten_up_to(new)
        out = {n: outer.unflatten([x[k] for x in leaves]) for n, k in at.items()}
        if model.copied:
            out["copy"] = narrowed(model, out["params"])
        return out, value

    wide = model.parameters("float32")
    state = {"params": wide, "mean": wide, "square": wide}
    hints: dict[str, Any] = {}
    for name in state:
        hints |= model.hints(f"state/{name}", model.plan in ("zero2", "fsdp"))
    if model.copied:
        state["copy"] = model.parameters(model.dtype)
        hints |= model.hints("state/copy", model.plan == "fsdp")
    return train_step, (state, _tokens(model, batch)), hints | _batch_hint(model)


def narrowed(model: Gpt, params: Tree) -> Tree:
    """The copy that the next step computes with, converted before it is gathered."""
    split = model.plan in ("zero2", "fsdp")

    def one(w: jax.Array, dims: tuple[str, ...], *stack: None) -> jax.Array:
        w = annotate(model, w.astype(model.dtype), *stack, *model.spec(dims, split))
        w = jnp.copy(w)  # two values, of which each may lie as it likes
        return annotate(model, w, *stack, *model.spec(dims, model.plan == "fsdp"))

    layers = {n: one(params["layers"][n], dims, None) for n, dims in LAYER.items()}
    return {"layers": layers} | {n: one(params[n], dims) for n, dims in OUTSIDE.items()}


def adam(
    model: Gpt, w: jax.Array, g: jax.Array, mean: jax.Array, square: jax.Array
) -> tuple[jax.Array, ...]:
    """Adam without the correction of its first steps."""
    wide = kernel(model, g.astype(jnp.float32))
    mean = 0.9 * mean + 0.1 * wide
    square = 0.95 * square + 0.05 * jnp.square(wide)
    return w - 1e-4 * (mean / (jnp.sqrt(square) + 1e-8) + 0.1 * w), mean, square


def _tokens(model: Gpt, batch: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, model.sequence + 1), "int32")


def _batch_hint(model: Gpt) -> dict[str, Any]:
    batch = {"tokens": jax.sharding.PartitionSpec("data", None)}
    return batch if model.plan != "longest" else {}
