"""Sorts, matrix factorisations, Fourier transforms: only their batch dims split."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from autoshard.rule_shards import faults, find
from passes.ir.rule import Rule

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def real(*shape: int) -> Any:
    return np.random.standard_normal(shape).astype(np.float32)


def positive_definite(*shape: int) -> Any:
    a = real(*shape)
    return a @ np.swapaxes(a, -1, -2) + 3 * np.eye(shape[-1], dtype=np.float32)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test draws the same numbers from np.random, whatever ran before it."""
    np.random.seed(0)


def check(name: str, fn: Callable[..., Any], *args: Any) -> Rule:
    """The rule of the last such equation, after its shards were seen to make up the whole."""
    eqn, numbers, rule = find(name, fn, *args)
    assert not faults(eqn, numbers, rule)
    return rule


def split_sizes(rule: Rule, kind: str) -> list[int]:
    return sorted(f.size for f in rule.factors if f.kind == kind and f.size > 1)


# Sorts.


def test_sort_with_companions() -> None:
    rule = check(
        "sort", lambda a, b: lax.sort((a, b), dimension=1, num_keys=1), real(4, 6, 8), real(4, 6, 8)
    )
    assert split_sizes(rule, "parallel") == [4, 8]


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("top_k", lambda x: lax.top_k(x, 3)),
        ("approx_top_k", lambda x: lax.approx_max_k(x, 3)),
        ("approx_top_k", lambda x: lax.approx_min_k(x, 3, reduction_dimension=-1)),
    ],
)
def test_selection(name: str, fn: Any) -> None:
    rule = check(name, fn, real(4, 6, 8))
    assert split_sizes(rule, "parallel") == [4, 6]


# Linear algebra.

PIVOTS = np.tile(np.array([2, 1, 5, 3], np.int32), (4, 1))
LINALG = {
    "cholesky": (lax.linalg.cholesky, lambda: (positive_definite(4, 6, 6),)),
    "eig": (
        partial(lax.linalg.eig, compute_left_eigenvectors=False),
        lambda: (real(4, 6, 6),),
    ),
    "eigh": (lax.linalg.eigh, lambda: (positive_definite(4, 6, 6),)),
    "hessenberg": (lax.linalg.hessenberg, lambda: (real(4, 6, 6),)),
    "householder_product": (
        lax.linalg.householder_product,
        lambda: (real(4, 6, 5), real(4, 5)),
    ),
    "lu": (lax.linalg.lu, lambda: (real(4, 6, 5),)),
    "lu_pivots_to_permutation": (
        partial(lax.linalg.lu_pivots_to_permutation, permutation_size=6),
        lambda: (PIVOTS,),
    ),
    "qr": (lax.linalg.qr, lambda: (real(4, 6, 5),)),
    "schur": (lax.linalg.schur, lambda: (real(4, 6, 6),)),
    "svd": (lax.linalg.svd, lambda: (real(4, 6, 5),)),
    "symmetric_product": (
        partial(lax.linalg.symmetric_product, alpha=2.0, symmetrize_output=True),
        lambda: (real(4, 6, 8), np.zeros((4, 6, 6), np.float32)),
    ),
    "triangular_solve": (
        partial(lax.linalg.triangular_solve, left_side=True, lower=True),
        lambda: (positive_definite(4, 6, 6), real(4, 6, 2)),
    ),
    "tridiagonal": (lax.linalg.tridiagonal, lambda: (positive_definite(4, 6, 6),)),
    "tridiagonal_solve": (
        lax.linalg.tridiagonal_solve,
        lambda: (real(4, 6), 5 + real(4, 6), real(4, 6), real(4, 6, 3)),
    ),
    "fft": (jnp.fft.rfft2, lambda: (real(4, 6, 8),)),
}


@pytest.mark.parametrize("name", LINALG)
def test_batch_dims_of_linear_algebra(name: str) -> None:
    fn, draw = LINALG[name]
    rule = check(name, fn, *draw())
    assert 4 in split_sizes(rule, "parallel")
    assert rule.flops > 0


def test_right_hand_sides_of_a_triangular_solve() -> None:
    for left, shape in ((True, (4, 6, 2)), (False, (4, 2, 6))):
        solve = partial(lax.linalg.triangular_solve, left_side=left, lower=True)
        rule = check("triangular_solve", solve, positive_definite(4, 6, 6), real(*shape))
        assert split_sizes(rule, "parallel") == [2, 4]


@pytest.mark.parametrize("fn", [jnp.fft.fft, jnp.fft.ifft2, jnp.fft.irfft, jnp.fft.fftn])
def test_fourier_transforms(fn: Any) -> None:
    rule = check("fft", fn, real(4, 6, 8) + 0j)
    assert split_sizes(rule, "parallel") == {
        jnp.fft.fft: [4, 6], jnp.fft.irfft: [4, 6], jnp.fft.ifft2: [4], jnp.fft.fftn: []
    }[fn]  # fmt: skip
