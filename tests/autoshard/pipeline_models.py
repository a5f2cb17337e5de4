"""Train steps small enough to be run over stages in a test, and how far results are from others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import zoo
from jax import lax

Job = tuple[Callable[..., Any], Any]


def training(loss: Callable[[Any, Any], Any], params: Any, batch: Any) -> Job:
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, eps=1e-3))

    def train_step(state: Any, batch: Any) -> Any:
        params, opt = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    return train_step, ((params, jax.eval_shape(tx.init, params)), batch)


def gpt() -> Job:
    return zoo.gpt(width=8, layers=4, heads=2, sequence=8, batch=16, vocab=32)


def gpt_remat() -> Job:
    return zoo.gpt(width=16, layers=4, heads=2, sequence=8, batch=16, vocab=32, remat=True)


def gpt_scan() -> Job:
    return zoo.gpt(width=8, layers=6, heads=2, sequence=8, batch=16, vocab=32, scan=True)


def gpt_scan_remat() -> Job:
    sizes = {"width": 8, "layers": 4, "heads": 2, "sequence": 8, "batch": 16, "vocab": 32}
    return zoo.gpt(**sizes, scan=True, remat=True)


def encoder_decoder() -> Job:
    """The encoder's result goes to every layer of the decoder."""
    shapes = {k: jax.ShapeDtypeStruct((16, 16), jnp.float32) for k in ("q", "k", "v", "o")}
    params = {"encoder": [shapes] * 3, "decoder": [[shapes, shapes]] * 3}

    def attend(p: Any, x: Any, y: Any) -> Any:
        weights = jax.nn.softmax((x @ p["q"]) @ jnp.swapaxes(y @ p["k"], 1, 2))
        return x + jnp.tanh(weights @ (y @ p["v"])) @ p["o"]

    def loss(params: Any, batch: Any) -> Any:
        source, target = batch
        for p in params["encoder"]:
            source = attend(p, source, source)
        x = target
        for own, cross in params["decoder"]:
            x = attend(cross, attend(own, x, x), source)
        return jnp.mean((x - target) ** 2)

    x = jax.ShapeDtypeStruct((16, 6, 16), jnp.float32)
    return training(loss, params, (x, x))


def unet() -> Job:
    """What goes down is added to what comes up, over all stages in between."""
    conv = jax.ShapeDtypeStruct((3, 3, 4, 4), jnp.float32)
    params = {"down": [conv] * 3, "up": [conv] * 3}

    def convolve(x: Any, w: Any) -> Any:
        out = lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(out)

    def loss(params: Any, images: Any) -> Any:
        x, skipped = images, []
        for w in params["down"]:
            x = convolve(x, w)
            skipped.append(x)
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        for w in params["up"]:
            x = jax.image.resize(x, skipped[-1].shape, "nearest")
            x = convolve(jnp.concatenate([x, skipped.pop()], -1)[..., ::2], w)
        return jnp.mean((x - images) ** 2)

    return training(loss, params, jax.ShapeDtypeStruct((16, 8, 8, 4), jnp.float32))


def mixture_of_experts() -> Job:
    """Top-1 of three experts, tokens sent to them by one-hot products."""
    layer = {
        "gate": jax.ShapeDtypeStruct((8, 3), jnp.float32),
        "up": jax.ShapeDtypeStruct((3, 8, 16), jnp.float32),
        "down": jax.ShapeDtypeStruct((3, 16, 8), jnp.float32),
    }

    def moe(p: Any, x: Any) -> Any:
        scores = jax.nn.softmax(x @ p["gate"])
        mask = jax.nn.one_hot(scores.argmax(-1), 3)
        hidden = jax.nn.relu(jnp.einsum("bsd,bse,edh->bseh", x, mask, p["up"]))
        return x + jnp.einsum("bseh,ehd,bse->bsd", hidden, p["down"], scores * mask)

    def loss(params: Any, x: Any) -> Any:
        y = x
        for p in params:
            y = moe(p, y)
        return jnp.mean((y - jnp.roll(x, 1, 1)) ** 2)

    return training(loss, [layer] * 4, jax.ShapeDtypeStruct((16, 4, 8), jnp.float32))


MODELS = {
    f.__name__: f
    for f in (
        gpt,
        gpt_remat,
        gpt_scan,
        gpt_scan_remat,
        encoder_decoder,
        unet,
        mixture_of_experts,
    )
}


def filled(shapes: Any) -> Any:
    """Arguments of these shapes, second moments above zero."""
    rng = np.random.default_rng(0)

    def one(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 7, x.shape), x.dtype)
        return jnp.asarray(rng.standard_normal(x.shape) * 0.2, x.dtype)

    args = jax.tree.map(one, shapes)
    return jax.tree.map(lambda x: jnp.abs(x) if x.ndim else x * 0, args)


def worst(got: list[Any], want: list[Any]) -> float:
    """The largest difference, as a part of the largest number of its array."""
    out = 0.0
    for x, y in zip(got, want, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
        out = max(out, float(np.abs(a - b).max(initial=0) / (1e-3 + np.abs(b).max(initial=0))))
    return out
