"""How many seconds does a collective take along a mesh axis, and how many bytes does a device send?

The alpha-beta model (Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication
Operations in MPICH", 2005; https://jax-ml.github.io/scaling-book/sharding for rings and tori), over
n devices and b bytes, where b is the larger of the local operand and the local result. In a ring:

    all_gather, reduce_scatter   startup +     sweep +     (n - 1) / n * b / bandwidth
    all_reduce                   startup + 2 * sweep + 2 * (n - 1) / n * b / bandwidth
    broadcast                    startup +     sweep +                   b / bandwidth
    all_to_all                   startup +     sweep +                   b / exchange
    permute                      startup +   latency +                   b / shift

`cost_models.topology` says what bandwidth, exchange, shift and latencies are, and
`cost_models.algorithms` which other forms there are; the quickest for the size is taken. An
all-to-all on a ring moves each byte over n / 4 links on average, so exchange = 4 / n * bandwidth: a
quarter of the time of an all-gather of the same array, whose local result is n times as large. On a
switch exchange = n / (n - 1) * bandwidth.

>>> from cost_models.cluster import cluster
>>> from cost_models.topology import lay
>>> rows, columns = lay(cluster("tpu-v5e:16x16"), (16, 16))
>>> f"{seconds('all_gather', 34e6, columns) * 1e6:.0f} us"
'367 us'
>>> (gpus,) = lay(cluster("h200:8"), (8,))
>>> [chosen("all_reduce", nbytes, gpus) for nbytes in (2**15, 2**24)]
['ring LL', 'switch']
"""

from __future__ import annotations

import math
from typing import Literal

from cost_models.topology import AxisLink

Collective = Literal[
    "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute", "broadcast"
]
COLLECTIVES: tuple[Collective, ...] = (
    "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute", "broadcast",
)  # fmt: skip


def seconds(kind: Collective, nbytes: float, link: AxisLink) -> float:
    """Seconds of one collective; nbytes: of the larger of its local operand and local result."""
    try:
        lines = link.lines[kind]
    except KeyError:
        raise _unknown(kind) from None
    if nbytes <= 0:
        return 0.0
    least = math.inf
    for startup, per_byte, _ in lines:  # asked for very often: no generator
        time = startup + per_byte * nbytes
        if time < least:
            least = time
    return least


def chosen(kind: Collective, nbytes: float, link: AxisLink) -> str:
    """The algorithm that is quickest for this size, such as `ring LL`."""
    if kind not in link.lines:
        raise _unknown(kind)
    return min(link.lines[kind], key=lambda line: line[0] + line[1] * nbytes)[2]


def sent_bytes(kind: Collective, nbytes: float, size: int) -> float:
    """Bytes of its own that one of `size` devices sends; nbytes as for `seconds`.

    As in a ring: where a switch adds up, an all-reduce sends about half of that.
    """
    if size == 1:
        return 0.0
    if kind == "permute":
        return nbytes
    share = (size - 1) / size * nbytes
    if kind in ("all_gather", "reduce_scatter", "all_to_all", "broadcast"):
        return share
    if kind == "all_reduce":
        return 2 * share
    raise _unknown(kind)


def _unknown(kind: str) -> ValueError:
    return ValueError(f"no collective is called {kind!r}; there are {', '.join(COLLECTIVES)}")
