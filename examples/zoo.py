"""Which programs do we plan when nothing need run?  Models at published sizes, as mere shapes.

Every function here can be called without arguments and returns `(fn, args)`, where `args` are
`jax.ShapeDtypeStruct`s: nothing is allocated, whatever the size. So all are targets of the command
line,

    autoshard plan examples/zoo.py:gpt_1p3b --cluster tpu-v5e:4x4

and with arguments they are the small models of the tests and the long ones of the benchmarks. A
train step is `(state, batch) -> (state, loss)`; a single layer is `(params, x) -> (loss, grads)`.
The models are plain jax, so that their equations don't change with a library's version, and all in
one file, so that it can be loaded by path from anywhere. Weights are called wq, wk, wv, wo, w1, w2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = dict[str, Any]
Job = tuple[Callable[..., Any], tuple[Any, ...]]
# What is to be done with a value or a weight of this name where the model uses it.
Use = Callable[[jax.Array, str], jax.Array]


def as_it_is(x: jax.Array, name: str) -> jax.Array:
    """Nothing: where it lies is for others to decide. Who annotates by hand passes another."""
    return x


def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array that is only talked about."""
    return jax.ShapeDtypeStruct(dims, dtype)


def shapes(**dims: tuple[int, ...]) -> Tree:
    """Parameters by name."""
    return {name: shape(*d) for name, d in dims.items()}


def stacked(layer: Tree, count: int) -> Tree:
    """The parameters of so many layers, each array with a leading dim, for `lax.scan`."""
    return jax.tree.map(lambda p: shape(count, *p.shape, dtype=p.dtype), layer)


def train_job(
    loss_of: Callable[[Any, Any], jax.Array],
    params: Any,
    batch: Any,
    optimizer: optax.GradientTransformation | None = None,
) -> Job:
    """A whole train step, with adamw unless told otherwise."""
    rule = optimizer or optax.adamw(3e-4, weight_decay=0.1)

    def train_step(state: Tree, batch: Any) -> tuple[Tree, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(state["params"], batch)
        updates, opt = rule.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss

    return train_step, ({"params": params, "opt": jax.eval_shape(rule.init, params)}, batch)


def layer_job(layer: Callable[[Tree, jax.Array], jax.Array], params: Tree, x: Any) -> Job:
    """One layer forward and backward: the gradients for its parameters and for its input."""

    def loss_of(params: Tree, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(layer(params, x).astype(jnp.float32)))

    def forward_backward(params: Tree, x: jax.Array) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
        return jax.value_and_grad(loss_of, argnums=(0, 1))(params, x)

    return forward_backward, (params, x)


# Parts.


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Mean 0 and deviation 1 along the last dim, computed in f32; then scale and bias."""
    return jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-5).astype(x.dtype) * scale + bias


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root mean square 1 along the last dim, computed in f32; then scale."""
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + 1e-5).astype(x.dtype) * scale


def attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = True) -> jax.Array:
    """[batch, sequence, head, feature] each; softmax in f32 over all keys at once."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(q.shape[-1])
    if causal:
        mask = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
        scores = jnp.where(mask, scores, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)


def blockwise_attention(q: jax.Array, k: jax.Array, v: jax.Array, block: int) -> jax.Array:
    """The same, with no mask, one block of keys after the other (arXiv 2112.05682)."""
    batch, sequence, heads, feature = q.shape

    def blocks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, sequence // block, block, heads, feature), 1, 0)

    @jax.checkpoint
    def step(carry: tuple[jax.Array, ...], kv: tuple[jax.Array, ...]) -> tuple[Any, None]:
        total, weight, highest = carry
        scores = jnp.einsum("bqhd,bkhd->bqhk", q, kv[0], preferred_element_type=jnp.float32)
        scores = scores / math.sqrt(feature)
        higher = jnp.maximum(highest, scores.max(axis=-1))
        exp, old = jnp.exp(scores - higher[..., None]), jnp.exp(highest - higher)
        total = total * old[..., None] + jnp.einsum("bqhk,bkhd->bqhd", exp, kv[1])
        return (total, weight * old + exp.sum(axis=-1), higher), None

    start = (jnp.zeros(q.shape), jnp.zeros(q.shape[:-1]), jnp.full(q.shape[:-1], -1e30))
    (total, weight, _), _ = jax.lax.scan(step, start, (blocks(k), blocks(v)))
    return (total / weight[..., None]).astype(q.dtype)


def heads_of(x: jax.Array, heads: int) -> jax.Array:
    """[..., width] -> [..., head, feature]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def next_token_loss(scores: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of scores [..., vocab], in f32."""
    wrong = optax.softmax_cross_entropy_with_integer_labels(scores.astype(jnp.float32), tokens)
    return jnp.mean(wrong)


# GPT (Radford et al. 2019): layer norm, gelu, learned positions, tied embedding. Only the
# feed-forward layer has biases.


def gpt_layer_params(width: int, hidden: int) -> Tree:
    """Of one layer."""
    square, row = (width, width), (width,)
    weights = shapes(wq=square, wk=square, wv=square, wo=square)
    weights |= shapes(w1=(width, hidden), w2=(hidden, width), b1=(hidden,), b2=row)
    return weights | shapes(scale1=row, bias1=row, scale2=row, bias2=row)


def gpt_layer(
    p: Tree, x: jax.Array, heads: int, causal: bool = True, use: Use = as_it_is
) -> jax.Array:
    """x [batch, sequence, width]; computes in x's dtype, whatever that of the parameters."""
    p = {name: use(w.astype(x.dtype), name) for name, w in p.items()}
    y = use(layer_norm(x, p["scale1"], p["bias1"]), "normed")
    q, k, v = (use(heads_of(y @ p[f"w{n}"], heads), "heads") for n in "qkv")
    mixed = use(attention(q, k, v, causal), "heads").reshape(x.shape)
    x = use(x + mixed @ p["wo"], "stream")
    y = use(layer_norm(x, p["scale2"], p["bias2"]), "normed")
    hidden = use(jax.nn.gelu(y @ p["w1"] + p["b1"]), "hidden")
    return use(x + hidden @ p["w2"] + p["b2"], "stream")


def gpt(
    *,
    width: int,
    layers: int,
    heads: int,
    sequence: int,
    batch: int,
    vocab: int = 50304,
    scan: bool = False,
    remat: bool = False,
    dtype: Any = jnp.float32,
    use: Use = as_it_is,
) -> Job:
    """A train step of any GPT. The vocabulary of 50,257 is rounded up to a multiple of 128."""
    one = gpt_layer_params(width, 4 * width)
    params: Tree = shapes(embed=(vocab, width), position=(sequence, width))
    params["layers"] = stacked(one, layers) if scan else [one] * layers
    params |= shapes(scale=(width,), bias=(width,))

    def through(p: Tree, x: jax.Array) -> jax.Array:
        return gpt_layer(p, x, heads, use=use)

    layer = jax.checkpoint(through) if remat else through

    def loss_of(params: Tree, tokens: jax.Array) -> jax.Array:
        x = use(params["embed"], "embed")[tokens[:, :-1]]
        x = use((x + params["position"]).astype(dtype), "stream")
        if scan:
            x, _ = jax.lax.scan(lambda x, p: (layer(p, x), None), x, params["layers"])
        else:
            for p in params["layers"]:
                x = layer(p, x)
        x = use(layer_norm(x, params["scale"], params["bias"]).astype(dtype), "normed")
        scores = use(x @ use(params["embed"].T.astype(dtype), "unembed"), "scores")
        return next_token_loss(scores, tokens[:, 1:])

    return train_job(loss_of, params, shape(batch, sequence + 1, dtype=jnp.int32))


def gpt_block(
    width: int = 1024,
    heads: int = 16,
    sequence: int = 512,
    batch: int = 8,
    dtype: Any = jnp.float32,
) -> Job:
    """One GPT layer, forward and backward: Megatron's plan is to be found here."""
    params = gpt_layer_params(width, 4 * width)
    x = shape(batch, sequence, width, dtype=dtype)
    return layer_job(lambda p, x: gpt_layer(p, x, heads), params, x)


def gpt2_small_unrolled(layers: int = 12, batch: int = 8, sequence: int = 1024) -> Job:
    """GPT-2 small, a Python loop over its layers."""
    return gpt(width=768, layers=layers, heads=12, sequence=sequence, batch=batch)


def gpt2_small_scan(
    layers: int = 12, batch: int = 8, sequence: int = 1024, use: Use = as_it_is
) -> Job:
    """GPT-2 small, one scan over its layers."""
    sizes = {"width": 768, "layers": layers, "heads": 12, "sequence": sequence, "batch": batch}
    return gpt(**sizes, scan=True, use=use)


def gpt_1p3b(layers: int = 24, batch: int = 32, sequence: int = 2048, use: Use = as_it_is) -> Job:
    """GPT-3 XL (arXiv 2005.14165, table 2.1; 16 heads of 128): scan, remat, bf16 over f32."""
    return gpt(
        width=2048,
        layers=layers,
        heads=16,
        sequence=sequence,
        batch=batch,
        scan=True,
        remat=True,
        dtype=jnp.bfloat16,
        use=use,
    )


def gpt_decode(
    width: int = 2048, layers: int = 24, heads: int = 16, context: int = 2048, batch: int = 64
) -> Job:
    """Inference: one more token for each text, from keys and values kept in a cache."""
    bf16 = jnp.bfloat16
    params: Tree = shapes(embed=(50304, width))
    params["layers"] = stacked(gpt_layer_params(width, 4 * width), layers)
    params = jax.tree.map(lambda p: shape(*p.shape, dtype=bf16), params)
    cached = shape(layers, batch, context, heads, width // heads, dtype=bf16)

    def layer(x: jax.Array, inputs: Any, at: jax.Array) -> tuple[jax.Array, Tree]:
        p, cache = inputs
        y = layer_norm(x, p["scale1"], p["bias1"])
        q, k, v = (heads_of(y @ p[f"w{n}"], heads) for n in "qkv")
        keys = jax.lax.dynamic_update_slice_in_dim(cache["k"], k, at, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(cache["v"], v, at, axis=1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, keys) / math.sqrt(width // heads)
        scores = jnp.where(jnp.arange(context) <= at, scores.astype(jnp.float32), -1e30)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(bf16), values)
        x = x + mixed.reshape(x.shape) @ p["wo"]
        y = layer_norm(x, p["scale2"], p["bias2"])
        x = x + jax.nn.gelu(y @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
        return x, {"k": keys, "v": values}

    def decode(params: Tree, cache: Tree, token: jax.Array, at: jax.Array) -> tuple[Any, Tree]:
        x = params["embed"][token][:, None]
        x, cache = jax.lax.scan(
            lambda x, inputs: layer(x, inputs, at), x, (params["layers"], cache)
        )
        return jnp.argmax(x[:, 0] @ params["embed"].T, axis=-1).astype(jnp.int32), cache

    token, at = shape(batch, dtype=jnp.int32), shape(dtype=jnp.int32)
    return decode, (params, {"k": cached, "v": cached}, token, at)


# LLaMA (arXiv 2302.13971, grouped heads as in 2307.09288): RMS norm, rotary positions, SwiGLU.


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions (arXiv 2104.09864) on x [batch, sequence, head, feature]."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angle)[:, None].astype(x.dtype), jnp.cos(angle)[:, None].astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def llama_layer(p: Tree, x: jax.Array, heads: int, groups: int) -> jax.Array:
    """x [batch, sequence, width]; `heads` queries share `groups` keys and values."""
    p = jax.tree.map(lambda w: w.astype(x.dtype), p)
    y = rms_norm(x, p["scale1"])
    q = rotate(heads_of(y @ p["wq"], heads))
    k, v = rotate(heads_of(y @ p["wk"], groups)), heads_of(y @ p["wv"], groups)
    k, v = (jnp.repeat(t, heads // groups, axis=2) for t in (k, v))
    x = x + attention(q, k, v).reshape(x.shape) @ p["wo"]
    y = rms_norm(x, p["scale2"])
    return x + (jax.nn.silu(y @ p["w1"]) * (y @ p["w3"])) @ p["w2"]


def llama_unrolled(
    layers: int = 16,
    width: int = 2048,
    heads: int = 32,
    groups: int = 8,
    hidden: int = 8192,
    sequence: int = 2048,
    batch: int = 8,
    vocab: int = 32000,
) -> Job:
    """A train step in bf16 over f32, a Python loop over the layers."""
    narrow = (width, width * groups // heads)
    layer = shapes(wq=(width, width), wk=narrow, wv=narrow, wo=(width, width))
    layer |= shapes(w1=(width, hidden), w3=(width, hidden), w2=(hidden, width))
    layer |= shapes(scale1=(width,), scale2=(width,))
    params: Tree = shapes(embed=(vocab, width), head=(width, vocab), scale=(width,))
    params["layers"] = [layer] * layers

    def loss_of(params: Tree, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens[:, :-1]].astype(jnp.bfloat16)
        for p in params["layers"]:
            x = llama_layer(p, x, heads, groups)
        x = rms_norm(x, params["scale"].astype(x.dtype))
        return next_token_loss(x @ params["head"].astype(x.dtype), tokens[:, 1:])

    return train_job(loss_of, params, shape(batch, sequence + 1, dtype=jnp.int32))


# Long sequences and video: what is there to split when the batch is one?


def long_attention(
    sequence: int = 32768, width: int = 2048, heads: int = 16, batch: int = 1, block: int = 0
) -> Job:
    """One attention layer on a long sequence, bf16; `block`: so many keys at a time, 0 for all."""
    square = (width, width)
    params = shapes(wq=square, wk=square, wv=square, wo=square, scale=(width,), bias=(width,))

    def layer(p: Tree, x: jax.Array) -> jax.Array:
        p = jax.tree.map(lambda w: w.astype(x.dtype), p)
        y = layer_norm(x, p["scale"], p["bias"])
        q, k, v = (heads_of(y @ p[f"w{n}"], heads) for n in "qkv")
        mixed = blockwise_attention(q, k, v, block) if block else attention(q, k, v, causal=False)
        return x + mixed.reshape(x.shape) @ p["wo"]

    return layer_job(layer, params, shape(batch, sequence, width, dtype=jnp.bfloat16))


def long_attention_blockwise(sequence: int = 65536, block: int = 2048) -> Job:
    """The same, twice as long, in blocks: scores never lie in memory as a whole."""
    return long_attention(sequence=sequence, block=block)


def video_transformer(
    pairs: int = 2,
    frames: int = 64,
    patches: int = 256,
    width: int = 1024,
    heads: int = 16,
    batch: int = 1,
) -> Job:
    """Pairs of a spatial and a temporal GPT layer on x [batch, frame, patch, width], bf16."""
    one = gpt_layer_params(width, 4 * width)
    params = {"pairs": [{"space": one, "time": one}] * pairs}

    def along(p: Tree, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, *x.shape[2:])
        return gpt_layer(p, rows, heads).reshape(x.shape)

    def layers(params: Tree, x: jax.Array) -> jax.Array:
        for p in params["pairs"]:
            x = along(p["space"], x)
            x = along(p["time"], x.swapaxes(1, 2)).swapaxes(1, 2)
        return x

    return layer_job(layers, params, shape(batch, frames, patches, width, dtype=jnp.bfloat16))


# Experts, embeddings, convolutions.


def moe_layer(
    experts: int = 16,
    groups: int = 16,
    tokens: int = 1024,
    width: int = 1024,
    hidden: int = 4096,
    picks: int = 2,
) -> Job:
    """Top-k routing with a capacity; einsums to the experts and back (GShard, arXiv 2006.16668)."""
    params = shapes(
        router=(width, experts), w1=(experts, width, hidden), w2=(experts, hidden, width)
    )
    capacity = picks * tokens // experts

    def layer(p: Tree, x: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(jnp.einsum("gtm,me->gte", x, p["router"]))
        values, chosen = jax.lax.top_k(gates, picks)
        onto = jax.nn.one_hot(chosen.swapaxes(1, 2), experts)  # group, pick, token, expert
        place = jnp.cumsum(onto.reshape(groups, picks * tokens, experts), axis=1) - 1
        slot = jax.nn.one_hot(place.reshape(onto.shape).astype(jnp.int32), capacity)
        combine = jnp.einsum("gtk,gkte,gktec->gtec", values, onto, slot)
        dispatch = (combine > 0).astype(x.dtype)
        inside = jnp.einsum("gtec,gtm->egcm", dispatch, x)
        inside = jax.nn.gelu(jnp.einsum("egcm,emh->egch", inside, p["w1"]))
        inside = jnp.einsum("egch,ehm->egcm", inside, p["w2"])
        return x + jnp.einsum("gtec,egcm->gtm", combine, inside)

    return layer_job(layer, params, shape(groups, tokens, width))


# Distinct values of the 26 categorical columns of the Criteo Kaggle data set, as printed by
# facebookresearch/dlrm. Long tables are rounded up to a multiple of 256 below, as is usual.
CRITEO_ROWS: tuple[int, ...] = (
    1460,
    583,
    10131227,
    2202608,
    305,
    24,
    12517,
    633,
    3,
    93145,
    5683,
    8351593,
    3194,
)
CRITEO_ROWS += (27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572)


def mlp_params(*sizes: int) -> list[Tree]:
    """Dense layers of these widths."""
    return [shapes(w=(n, m), b=(m,)) for n, m in pairwise(sizes)]


def mlp_layers(layers: list[Tree], x: jax.Array) -> jax.Array:
    """Dense layers with a relu between them."""
    for i, p in enumerate(layers):
        x = x @ p["w"] + p["b"]
        x = jax.nn.relu(x) if i + 1 < len(layers) else x
    return x


def mlp(width: int = 512, layers: int = 4, batch: int = 4096) -> Job:
    """A small network and a large batch: data parallelism is enough."""

    def loss_of(params: list[Tree], batch: Tree) -> jax.Array:
        return jnp.mean(jnp.square(mlp_layers(params, batch["x"]) - batch["y"]))

    params = mlp_params(*[width] * (layers + 1))
    return train_job(loss_of, params, shapes(x=(batch, width), y=(batch, width)))


def dlrm(
    batch: int = 8192,
    width: int = 64,
    rows: tuple[int, ...] = CRITEO_ROWS,
    use: Use = as_it_is,
) -> Job:
    """DLRM (arXiv 1906.00091) on Criteo's columns with Adagrad: 8.6 GB of tables, twice."""
    vectors = 1 + len(rows)
    params: Tree = {
        "tables": [shape(n if n < 4096 else 256 * math.ceil(n / 256), width) for n in rows],
        "bottom": mlp_params(13, 512, 256, width),
        "top": mlp_params(width + vectors * (vectors - 1) // 2, 512, 256, 1),
    }
    data = shapes(dense=(batch, 13), click=(batch,))
    data["ids"] = shape(batch, len(rows), dtype=jnp.int32)

    def loss_of(params: Tree, batch: Tree) -> jax.Array:
        bottom = mlp_layers(params["bottom"], batch["dense"])
        ids = use(batch["ids"], "ids")
        found = [
            use(use(table, "tables")[ids[:, i]], "vectors")
            for i, table in enumerate(params["tables"])
        ]
        x = jnp.stack([bottom, *found], axis=1)
        upper = np.triu_indices(vectors, k=1)
        dots = jnp.einsum("bid,bjd->bij", x, x)[:, *upper]
        odds = mlp_layers(params["top"], jnp.concatenate([bottom, dots], axis=1))[:, 0]
        return optax.sigmoid_binary_cross_entropy(odds, batch["click"]).mean()

    return train_job(loss_of, params, data, optax.adagrad(0.01))


def conv_net(blocks: int = 8, channels: int = 256, side: int = 56, batch: int = 256) -> Job:
    """Residual 3 x 3 convolutions with batch norm, in the middle of a ResNet (arXiv 1512.03385)."""
    row = (channels,)
    one = shapes(kernel=(3, 3, channels, channels), scale=row, bias=row)
    params: Tree = {"blocks": [one] * blocks, "head": shape(channels, 1000)}
    data = shapes(image=(batch, side, side, channels))
    data["label"] = shape(batch, dtype=jnp.int32)

    def block(p: Tree, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jax.nn.standardize(y, axis=(0, 1, 2), epsilon=1e-5) * p["scale"] + p["bias"]
        return x + jax.nn.relu(y)

    def loss_of(params: Tree, batch: Tree) -> jax.Array:
        x = batch["image"]
        for p in params["blocks"]:
            x = block(p, x)
        scores = x.mean(axis=(1, 2)) @ params["head"]
        return next_token_loss(scores, batch["label"])

    return train_job(loss_of, params, data, optax.sgd(0.1, momentum=0.9))


JOBS: dict[str, Callable[..., Job]] = {
    job.__name__: job
    for job in (
        mlp,
        gpt_block,
        gpt2_small_unrolled,
        gpt2_small_scan,
        gpt_1p3b,
        gpt_decode,
        llama_unrolled,
        long_attention,
        long_attention_blockwise,
        video_transformer,
        moe_layer,
        dlrm,
        conv_net,
    )
}


def filled(args: Any, seed: int = 0) -> Any:
    """Small random numbers and small indices of the given shapes; never below 0."""
    rng = np.random.default_rng(seed)

    def array(x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 4, x.shape), x.dtype)
        return jnp.asarray(0.1 * rng.random(x.shape), x.dtype)

    return jax.tree.map(array, args)
