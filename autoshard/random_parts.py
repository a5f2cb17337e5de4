"""Which random bits does a part of an array have?  Those that the whole has there.

jax's threefry hashes, for each element, a key and the element's number in the array
(`jax_threefry_partitionable`, "jax.random" of its documentation). Numbers of 64 bits are kept as
two words, for jax counts in 32 bits by default:

    number = sum over dims of place * stride        bits = hash(key, high word, low word)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p

_HALF = np.uint32(16)
_LOW = np.uint32(0xFFFF)


def bits_at(key: Any, places: Sequence[Any], shape: Sequence[int], width: int) -> Any:
    """Random bits of an array of this shape, at these places along each of its dims.

    key: one, or an array of keys, each with an array of its own: their dims come first then.
    """
    words = jax.random.key_data(key)
    keys = words.shape[:-1]
    local = tuple(p.shape[0] for p in places)
    high, low = _numbers(places, shape)

    def spread(x: Any, first: int) -> Any:
        return lax.broadcast_in_dim(x, (*keys, *local), tuple(range(first, first + x.ndim)))

    ends = [spread(words[..., k], 0) for k in (0, 1)]
    a, b = threefry2x32_p.bind(*ends, spread(high, len(keys)), spread(low, len(keys)))
    if width == 64:
        return (a.astype(jnp.uint64) << np.uint64(32)) | b.astype(jnp.uint64)
    return (a ^ b).astype(f"uint{width}")


def _numbers(places: Sequence[Any], shape: Sequence[int]) -> tuple[Any, Any]:
    """High and low words of each element's number."""
    local = tuple(p.shape[0] for p in places)
    high, low = jnp.zeros(local, jnp.uint32), jnp.zeros(local, jnp.uint32)
    large = math.prod(shape) > 1 << 32
    for d, place in enumerate(places):
        more = _times(place.astype(jnp.uint32), math.prod(shape[d + 1 :]))
        up, down = (lax.broadcast_in_dim(x, local, (d,)) for x in more)
        total = low + down
        if large:
            high = high + up + (total < low).astype(jnp.uint32)
        low = total
    return high, low


def _times(x: Any, stride: int) -> tuple[Any, Any]:
    """High and low words of a product: by halves of a word, which do not overflow."""
    first, second = np.uint32(stride >> 32), np.uint32(stride & 0xFFFFFFFF)
    a, b = second >> _HALF, second & _LOW
    top, bottom = x >> _HALF, x & _LOW
    middle = ((bottom * b) >> _HALF) + ((bottom * a) & _LOW) + ((top * b) & _LOW)
    carried = ((bottom * a) >> _HALF) + ((top * b) >> _HALF) + (middle >> _HALF)
    return x * first + top * a + carried, x * second
