"""What may a random number generator split?  The numbers it makes, when it counts elements.

jax's threefry generator hashes (key, index of the element), so every device can make its piece of
the numbers from the key alone (`jax_threefry_partitionable`, the default since jax 0.5). The
generators built into XLA (`rbg`, `rng_uniform`, `rng_bit_generator`) step through one state: their
numbers would depend on how they are split, so they stay whole. New keys of `rbg` come from
threefry, those of `unsafe_rbg` do not (jax's documentation, "jax.random", "Advanced RNG
configuration").

A threefry hash of two words is 20 rounds of an addition, a rotation and an exclusive or, and six
key additions (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): about a
hundred and ten operations for two words.
"""

from __future__ import annotations

import math

from passes.ir.graph import Signature, Type
from passes.ir.rule import Rule
from passes.rules.elementwise import elementwise
from passes.rules.factors import Factors
from passes.rules.registry import rule

_HASH_FLOPS = 110.0


def _counts_elements(s: Signature, key: Type) -> bool:
    """Whether an operation on such keys hashes the index of each element."""
    return "fry" in key.dtype or (key.dtype == "key<rbg>" and s.name != "random_bits")


@rule("random_bits", "random_split")
def random_bits(s: Signature) -> Rule:
    """`k -> k i j`: for each key an array of numbers, or of new keys."""
    key, made = s.operands[0], s.results[0]
    splits = _counts_elements(s, key)
    f = Factors()
    dims = f.parallel_dims(made.shape) if splits else f.whole_dims(made.shape)
    flops = _HASH_FLOPS * made.size
    return f.rule([dims[: len(key.shape)]], [dims], flops=flops, fuses=splits)


@rule("random_clone")
def random_clone(s: Signature) -> Rule:
    """The same key."""
    return elementwise(s, 0.0)


@rule("random_fold_in", "random_seed")
def random_fold_in(s: Signature) -> Rule:
    """A hash for each key."""
    if not _counts_elements(s, s.results[0]):
        return rng_state(s)
    return elementwise(s, _HASH_FLOPS)


@rule("random_gamma")
def random_gamma(s: Signature) -> Rule:
    """One key for each leading element; each key's numbers come from a loop over all of them."""
    key = s.operands[0]
    f = Factors()
    keys = f.parallel_dims(key.shape)
    dims = keys + f.whole_dims(s.results[0].shape[len(keys) :])
    return f.rule([keys, dims], [dims], flops=10.0 * _HASH_FLOPS * s.results[0].size)


@rule("random_unwrap")
def random_unwrap(s: Signature) -> Rule:
    """`k -> k w`: a key's own words stay together."""
    f = Factors()
    keys = f.parallel_dims(s.operands[0].shape)
    words = f.whole_dims(s.results[0].shape[len(keys) :])
    return f.rule([keys], [keys + words], fuses=True)


@rule("random_wrap")
def random_wrap(s: Signature) -> Rule:
    """`k w -> k`: a key's own words stay together."""
    f = Factors()
    keys = f.parallel_dims(s.results[0].shape)
    words = f.whole_dims(s.operands[0].shape[len(keys) :])
    return f.rule([keys + words], [keys], fuses=True)


@rule("rng_bit_generator", "rng_uniform")
def rng_state(s: Signature) -> Rule:
    """One state steps through all numbers: nothing splits."""
    f = Factors()
    operands = [f.whole_dims(t.shape) for t in s.operands]
    results = [f.whole_dims(t.shape) for t in s.results]
    flops = 10.0 * math.fsum(t.size for t in s.results)
    return f.rule(operands, results, flops=flops)


@rule("philox2x32", "philox4x32", "threefry2x32", "threefry4x32")
def hash_words(s: Signature) -> Rule:
    """A hash of each element of the counters."""
    return elementwise(s, _HASH_FLOPS)
