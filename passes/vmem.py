"""What does a TPU hold in its VMEM, so that it takes no room in the HBM?

XLA:TPU hands results on there (`S(1)` in a compiled program), as they fit beside what it fetches
ahead, in an order of its own. Counted are results of less than an eighth of VMEM each that are read
for the last time within 80 steps, together up to three eighths of it; and larger ones, up to half
of it, that are read within 4, beside them up to six tenths. Of the results that are used up so soon
four in five lie there, of those that wait longer fewer the larger they are. That brings the peaks
of 132 compiled plans close on v5e and v6e (docs/accuracy.md; jax 0.10.2, libtpu 0.0.42.1): programs
of a few hundred MB were counted up to 50 % too large without. On v5p it hands hardly anything on
there: one in ten.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from passes.lent import Span

_EACH, _TOGETHER, _SOON = 1 / 8, 3 / 8, 80
_LARGE, _BESIDE, _AT_ONCE = 1 / 2, 6 / 10, 4


def may_lie_there(s: Span, vmem: float) -> bool:
    """Whether a result is small, or soon read, so that it lies in VMEM where there is room."""
    return _small(s, vmem) or _at_once(s, vmem)


def _small(s: Span, vmem: float) -> bool:
    return s.nbytes < _EACH * vmem and s.end - s.begin <= _SOON


def _at_once(s: Span, vmem: float) -> bool:
    return s.nbytes <= _LARGE * vmem and s.end - s.begin <= _AT_ONCE


def in_vmem(results: Iterable[Span], steps: int, vmem: float) -> npt.NDArray[np.float64]:
    """Bytes in VMEM at each of the steps.

    >>> in_vmem([Span(0, 2, 1.0), Span(1, 3, 2.5), Span(0, 4, 4.0)], 4, 24.0)
    array([5. , 7.5, 6.5, 4. ])
    """
    change, large = np.zeros(steps + 1), list[Span]()
    for s in results:
        if _small(s, vmem):
            change[s.begin] += s.nbytes
            change[s.end] -= s.nbytes
        elif _at_once(s, vmem):
            large.append(s)
    inside = np.minimum(np.cumsum(change)[:steps], _TOGETHER * vmem)
    for begin, end, nbytes in sorted(large, key=lambda s: (s.end - s.begin, -s.nbytes, s.begin)):
        if inside[begin:end].max(initial=0.0) + nbytes <= _BESIDE * vmem:
            inside[begin:end] += nbytes
    return inside
