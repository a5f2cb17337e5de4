"""Which part of a value do kernels hand on in VMEM?

XLA:TPU keeps results there (`S(1)` in a compiled program) as they fit beside what it fetches ahead:
what is small, or read soon, more often. Of 6300 results in 110 compiled plans for v5e and v6e
(tests/accuracy; jax 0.10.2, libtpu 0.0.42.1) lay in VMEM, by their size and by the number of
kernels up to the one that reads them last:

    of VMEM        0-3    4-8   9-20   more
    up to 1/5      .89    .80    .72    .64
    up to 3/10     .76    .64    .60    .57
    up to 1/2      .55    .46    .41    .26

A value is priced with the part that is likely to be moved. What is large and waits long is counted
as moved, and so is what is larger: some programs keep all of it there, others nothing. With these
numbers compute of the plans for v5e is 9 % off on average, with all up to a fifth of VMEM handed on
11 %; for v6e 12 % both ways. On v5p hardly anything is handed on (`Fitted.handed_on` is 0).
"""

from __future__ import annotations

from bisect import bisect_left

_KERNELS = (8, 20)  # bounds of the classes of waiting
FAR = len(_KERNELS) + 1  # the class of what is moved in any case

# Up to which share of VMEM, and what stays, by class.
_STAYS = (
    (1 / 8, (0.9, 0.9, 0.7, 0.0)),
    (1 / 5, (0.8, 0.8, 0.6, 0.0)),
    (3 / 10, (0.7, 0.6, 0.0, 0.0)),
)


def waiting(kernels: int) -> int:
    """The class of a value that is read for the last time so many kernels later."""
    return bisect_left(_KERNELS, kernels)


def moved_part(share: float, wait: int) -> float:
    """Which part of a value of this share of VMEM is moved from and to HBM. wait: its class.

    >>> [round(moved_part(share, waiting(2)), 2) for share in (0.1, 0.25, 0.5)]
    [0.1, 0.3, 1.0]
    """
    for most, stays in _STAYS:
        if share <= most:
            return 1.0 - stays[wait]
    return 1.0
