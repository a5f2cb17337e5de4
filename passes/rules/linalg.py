"""What may a matrix factorisation or a Fourier transform split?  Only the batch dims before it.

A matrix stays whole on one device. The one exception is a triangular solve, whose right-hand sides
are independent of one another.

FLOP are the leading terms in G. H. Golub and C. F. Van Loan, "Matrix Computations", 4th edition
(2013), for an m x n matrix with m >= n; those of iterative methods (eigenvalues, singular values)
are their estimates. A Fourier transform of n points costs 5 n log2 n (Van Loan, "Computational
Frameworks for the Fast Fourier Transform", 1992), half of that for real numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from passes.ir.graph import Signature
from passes.ir.rule import Dim, Rule
from passes.rules.factors import Factors, is_complex
from passes.rules.registry import rule


@dataclass(frozen=True, slots=True)
class _Kernel:
    """core: how many trailing dims of the first operand are one problem. flops: of an m x n one."""

    core: int
    flops: Callable[[int, int], float]


def _qr_flops(m: int, n: int) -> float:
    k = min(m, n)
    return 2.0 * m * n * k - 2.0 * k**3 / 3.0


def _svd_flops(m: int, n: int) -> float:
    m, n = max(m, n), min(m, n)
    return 4.0 * m * m * n + 8.0 * m * n * n + 9.0 * n**3


_KERNELS = {
    "cholesky": _Kernel(2, lambda m, n: n**3 / 3.0),
    "cholesky_update": _Kernel(2, lambda m, n: 4.0 * n * n),
    "eig": _Kernel(2, lambda m, n: 25.0 * n**3),
    "eigh": _Kernel(2, lambda m, n: 9.0 * n**3),
    "geqp3": _Kernel(2, _qr_flops),
    "geqrf": _Kernel(2, _qr_flops),
    "hessenberg": _Kernel(2, lambda m, n: 10.0 * n**3 / 3.0),
    "householder_product": _Kernel(2, _qr_flops),
    "lu": _Kernel(2, lambda m, n: m * n * min(m, n) - min(m, n) ** 3 / 3.0),
    "lu_pivots_to_permutation": _Kernel(1, lambda m, n: float(n)),
    "ormqr": _Kernel(2, lambda m, n: 4.0 * m * n * n),
    "qr": _Kernel(2, lambda m, n: 2.0 * _qr_flops(m, n)),
    "schur": _Kernel(2, lambda m, n: 25.0 * n**3),
    "svd": _Kernel(2, _svd_flops),
    "tridiagonal": _Kernel(2, lambda m, n: 4.0 * n**3 / 3.0),
}


def _batched(s: Signature, core: int, flops: float, linear: tuple[tuple[int, ...], ...]) -> Rule:
    """Parallel batch dims on every operand and result that has them, the rest whole."""
    rank = len(s.operands[0].shape) - core
    batch = s.operands[0].shape[:rank]
    f = Factors()
    dims = f.parallel_dims(batch)

    def tensor(shape: tuple[int, ...]) -> tuple[Dim, ...]:
        shared = shape[:rank] == batch
        return dims + f.whole_dims(shape[rank:]) if shared else f.whole_dims(shape)

    operands = [tensor(t.shape) for t in s.operands]
    results = [tensor(t.shape) for t in s.results]
    return f.rule(operands, results, linear=linear, flops=math.prod(batch) * flops)


def _scale(s: Signature) -> float:
    """A complex multiply-add is four real ones."""
    return 4.0 if is_complex(s.operands[0]) else 1.0


@rule(*_KERNELS)
def factorisation(s: Signature) -> Rule:
    """`b m n -> b m n, b n` and the like, m and n whole."""
    kernel = _KERNELS[s.name]
    m, n = (1, *s.operands[0].shape)[-2:]
    return _batched(s, kernel.core, _scale(s) * kernel.flops(m, n), ())


@rule("fft")
def fft(s: Signature) -> Rule:
    """Transforms the last dims, one for each of `fft_lengths`."""
    lengths = s.params["fft_lengths"]
    points = math.prod(lengths)
    real = not (is_complex(s.operands[0]) and is_complex(s.results[0]))
    flops = (2.5 if real else 5.0) * points * math.log2(max(2, points))
    return _batched(s, len(lengths), flops, ((0,),))


@rule("symmetric_product")
def symmetric_product(s: Signature) -> Rule:
    """alpha A A^T + beta C: `b n k, b n n -> b n n`, k reduced.

    C counts once: all devices but one add nothing of it.
    """
    *batch, n, k = s.operands[0].shape
    f = Factors()
    dims = f.parallel_dims(batch)
    rows, summed = f.whole(n), f.reduction(k, "add")
    square = (*dims, f.whole(n), f.whole(n))
    flops = 2.0 * _scale(s) * math.prod(batch) * n * n * k
    return f.rule([(*dims, rows, summed), square], [square], flops=flops)


@rule("triangular_solve")
def triangular_solve(s: Signature) -> Rule:
    """`b n n, b n j -> b n j` (`b j n` when the matrix stands on the right)."""
    *batch, rows, columns = s.operands[1].shape
    left = s.params["left_side"]
    f = Factors()
    dims = f.parallel_dims(batch)
    n, sides = (rows, columns) if left else (columns, rows)
    solved, free = f.whole(n), f.parallel(sides)
    right = (*dims, *((solved, free) if left else (free, solved)))
    matrix = (*dims, f.whole(n), f.whole(n))
    flops = _scale(s) * math.prod(batch) * float(n) * n * sides
    return f.rule([matrix, right], [right], linear=((1,),), flops=flops)


@rule("tridiagonal_solve")
def tridiagonal_solve(s: Signature) -> Rule:
    """Three diagonals `b n` and right-hand sides `b n j`, solved by the Thomas algorithm."""
    _, sides = s.operands[3].shape[-2:]
    n = s.operands[0].shape[-1]
    return _batched(s, 1, _scale(s) * (3.0 + 5.0 * sides) * n, ((3,),))
