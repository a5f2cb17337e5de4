"""Which wires do the devices of one mesh axis reach each other by?  A Hop for each level they use.

`cost_models.topology` lays an axis onto a cluster and makes its Route; `cost_models.algorithms`
says what collectives take along it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cost_models.cluster import Level


@dataclass(frozen=True, slots=True)
class Hop:
    """What one level of the network does for the devices of an axis: it joins `groups` groups.

    bandwidth, exchange, shift, latency, sweep, ring: as of Route, through this level. alone:
    bytes/s of one device in an all-gather among these groups only. wires: what tells them apart
    (the dim of a torus; of direct wires how far they lead; of a switch there is but the port of a
    device), and the share of the traffic on each.
    """

    level: Level
    groups: int
    bandwidth: float
    alone: float
    exchange: float
    shift: float
    latency: float
    sweep: float
    ring: bool = True
    wires: tuple[tuple[int, float], ...] = ((0, 1.0),)


@dataclass(frozen=True, slots=True)
class Route:
    """What the devices along one mesh axis, or several used as one, can do together.

    bandwidth: bytes/s one device sends in an all-gather or a reduction, all its directions counted.
    exchange: bytes/s of its own operand that one device can bring to all others in an all-to-all.
    shift: bytes/s it can send to the next device alone. latency: seconds of one step to the next
    device. sweep: seconds of the steps of one all-gather together. startup: seconds once per
    collective. ring: whether the way ends where it began. via: names of the levels it uses. hops:
    the levels, the innermost first.
    """

    size: int
    bandwidth: float
    exchange: float
    shift: float
    latency: float
    sweep: float
    startup: float
    ring: bool
    via: tuple[str, ...]
    hops: tuple[Hop, ...] = field(default=(), repr=False)
