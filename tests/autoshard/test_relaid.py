"""Whether the compiler for TPUs lays a cache anew before the loop that overwrites a place of it."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard

LAYERS = 4


def step_over(along: int, places: int) -> Any:
    """A cache of keys, of each layer's slice of which some places along a dim are overwritten."""

    def fn(cache: Any, new: Any, at: Any) -> Any:
        several = jnp.repeat(new, places, along)

        def layer(x: Any, keys: Any) -> Any:
            keys = jax.lax.dynamic_update_slice_in_dim(keys, several, at, axis=along)
            return x + jnp.sum(keys.astype(jnp.float32)), keys

        return jax.lax.scan(layer, 0.0, cache)

    return fn


# A slice of the cache, the dim that is overwritten, the one that is split, places, is it copied?
CASES = [
    ((64, 1024, 16, 128), 1, 1, 1, True),
    ((64, 1024, 16, 128), 1, 1, 2, False),  # more than one place
    ((8192, 16384), 1, 1, 1, False),  # too few dims
]


@pytest.mark.libtpu
@pytest.mark.parametrize(("shape", "along", "split", "places", "copied"), CASES)
def test_a_cache_is_laid_anew_where_it_is_split_along_what_is_overwritten(
    shape: tuple[int, ...], along: int, split: int, places: int, copied: bool
) -> None:
    one = tuple(1 if d == along else n for d, n in enumerate(shape))
    cache, new = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((LAYERS, *shape), one))
    args = cache, new, jax.ShapeDtypeStruct((), jnp.int32)
    hints = {"cache": jax.P(*(None,) * (split + 1), "x")}
    plan = autoshard.plan(
        step_over(along, places), *args, cluster="v5e:2x2", mesh={"x": 4}, hints=hints
    )
    compiled = plan.verify().compiled
    assert compiled is not None
    assert compiled.memory is not None
    beside = compiled.memory.arguments + compiled.memory.results
    foreseen, found = plan.cost.peak_memory - beside, compiled.memory.peak - beside
    whole = cache.size * 2 / 4
    assert (found > 0.75 * whole) == copied
    assert foreseen == pytest.approx(found, abs=0.3 * whole)
