"""Which values lie in the memory of a result that is not there yet?

A result that takes no argument's place has memory of its own from the first step, and one that does
leaves it idle from the argument's last read on. XLA lends it, for GPUs and for TPUs: it places
values from the largest to the smallest, each into the first buffer that is as large and free while
the value lives, before it looks for new memory (`BufferAssigner`, as its compiled programs show).
Scores of attention in a forward pass lie where the logits will be, and what layers keep for their
backward pass where gradients will be that are as large; what is larger than each of them has memory
of its own. With that, what lives at each step of a compiled program for TPU, and is not placed in
VMEM, was XLA's own peak to the MiB (or less than its VMEM, where XLA reports that): gradients of
24 layers, given away or not, and a scan (v5p), two steps of mixtures of experts (v5e, v6e). An
MLP's step for v6e with much given away was 352 MiB beyond its arguments, 288 so counted, and 576
without (jax 0.10.2, libtpu 0.0.42.1).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

# What is smaller than this part of the memory that could be lent makes no difference.
_LEAST = 1 / 256


class Span(NamedTuple):
    """Bytes over the steps [begin, end)."""

    begin: int
    end: int
    nbytes: float


def lent(idle: Sequence[Span], needed: Sequence[Span]) -> frozenset[int]:
    """Places in `needed` of what lies in idle memory, one value at a time in each piece of it.

    >>> idle = [Span(0, 9, 4.0)]  # free until step 9
    >>> sorted(lent(idle, [Span(1, 3, 4.0), Span(2, 5, 3.0), Span(3, 6, 2.0), Span(8, 10, 1.0)]))
    [0, 2]
    """
    pieces = sorted(idle, key=lambda s: -s.nbytes)
    taken: list[list[tuple[int, int]]] = [[] for _ in pieces]
    least = _LEAST * sum(s.nbytes for s in pieces)
    out = set()
    for k in sorted(range(len(needed)), key=lambda k: (-needed[k].nbytes, k)):
        begin, end, nbytes = needed[k]
        if nbytes < least or not pieces or nbytes > pieces[0].nbytes:
            continue
        for piece, spans in zip(pieces, taken, strict=True):
            if nbytes > piece.nbytes:
                break
            if not piece.begin <= begin or end > piece.end:
                continue
            at = bisect_left(spans, (begin, end))
            after = at == len(spans) or spans[at][0] >= end
            if after and (not at or spans[at - 1][1] <= begin):
                spans.insert(at, (begin, end))
                out.add(k)
                break
    return frozenset(out)
