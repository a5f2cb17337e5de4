"""Random bits by place are those that jax makes for the whole array."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoshard.random_parts import _numbers, bits_at


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.uint32])
def test_all_places(dtype: Any) -> None:
    key, shape = jax.random.key(3), (5, 7, 3)
    got = bits_at(key, [jnp.arange(n) for n in shape], shape, 8 * np.dtype(dtype).itemsize)
    want = jax.random.bits(key, shape, dtype)
    assert got.dtype == want.dtype
    assert bool((got == want).all())


def test_some_places_of_arrays_of_several_keys() -> None:
    keys = jax.random.split(jax.random.key(0), 6).reshape(2, 3)
    want = jax.vmap(jax.vmap(lambda k: jax.random.bits(k, (4, 5))))(keys)
    got = bits_at(keys, [jnp.array([1, 3]), jnp.arange(5)], (4, 5), 32)
    assert bool((got == want[:, :, jnp.array([1, 3])]).all())


def test_numbers_beyond_one_word() -> None:
    shape = (3, 131072, 131072, 12)
    rng = np.random.default_rng(0)
    places = [rng.integers(0, n, 4) for n in shape]
    high, low = (np.asarray(x, object) for x in _numbers([jnp.asarray(p) for p in places], shape))
    want = np.zeros((1,) * 4, object)
    for d, (place, n) in enumerate(zip(places, shape, strict=True)):
        want = want * n + place.astype(object).reshape([-1 if k == d else 1 for k in range(4)])
    assert (high * (1 << 32) + low == want).all()
