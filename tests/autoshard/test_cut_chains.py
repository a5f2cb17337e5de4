"""What XLA:TPU keeps whole for devices that each take a slice of it, or of what is made of it."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard

HEADS, QUERIES, KEYS, WIDTH = 8, 512, 16384, 128
SCORES = 2 * HEADS * QUERIES * KEYS
BF16 = jnp.bfloat16


def halved(x: Any) -> Any:
    """A chain in which each value has one reader."""
    return jnp.tanh(x) * 0.5


def planned(chain: Any) -> autoshard.Plan:
    """Scores are whole on every device, which mixes the values of its own keys."""

    def attended(q: Any, k: Any, v: Any) -> Any:
        scores = autoshard.annotate(jnp.einsum("hqd,hkd->hqk", q, k), None, None, None)
        weights = chain(scores.astype(jnp.float32)).astype(BF16)
        weights = autoshard.annotate(weights, None, None, None)
        return jnp.einsum("hqk,hkd->hqd", weights, v)

    q, k = (jax.ShapeDtypeStruct((HEADS, n, WIDTH), BF16) for n in (QUERIES, KEYS))
    hints = {"q": jax.P(), "k": jax.P(), "v": jax.P(None, "x")}
    return autoshard.plan(attended, q, k, k, cluster="tpu-v5e:2x2", mesh={"x": 4}, hints=hints)


@pytest.mark.parametrize(("chain", "more"), [(jax.nn.softmax, 2 * SCORES), (halved, 0)])
def test_exponentials_lie_beside_a_slice_of_what_is_made_of_them(
    chain: Any, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = planned(chain).cost.peak_memory
    monkeypatch.setattr("passes.held.whole_beside_slices", lambda *_: {})
    assert peak - planned(chain).cost.peak_memory == pytest.approx(more, rel=0.05)


@pytest.mark.libtpu
@pytest.mark.parametrize("chain", [jax.nn.softmax, halved])
def test_the_compiler_keeps_them_too(chain: Any) -> None:
    plan = planned(chain)
    found = plan.verify().compiled
    assert found is not None
    assert found.memory is not None
    assert plan.cost.peak_memory == pytest.approx(found.memory.peak, rel=0.1)


BATCH, PLACES, HIDDEN = 4, 8192, 8192
HALF = BATCH * PLACES * HIDDEN


def halves(y: Any) -> list[Any]:
    """All of a value in one operation."""
    return jnp.split(y, 2, -1)


def two_slices(y: Any) -> list[Any]:
    """All of a value in two operations."""
    return [y[..., : HIDDEN // 2], y[..., HIDDEN // 2 :]]


def gated(parts: Any, columns: str | None = "x") -> autoshard.Plan:
    """Hidden values come in columns, and so does the product of their halves."""

    def hidden(h: Any, w: Any) -> Any:
        value, gate = parts(autoshard.annotate(h @ w, None, None, columns))
        return autoshard.annotate(value * jax.nn.gelu(gate), None, None, columns)

    h, w = (jax.ShapeDtypeStruct(s, BF16) for s in ((BATCH, PLACES, 512), (512, HIDDEN)))
    hints = {"h": jax.P(), "w": jax.P(None, columns)}
    return autoshard.plan(hidden, h, w, cluster="tpu-v5e:2x2", mesh={"x": 4}, hints=hints)


@pytest.mark.parametrize(
    ("parts", "columns", "more"),
    [(halves, "x", 2 * HALF), (two_slices, "x", 2 * HALF), (halves, None, 0)],
)
def test_halves_lie_whole_before_each_device_takes_its_columns(
    parts: Any, columns: str | None, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = gated(parts, columns).cost.peak_memory
    monkeypatch.setattr("passes.held.whole_parts", lambda *_: ())
    assert peak - gated(parts, columns).cost.peak_memory == pytest.approx(more, rel=0.02)


@pytest.mark.libtpu
@pytest.mark.parametrize(("parts", "columns"), [(halves, "x"), (two_slices, "x"), (halves, None)])
def test_the_compiler_writes_both_halves(parts: Any, columns: str | None) -> None:
    plan = gated(parts, columns)
    found = plan.verify().compiled
    assert found is not None
    assert found.memory is not None
    assert plan.cost.peak_memory == pytest.approx(found.memory.peak, rel=0.15)
