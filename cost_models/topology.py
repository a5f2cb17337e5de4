"""What bandwidth and latency does a mesh axis get?  It depends on the wires it is laid on.

>>> from cost_models.cluster import cluster
>>> data, model = lay(cluster("h100:2x8"), (2, 8))
>>> f"{data.bandwidth / 1e9:.0f} GB/s across nodes, {model.bandwidth / 1e9:.0f} GB/s inside one"
'47 GB/s across nodes, 368 GB/s inside one'

Axes are laid as JAX lays them. On switches (GPUs, CPUs) devices are counted row-major, the last
axis fastest, so that it stays inside a node as long as it fits. On a torus each axis takes whole
torus dims where it can and shares a dim otherwise, the last axis first, as
`jax.experimental.mesh_utils.create_device_mesh(..., allow_split_physical_axes=True)` does; several
slices are split over the slowest axes. The cores of a chip are one more dim, the last. (That is how
jax lays large meshes; TPU v2 and v3, and v7 up to 32 devices, it lays host by host, which we do not
follow.)

What an axis gets on one level (https://jax-ml.github.io/scaling-book/sharding):

* a switch: the device's own bandwidth to it. An axis with k devices in each node has k network
  cards to leave by, so an all-gather over nodes runs at min(NVLink, k * card); an all-to-all cannot
  share cards, since each device's data leave by its own;
* direct wires from each device to each other: an axis with k devices has k - 1 of them;
* links that some devices have to some others (the hybrid cube mesh of eight V100): rings take as
  many as the device of a group with the fewest has inside the group;
* a torus dim of size n that is wrapped: a ring, both directions at once, 2 * link; an open one:
  link. An axis over several dims uses all their links. Where an axis steps over s devices of a dim,
  s such axes share the same links, and each has a share of 1 / s. So do the cores of one chip,
  unless they are in the same group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

from cost_models import algorithms
from cost_models.algorithms import Line
from cost_models.cluster import Cluster, Level
from cost_models.route import Hop, Route


@dataclass(frozen=True, slots=True)
class AxisLink(Route):
    """A Route and what each collective takes along it, see `cost_models.algorithms`."""

    lines: Mapping[str, tuple[Line, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lines", algorithms.lines(self))


ALONE = AxisLink(1, math.inf, math.inf, math.inf, 0.0, 0.0, 0.0, True, ())


def shares(a: AxisLink, b: AxisLink) -> float:
    """The share of what passes along `a` that wires carry which `b` uses too, where it is largest.

    Two collectives at once take between the longer of their times (0) and the sum of them (1).

    >>> from cost_models.cluster import cluster
    >>> x, y = lay(cluster("tpu-v5e:16x16"), (16, 16))  # each has a dim of the torus to itself
    >>> data, model = lay(cluster("h100:2x8"), (4, 4))  # data leaves GPUs by the same NVLinks
    >>> shares(x, y), shares(data, model)
    (0.0, 1.0)
    """
    return max(
        (
            sum((part for wire, part in here.wires if wire in dict(there.wires)), 0.0)
            for here in a.hops
            for there in b.hops
            if here.level == there.level
        ),
        default=0.0,
    )


def lay(cluster: Cluster, sizes: tuple[int, ...]) -> tuple[AxisLink, ...]:
    """The link of each mesh axis, slowest first; raises ValueError when the sizes do not fit."""
    place(cluster, tuple(sizes))  # refuses sizes that do not fit, also when there are none
    return tuple(join(cluster, sizes, (axis,)) for axis in range(len(sizes)))


def join(cluster: Cluster, sizes: tuple[int, ...], axes: tuple[int, ...]) -> AxisLink:
    """The link of several mesh axes (indices) that one collective uses together."""
    whole = math.prod(sizes[a] for a in axes)
    placed = place(cluster, tuple(sizes))
    if whole == 1:
        return ALONE
    together = [min(whole, math.prod(reach[a] for a in axes)) for reach in placed.reach]
    hops: list[Hop] = []
    below, inside = 1, 1  # inside: devices of any axis that one end of a wire stands for
    for level, sizes_here, now in zip(
        reversed(cluster.network), reversed(cluster.extents), together, strict=True
    ):
        # Of the whole - 1 steps of a ring through all; on a torus chips step together.
        steps = now // below - 1 if placed.factors else whole // below - whole // now
        if now == below:
            pass  # no two of its devices meet at this level for the first time
        elif level.kind == "torus":
            factors = [placed.factors[a] for a in axes]
            hops.append(_on_torus(level, sizes_here, factors, below, inside))
        elif level.kind == "direct":
            ways = {math.prod(sizes[a + 1 :]): placed.reach[0][a] for a in axes}
            hops.append(_on_direct(level, whole, now, steps, ways))
        elif level.kind == "links":
            groups = _groups(sizes, axes, sizes_here[0])
            hops.append(_on_links(level, whole, now, steps, groups))
        elif placed.factors and inside == 1:
            hops.append(_on_chip(level, whole, now))
        else:
            hops.append(_on_switch(level, whole, now, below, steps, outer=inside > 1))
        below, inside = now, inside * math.prod(sizes_here)
    return AxisLink(
        size=whole,
        bandwidth=min(h.bandwidth for h in hops),
        exchange=min(h.exchange for h in hops),
        shift=min(h.shift for h in hops),
        latency=max(h.latency for h in hops),
        sweep=sum(h.sweep for h in hops),
        startup=max(h.level.startup for h in hops),
        ring=all(h.ring for h in hops),
        via=tuple(h.level.name for h in hops),
        hops=tuple(hops),
    )


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the axes lie. reach[level][axis]: how many of an axis's devices are joined up to there.

    Levels run from the innermost. factors[axis][dim]: on a torus, the part of each torus dim that
    the axis takes, and the step it takes in it.
    """

    reach: tuple[tuple[int, ...], ...]
    factors: tuple[tuple[tuple[int, int], ...], ...] = ()


@lru_cache(maxsize=1024)
def place(cluster: Cluster, sizes: tuple[int, ...]) -> Placement:
    """Lay mesh axes onto the levels of a cluster; raises ValueError when they do not fit."""
    if any(n < 1 for n in sizes) or math.prod(sizes) != cluster.devices:
        raise ValueError(
            f"a mesh of {' x '.join(map(str, sizes)) or 'no axes'} has {math.prod(sizes)} devices, "
            f"but {cluster} has {cluster.devices}"
        )
    for at, level in enumerate(cluster.network):
        if level.kind == "torus":
            return _place_on_torus(cluster, sizes, at)
    strides = [math.prod(sizes[a + 1 :]) for a in range(len(sizes))]
    spans = itertools.accumulate((e[0] for e in reversed(cluster.extents)), lambda a, b: a * b)
    return Placement(
        tuple(
            tuple(_within(n, s, span) for n, s in zip(sizes, strides, strict=True))
            for span in spans
        )
    )


def _within(size: int, stride: int, span: int) -> int:
    """How many devices of an axis lie in one block of `span` devices in a row.

    One, the most expensive case, where blocks and axis do not divide each other.
    """
    reach = size * stride
    if span % reach == 0:
        return size
    if span % stride == 0 and reach % span == 0:
        return span // stride
    return 1


def _place_on_torus(cluster: Cluster, sizes: tuple[int, ...], at: int) -> Placement:
    """Slices over the slowest axes, then the torus dims of one slice over what is left."""
    reach: list[tuple[int, ...]] = [sizes]
    inner = list(sizes)
    for extent in cluster.extents[:at]:  # the outermost level joins all that is not split by it
        left = extent[0]
        for axis, size in enumerate(inner):
            taken = math.gcd(size, left)
            inner[axis], left = size // taken, left // taken
        reach.insert(0, tuple(inner))
    torus, cores = cluster.extents[at], sum(cluster.extents[at + 1 :], ())
    takes = assign(torus + cores, tuple(inner))
    for k in range(len(torus), len(torus + cores)):
        reach.insert(len(torus + cores) - 1 - k, tuple(math.prod(t[k:]) for t in takes))
    factors = []
    for axis, take in enumerate(takes):
        steps = (math.prod(t[dim] for t in takes[axis + 1 :]) for dim in range(len(torus)))
        factors.append(tuple(zip(take, steps, strict=False)))
    return Placement(tuple(reach), tuple(factors))


def assign(dims: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Per mesh axis the factor it takes of each torus dim, chosen as jax's mesh_utils chooses.

    The last axis chooses first: whole dims before parts of them, then more dims, then the first.

    >>> assign((4, 4), (2, 8))
    ((1, 2), (4, 2))
    """
    left = dims
    takes: list[tuple[int, ...]] = []
    for size in reversed(sizes):
        best = max(_splits(size, left), key=partial(_preference, dims, left))
        left = tuple(r // t for r, t in zip(left, best, strict=True))
        takes.insert(0, best)
    return tuple(takes)


def _preference(
    dims: tuple[int, ...], left: tuple[int, ...], take: tuple[int, ...]
) -> tuple[object, ...]:
    """The order in which jax's mesh_utils likes the ways of one axis, the best the largest."""
    full = [t for t, d in zip(take, dims, strict=True) if t == d]
    begun = [t for t, d, r in zip(take, dims, left, strict=True) if r < d]
    return math.prod(full), sum(t > 1 for t in full), math.prod(begun), take


def _splits(size: int, left: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All ways to write `size` as a product of one divisor of each number left."""
    if not left:
        if size == 1:
            yield ()
        return
    for first in range(1, math.gcd(size, left[0]) + 1):
        if size % first == 0 and left[0] % first == 0:
            for rest in _splits(size // first, left[1:]):
                yield (first, *rest)


def _on_switch(
    level: Level, whole: int, together: int, below: int, steps: int, *, outer: bool
) -> Hop:
    """The part of a switch: it joins groups of `below` devices of the axis to groups of `together`.

    An inner switch carries only what stays under it; through an outer one goes all that leaves.
    """
    port = level.bandwidth * level.efficiency
    through = (whole - below if outer else together - 1) / whole
    return Hop(
        level, together // below, below * port, port, port / through, port, level.latency,
        steps * level.latency,
    )  # fmt: skip


def _on_chip(level: Level, whole: int, together: int) -> Hop:
    """The part of a chip below a torus: each core passes on what its own links brought, no more."""
    port = level.bandwidth * level.efficiency
    bandwidth = port * (whole - 1) / whole * together / (together - 1)
    exchange = port * whole / (together - 1)
    return Hop(
        level, together, bandwidth, port, exchange, port, level.latency,
        (together - 1) * level.latency,
    )  # fmt: skip


def _on_direct(level: Level, whole: int, together: int, steps: int, ways: Mapping[int, int]) -> Hop:
    """The part of wires from each device to each other: one to every device of the axis.

    ways: how many devices each axis joins here, by the step that it takes, which tells its wires.
    """
    wire = level.bandwidth * level.efficiency
    own = {step: (n - 1) / (together - 1) for step, n in ways.items() if n > 1}
    own[0] = 1 - sum(own.values())  # between devices that differ along several of the axes
    return Hop(
        level, together, (together - 1) * wire, (together - 1) * wire, whole * wire, wire,
        level.latency, steps * level.latency, wires=tuple((w, x) for w, x in own.items() if x > 0),
    )  # fmt: skip


def _groups(sizes: Sequence[int], axes: Sequence[int], count: int) -> list[list[int]]:
    """The first `count` devices, those that differ only along these axes together."""
    found: dict[tuple[int, ...], list[int]] = {}
    for device, place in enumerate(itertools.islice(itertools.product(*map(range, sizes)), count)):
        rest = tuple(p for axis, p in enumerate(place) if axis not in axes)
        found.setdefault(rest, []).append(device)
    return list(found.values())


def _on_links(
    level: Level, whole: int, together: int, steps: int, groups: Sequence[Sequence[int]]
) -> Hop:
    """The part of links between some devices, where the group that has the fewest decides.

    Devices that are not linked go through others or the host: half a link's worth, an assumption.
    """
    fewest = min(sum(level.links[a][b] for b in group) for group in groups for a in group)
    link = level.bandwidth * level.efficiency
    port = max(fewest, 0.5) * link
    through = (together - 1) / whole
    return Hop(
        level, together, port, port, port / through, min(port, link), level.latency,
        steps * level.latency,
    )  # fmt: skip


def _on_torus(
    level: Level,
    dims: Sequence[int],
    factors: Sequence[Sequence[tuple[int, int]]],
    below: int,
    cores: int,
) -> Hop:
    """The part of a torus: the links of every dim the axes take a part of, used at once.

    Of the devices on one chip, its cores, `below` are in the same group and use the links for it.
    """
    link = level.bandwidth * level.efficiency * below / cores
    exchange, shift, hops, latency, size = math.inf, math.inf, 0, 0.0, 1
    rings, used = [], {}
    for dim, wrapped in enumerate(level.rings(dims)):
        taken = [axis[dim] for axis in factors if axis[dim][0] > 1]
        if not taken:
            continue
        n, stride = math.prod(t for t, _ in taken), min(s for _, s in taken)
        if stride * n != max(t * s for t, s in taken):
            stride = max(s for _, s in taken)  # parts with a gap between them: as far as the widest
        ring = wrapped and n * stride == dims[dim]
        used[dim] = (2 * link if ring else link) / stride
        exchange = min(exchange, used[dim] * n / (n * n // 4))
        shift = min(shift, link / stride)
        hops += stride * (n // 2 if ring else n - 1)
        latency = max(latency, stride * level.latency)
        size *= n
        rings.append(ring)
    bandwidth = sum(used.values())
    return Hop(
        level, size, bandwidth, bandwidth / below, exchange / below, shift, latency,
        hops * level.latency, all(rings), tuple((d, u / bandwidth) for d, u in used.items()),
    )  # fmt: skip
