"""What does a TPU hold in its VMEM, so that it takes no room in the HBM?

XLA:TPU hands small results on there (`S(1)` in a compiled program), as they fit beside what it
fetches ahead, in an order of its own. Counted are results of less than an eighth of VMEM each that
are read for the last time within 80 steps, together up to three eighths of it. That brings the
peaks of 182 compiled plans close on v5e, v5p and v6e alike (docs/accuracy.md; jax 0.10.2, libtpu
0.0.42.1): programs of a few hundred MB were counted up to 50 % too large without.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from passes.lent import Span

_EACH, _TOGETHER = 1 / 8, 3 / 8
_SOON = 80


def in_vmem(results: Iterable[Span], steps: int, vmem: float) -> npt.NDArray[np.float64]:
    """Bytes in VMEM at each of the steps.

    >>> in_vmem([Span(0, 2, 1.0), Span(1, 3, 2.5), Span(0, 4, 4.0)], 4, 24.0)
    array([1. , 3.5, 2.5, 0. ])
    """
    change = np.zeros(steps + 1)
    for begin, end, nbytes in results:
        if nbytes < _EACH * vmem and end - begin <= _SOON:
            change[begin] += nbytes
            change[end] -= nbytes
    return np.minimum(np.cumsum(change)[:steps], _TOGETHER * vmem)
