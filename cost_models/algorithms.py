"""Which algorithms may run a collective along a mesh axis, and how long would each take?

Each is a line over the bytes: startup + per_byte * nbytes. A library runs the one that is quickest
for the size, so that what a collective takes is the lowest of its lines. Small ones take the line
with the least startup and large ones the line with the most bandwidth; that is how efficiency comes
to depend on size.

With n devices, b bytes of the larger of the local operand and the local result:

* ring: n - 1 steps, each device sends (n - 1) / n * b; an all-reduce is two such. On a torus both
  ways round and over all dims at once, which is in `Route.bandwidth`.
* stages: an all-gather across the slices first, of one device's part, then inside each slice; a
  reduce-scatter the other way round; an all-reduce both. The slow level has few steps.
* exchange, neighbours: an all-to-all, a permute.

GPUs run NCCL, and XLA leaves the choice to it. Its own model (github.com/NVIDIA/nccl, v2.28.3-1,
src/graph/tuning.cc) has three protocols: LL sends a flag with every four bytes, so that steps are
short and half of the bandwidth or more is lost; LL128 a flag with every 120, over NVLink alone;
Simple has long steps and all the bandwidth. And beside the ring:

* tree: an all-reduce along a chain in each node and up and down two binary trees across nodes,
  2 * log2(nodes) steps on the network in place of 2 * (nodes - 1);
* switch: the NVSwitch adds up (NVLink SHARP); across nodes with the tree above it.

Left out: PAT, and limits that NCCL puts on the channels of a tree.

>>> from cost_models.cluster import cluster
>>> from cost_models.topology import lay
>>> (gpus,) = lay(cluster("h100:8"), (8,))
>>> [name for _, _, name in gpus.lines["all_reduce"]]
['ring LL', 'switch', 'switch']
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from cost_models.route import Hop, Route

Line = tuple[float, float, str]  # seconds, seconds per byte, the algorithm
_KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute", "broadcast")

# Of NCCL, seconds: [LL, LL128, Simple], baseLatencies and hwLatencies of v2.28.3-1 (as above).
_PROTOCOLS = ("LL", "LL128", "Simple")
_US = 1e-6
_RING_BASE = (6.6 * _US, 14 * _US, 8.4 * _US)
_TREE_BASE = (6.8 * _US, 14 * _US, 8.4 * _US)
_RING_STEP: Mapping[str, tuple[float, ...]] = {
    "nvlink": (0.6 * _US, 1.9 * _US, 3.4 * _US),
    "pcie": (1.0 * _US, 2.5 * _US, 5.7 * _US),
    "network": (2.7 * _US, 4.0 * _US, 14 * _US),
}
_TREE_STEP: Mapping[str, tuple[float, ...]] = {
    "nvlink": (0.6 * _US, 1.25 * _US, 4.0 * _US),
    "pcie": (1.0 * _US, 1.9 * _US, 4.0 * _US),
    "network": (5.0 * _US, 8.5 * _US, 14 * _US),
}
_SWITCH = 25 * _US  # NVLS and NVLSTree, on NVLink
_SWITCH_TREE_STEP = 14 * _US  # NVLSTree, on the network
_POST = 1 * _US  # getNetOverhead: no step of a ring across nodes is shorter, of Simple 3 times
# Of the ring's bandwidth: what LL and LL128 leave of it, and a tree of them.
_RING_SHARE = (1 / 2, 0.92, 1.0)
_TREE_SHARE = (0.92 / 3.8, 0.92 * 120 / 128, 0.92)
_CHAIN_SHARE = (0.92 / 3.8, 0.92 * 7 / 9, 0.92)  # within one node
# treeCorrectionFactor: NCCL takes trees for 0.4 to 0.7 as fast from 128 KiB to 16 MiB, where they
# may win; beyond, where they reach their bandwidth, rings do.
_TREE_FILLED = 0.5
# Fitted, not published: to the 17 rows of tests/data/h200_all_reduce.csv, which it follows within
# 15 %. Until its pipeline is full, for 50 us, a switch adds up at 0.65 of its rate.
_SWITCH_FILLING, _SWITCH_FILLED = 50 * _US, 0.65
# Likewise rings inside a node, where a cluster file says how long they fill: the share is fitted,
# with A100's time, to the rows from 8 MiB to 2 GiB of 8 A100 (nccl-tests, ring) in
# tests/data/collective_bandwidth.csv, which they follow within 20 %, and without it within 36 %.
_RING_FILLED = 0.75


def lines(link: Route) -> dict[str, tuple[Line, ...]]:
    """Per collective the lines that are lowest for some size, the least startup first."""
    if link.size == 1:
        return {kind: ((0.0, 0.0, "nothing"),) for kind in _KINDS}
    return {kind: _lowest(found) for kind, found in forms(link).items()}


def forms(link: Route) -> dict[str, list[Line]]:
    """Per collective every algorithm that may run it."""
    n = link.size
    nccl = any(hop.level.wire for hop in link.hops)
    once = list(_nccl(link) if nccl else _rings(link))
    twice = list(_nccl_all_reduce(link) if nccl else _doubled(link, once))
    return {
        "all_gather": once,
        "reduce_scatter": once,
        "all_reduce": twice,
        "all_to_all": [(link.startup + link.sweep, 1 / link.exchange, "exchange")],
        "permute": [(link.startup + link.latency, 1 / link.shift, "neighbours")],
        # Each device passes on what it gets while more comes in.
        "broadcast": [(a, s * n / (n - 1), name) for a, s, name in once],
    }


def _lowest(found: list[Line]) -> tuple[Line, ...]:
    """The lines that are below all others for some size."""
    out: list[Line] = []
    for line in sorted(found):
        if out and line[1] >= out[-1][1]:
            continue  # starts later and is no faster
        while len(out) > 1 and _meet(out[-2], line) <= _meet(out[-2], out[-1]):
            out.pop()
        out.append(line)
    return tuple(out)


def _meet(first: Line, then: Line) -> float:
    """The size from which the second line, which starts later, is lower."""
    return (then[0] - first[0]) / (first[1] - then[1])


# Rings and stages


def _rings(link: Route) -> Iterator[Line]:
    """An all-gather through all devices at once, and level by level."""
    n = link.size
    yield link.startup + link.sweep, (n - 1) / n / link.bandwidth, "ring"
    if len(link.hops) > 1:
        startup, per_byte, part = 0.0, 0.0, 1.0
        for hop in link.hops:  # from the innermost, where the result is largest
            startup += hop.level.startup + hop.sweep
            per_byte += (hop.groups - 1) / hop.groups * part / hop.alone
            part /= hop.groups
        yield startup, per_byte, "stages"


def _doubled(link: Route, once: list[Line]) -> Iterator[Line]:
    """An all-reduce as a reduce-scatter and an all-gather in one; stages start one by one."""
    for startup, per_byte, name in once:
        again = startup - link.startup if name == "ring" else startup
        yield startup + again, 2 * per_byte, name


# NCCL


def _nccl(link: Route) -> Iterator[Line]:
    """An all-gather or a reduce-scatter."""
    n = link.size
    for p, _ in _protocols(link):
        startup = _start(_RING_BASE, p, link) + _ring_steps(link, p)
        yield from _ring(link, p, startup, (n - 1) / n)
    if _in_switch(link) and len(link.hops) == 1:
        yield from _switch(_SWITCH, 1 / _in_switch(link), "switch")


def _nccl_all_reduce(link: Route) -> Iterator[Line]:
    n = link.size
    for p, name in _protocols(link):
        startup = _start(_RING_BASE, p, link) + 2 * _ring_steps(link, p)
        yield from _ring(link, p, startup, 2 * (n - 1) / n)
        startup = _start(_TREE_BASE, p, link) + 2 * _tree_steps(link, p)
        yield startup, 2 / _tree_rate(link, p), f"tree {name}"
    rate = _in_switch(link)
    if rate and len(link.hops) == 1:
        yield from _switch(_SWITCH, 1 / rate, "switch")
    elif rate:
        per_byte = max(1 / rate, 2 * (n - 1) / n / link.bandwidth)
        yield from _switch(_SWITCH + _switch_tree_steps(link.hops[-1]), per_byte, "switch tree")


def _ring(link: Route, p: int, startup: float, share: float) -> Iterator[Line]:
    """Full, and inside a node while it fills; share: of the array, what passes each device."""
    per_byte, name = share / _ring_rate(link, p), f"ring {_PROTOCOLS[p]}"
    filling = link.hops[0].level.filling if len(link.hops) == 1 and p > 0 else 0.0
    if filling:
        yield startup, per_byte / _RING_FILLED, name
    yield startup + filling, per_byte, name


def _switch(startup: float, per_byte: float, name: str) -> Iterator[Line]:
    """Full, and while it fills."""
    yield startup, per_byte / _SWITCH_FILLED, name
    yield startup + _SWITCH_FILLING, per_byte, name


def _switch_tree_steps(across: Hop) -> float:
    """Up to the root of the tree across nodes and down again."""
    late = across.level.latency - _RING_STEP[across.level.wire or "network"][0]
    return 2 * _log2(across.groups) * max(0.0, _SWITCH_TREE_STEP + late)


def _protocols(link: Route) -> Iterator[tuple[int, str]]:
    for p, name in enumerate(_PROTOCOLS):
        if name != "LL128" or all(hop.level.wire != "pcie" for hop in link.hops):
            yield p, name


def _ring_steps(link: Route, p: int) -> float:
    """Seconds of the n - 1 steps of a ring, most of them between neighbours in a node."""
    total, left = 0.0, link.size - 1
    across = len(link.hops) > 1
    # With one GPU in each node no other one works while the network does: as slow as in a tree.
    steps_of = _RING_STEP if across or link.hops[0].level.wire != "network" else _TREE_STEP
    for hop in reversed(link.hops):
        steps = left if hop is link.hops[0] else hop.groups - 1
        least = _POST * (3 if p == 2 else 1) if across else 0.0
        total += steps * max(least, _step(steps_of, hop.level.wire, p, hop.level.latency))
        left -= steps
    return total


def _tree_steps(link: Route, p: int) -> float:
    """Seconds from the end of a chain in a node up to the root of the tree across nodes."""
    return sum(
        (_log2(hop.groups) if hop.level.wire == "network" else hop.groups - 1)
        * _step(_TREE_STEP, hop.level.wire, p, hop.level.latency)
        for hop in link.hops
    )


def _start(base: tuple[float, ...], p: int, link: Route) -> float:
    """Seconds before the first step; a cluster file's other startup shifts all of them."""
    return max(0.0, base[p] + link.startup - _RING_BASE[0])


def _step(table: Mapping[str, tuple[float, ...]], wire: str, p: int, latency: float) -> float:
    """Seconds of a step; a cluster file's other latency shifts all of them."""
    if not wire:
        return latency
    return max(0.0, table[wire][p] + latency - _RING_STEP[wire][0])


def _ring_rate(link: Route, p: int) -> float:
    return min(link.bandwidth * _RING_SHARE[p], _most(link) if p == 0 else math.inf)


def _tree_rate(link: Route, p: int) -> float:
    share = _CHAIN_SHARE if len(link.hops) == 1 else _TREE_SHARE
    return _TREE_FILLED * min(link.bandwidth * share[p], _most(link) if p == 0 else math.inf)


def _most(link: Route) -> float:
    """What LL reaches at most: how fast a GPU, across nodes a CPU, takes data with flags."""
    return link.hops[-1].level.ll_bandwidth or math.inf


def _in_switch(link: Route) -> float:
    """Bytes of an array that the innermost switch adds up in a second; 0 where it does not."""
    return link.hops[0].level.in_switch


def _log2(n: int) -> int:
    return (n - 1).bit_length()
