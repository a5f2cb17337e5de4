"""Oracles: jax's own device order, and a count of what passes each wire of a small torus."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.cluster import Cluster, cluster
from cost_models.topology import ALONE, AxisLink, assign, join, lay, place, shares

TORI = [
    "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:8x4", "v5e:16x2", "v5e:16x16", "v5e:3x5", "v6e:8x16",
    "v4:4x4x4", "v4:2x2x4", "v5p:8x4x4", "v4:12x4x4", "v5e:2x4x4", "v5e:3x16x4", "v3:4x4",
    "v2:16x4", "v7:4x4x4", "v7:2x2x2x1",
]  # fmt: skip
SWITCHES = [
    "cpu:8",
    "h100:8",
    "h100:2x8",
    "a100:4x8",
    "h100:3x8",
    "a100-40gb:3x5",
    "h200:1x6",
    "mi300x:2x8",
]


def factorisations(n: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write n as a product of at most three numbers."""
    for a in range(1, n + 1):
        if n % a == 0:
            for b in range(1, n // a + 1):
                if n // a % b == 0:
                    yield a, b, n // a // b


@st.composite
def meshes(draw: st.DrawFn, specs: list[str]) -> tuple[Cluster, tuple[int, ...]]:
    c = cluster(draw(st.sampled_from(specs)))
    return c, draw(st.sampled_from(list(factorisations(c.devices))))


# --- switches ---------------------------------------------------------------------------------


def test_inside_a_node_and_across_nodes() -> None:
    nodes, gpus = lay(cluster("h100:2x8"), (2, 8))
    assert gpus.bandwidth == pytest.approx(450e9 * 0.817)
    assert nodes.bandwidth == pytest.approx(50e9 * 0.94)
    assert (gpus.via, nodes.via) == (("NVLink 4",), ("InfiniBand NDR",))
    assert gpus.latency < nodes.latency


def test_a_straddling_axis_leaves_by_all_cards_of_its_devices() -> None:
    c = cluster("h100:2x8")
    (whole,) = lay(c, (16,))
    assert whole.via == ("NVLink 4", "InfiniBand NDR")
    # Eight cards together are about as fast as NVLink: 376.7 GB/s of bus bandwidth measured over
    # 4 nodes (github.com/stas00/ml-engineering, network/benchmarks; B200, the same cards).
    assert whole.bandwidth == pytest.approx(367.65e9)
    four, inner = lay(c, (4, 4))
    assert four.bandwidth == pytest.approx(2 * 50e9 * 0.94)  # two devices in each node
    assert inner.via == ("NVLink 4",)
    # What one device sends to other nodes in an all-to-all leaves by its own card alone: half.
    assert whole.exchange == pytest.approx(2 * 50e9 * 0.94)
    assert whole.shift == pytest.approx(50e9 * 0.94)
    # Of the 15 steps of a ring through all, one pair of neighbours is in different nodes.
    assert whole.sweep == pytest.approx(14 * 0.6e-6 + 2.7e-6)


def test_sizes_that_do_not_fit_the_nodes_get_the_dearest_case() -> None:
    eight, three = lay(cluster("h100:3x8"), (8, 3))
    assert three.bandwidth == eight.bandwidth == pytest.approx(50e9 * 0.94)
    assert three.via == ("InfiniBand NDR",)


# --- the torus --------------------------------------------------------------------------------


def test_rings_close_where_the_hardware_closes_them() -> None:
    def bandwidths(spec: str, sizes: tuple[int, ...]) -> list[float]:
        return [link.bandwidth / 1e9 for link in lay(cluster(spec), sizes)]

    assert bandwidths("v5e:16x16", (16, 16)) == [90, 90]
    assert bandwidths("v5e:4x4", (4, 4)) == [45, 45]
    assert bandwidths("v5e:8x16", (8, 16)) == [45, 90]  # scaling book: wraps its longer axis only
    assert bandwidths("v4:4x4x4", (4, 4, 4)) == [90, 90, 90]
    assert bandwidths("v4:2x2x4", (4, 4)) == [
        45,
        90,
    ]  # no full cube: a line of 4, a square of 2 x 2
    assert bandwidths("v4:4x4x8", (4, 4, 8)) == [90, 90, 90]
    assert bandwidths("v5e:16x16", (256,)) == [180]
    assert bandwidths("v4:4x4x4", (4, 16)) == [90, 180]


def test_a_shared_dim() -> None:
    outer, inner, other = lay(cluster("v5e:16x16"), (4, 4, 16))
    assert other.ring
    assert (inner.ring, inner.bandwidth) == (False, 45e9)  # four in a row
    assert (outer.ring, outer.bandwidth) == (True, 90e9 / 4)  # four of them on each link
    assert (outer.latency, inner.latency) == (4e-6, 1e-6)
    assert join(cluster("v5e:16x16"), (4, 4, 16), (0, 1)).bandwidth == 90e9  # the whole dim again


def test_slices_are_split_over_the_slowest_axis_and_pay_for_it() -> None:
    data, model = lay(cluster("v5e:2x4x4"), (8, 4))
    assert model.via == ("ICI",)
    assert data.via == ("ICI", "DCN")
    assert data.bandwidth == 4 * 3.125e9  # four chips of each slice leave by their own cards
    only, _ = lay(cluster("v5e:2x4x4"), (2, 16))
    assert only.via == ("DCN",)


def test_the_cores_of_a_chip_share_its_links() -> None:
    c = cluster("v3:32x4")
    column, row, core = lay(c, (32, 4, 2))
    assert core.via == ("chip",)
    assert core.bandwidth == 225e9
    # Two groups, one for each core, go through every link at once.
    assert (column.bandwidth, row.bandwidth) == (2 * 82e9 / 2, 82e9 / 2)
    assert column.exchange == pytest.approx(2 * 82e9 * 4 / 32 / 2)
    both = join(c, (32, 4, 2), (0, 2))  # both cores in the same group
    assert both.via == ("chip", "ICI")
    assert both.bandwidth == 2 * 82e9
    assert both.exchange == column.exchange
    # As quick as the chips would be alone, each with the array of both its cores.
    assert both.sweep == pytest.approx(16 * 1e-6 + 0.5e-6)
    assert [link.via for link in lay(cluster("v3:2x4x4"), (4, 16))] == [
        ("chip", "DCN"),
        ("ICI",),
    ]


def test_direct_wires_are_used_all_at_once() -> None:
    c = cluster("mi300x:8")
    (eight,) = lay(c, (8,))
    assert eight.bandwidth == pytest.approx(7 * 64e9 * 0.698)
    two, four = lay(c, (2, 4))
    # Measured: 47.671 GB/s among 2 GPUs and 312.912 among 8 (github.com/stas00/ml-engineering,
    # network, "Peer-to-peer bandwidth").
    assert two.bandwidth == pytest.approx(47.671e9, rel=0.07)
    assert eight.bandwidth == pytest.approx(312.912e9, rel=0.01)
    assert four.bandwidth == pytest.approx(3 * 64e9 * 0.698)
    assert four.exchange == pytest.approx(4 * 64e9 * 0.698)
    assert eight.shift == two.shift == two.bandwidth


@dataclass(frozen=True)
class FakeDevice:
    """As much of a jax device as `create_device_mesh` looks at."""

    id: int
    coords: tuple[int, ...]
    platform: str = "tpu"
    device_kind: str = "TPU v4"  # a kind for which jax has no order of its own
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


@settings(deadline=None, max_examples=60)
@given(meshes(["v4:4x4x4", "v4:2x2x4", "v4:4x4x1", "v4:8x4x2", "v4:12x4x4", "v4:6x2x1"]))
def test_axes_lie_where_jax_puts_them(case: tuple[Cluster, tuple[int, ...]]) -> None:
    mesh_utils = pytest.importorskip("jax.experimental.mesh_utils")
    c, sizes = case
    every = itertools.product(*(range(n) for n in c.shape))
    devices = [FakeDevice(k, xyz) for k, xyz in enumerate(every)]
    mesh = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    for axis, factors in enumerate(place(c, sizes).factors):
        along = np.moveaxis(mesh, axis, 0)[:, 0, 0]
        assert {d.coords for d in along} == set(
            itertools.product(*(range(0, n * step, step) for n, step in factors))
        )


@settings(deadline=None, max_examples=30)
@given(meshes(["v7:4x4x4", "v7:4x4x2", "v7:8x4x2"]))
def test_axes_over_cores_lie_where_jax_puts_them(case: tuple[Cluster, tuple[int, ...]]) -> None:
    mesh_utils = pytest.importorskip("jax.experimental.mesh_utils")
    if not pytest.importorskip("jax").__version__.startswith("0.10."):
        pytest.skip("jax 0.12 lays meshes over v7's cores otherwise than 0.10, as `place` does")
    c, sizes = case
    every = itertools.product(*(range(n) for n in (*c.shape, 2)))
    devices = [
        FakeDevice(k, tuple(xyz), device_kind="TPU7x", core_on_chip=core)
        for k, (*xyz, core) in enumerate(every)
    ]
    mesh = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    placed = place(c, sizes)
    for axis, factors in enumerate(placed.factors):
        along = np.moveaxis(mesh, axis, 0)[:, 0, 0]
        assert {d.coords for d in along} == set(
            itertools.product(*(range(0, n * step, step) for n, step in factors))
        )
        assert len({d.core_on_chip for d in along}) == placed.reach[0][axis]


# An all-to-all counted wire by wire -------------------------------------------------------------


def path(a: int, b: int, size: int, ring: bool) -> list[tuple[float, list[tuple[int, int]]]]:
    """Ways from a to b along one dim: a share of the data, and the one-way wires it passes."""
    up = [(k % size, (k + 1) % size) for k in range(a, a + (b - a) % size)]
    down = [(k % size, (k - 1) % size) for k in range(a, a - (a - b) % size, -1)]
    if not ring:
        return [(1.0, up if b > a else down)]
    if len(up) == len(down):
        return [(0.5, up), (0.5, down)]
    return [(1.0, min(up, down, key=len))]


def busiest_wire(c: Cluster, sizes: tuple[int, ...], axes: tuple[int, ...]) -> float:
    """Bytes over the busiest one-way wire when each device has one byte for its group in all."""
    factors, dims = place(c, sizes).factors, c.extents[-1]
    offsets = [
        [
            tuple(sum(x) for x in zip(*parts, strict=True))
            for parts in itertools.product(
                *(
                    itertools.product(*(range(0, n * s, s) for n, s in factors[a]))
                    for a in some
                )
            )
        ] or [(0,) * len(dims)]
        for some in (axes, tuple(a for a in range(len(sizes)) if a not in axes))
    ]  # fmt: skip
    load: Counter[tuple[int, tuple[int, ...], tuple[int, int]]] = Counter()
    wraps = c.network[-1].rings(dims)
    for base in offsets[1]:
        group = [tuple(np.add(base, o)) for o in offsets[0]]
        extent = [max(g[d] for g in group) - min(g[d] for g in group) for d in range(len(dims))]
        for a, b in itertools.permutations(group, 2):
            for dim in range(len(dims)):  # one dim after the other
                if a[dim] == b[dim]:
                    continue
                positions = {g[dim] for g in group}
                step = extent[dim] // (len(positions) - 1)
                ring = wraps[dim] and step * len(positions) == dims[dim]
                at = b[:dim] + a[dim + 1 :]
                for share, wires in path(a[dim], b[dim], dims[dim], ring):
                    for wire in wires:
                        load[dim, at, wire] += share / len(group)
    return max(load.values())


@settings(deadline=None, max_examples=60)
@given(meshes(["v5e:4x4", "v5e:2x8", "v5e:16x2", "v4:4x4x1", "v4:4x4x4", "v5e:3x5", "v5e:6x4"]))
def test_all_to_all_takes_as_long_as_its_busiest_wire(
    case: tuple[Cluster, tuple[int, ...]],
) -> None:
    c, sizes = case
    wire = c.network[-1].bandwidth
    for axis, link in enumerate(lay(c, sizes)):
        if link.size > 1:
            assert busiest_wire(c, sizes, (axis,)) / wire == pytest.approx(1 / link.exchange)


@settings(deadline=None, max_examples=40)
@given(meshes(["v5e:4x4", "v5e:2x8", "v5e:16x2", "v4:4x4x4", "v5e:6x4"]))
def test_axes_joined_over_a_gap_are_never_priced_below_the_wires(
    case: tuple[Cluster, tuple[int, ...]],
) -> None:
    c, sizes = case
    link = join(c, sizes, (0, 2))
    if link.size > 1:
        least = busiest_wire(c, sizes, (0, 2)) / c.network[-1].bandwidth
        assert 1 / link.exchange >= least * (1 - 1e-9)


# --- wires that two axes share ------------------------------------------------------------------


def shared(spec: str, sizes: tuple[int, ...]) -> list[list[float]]:
    links = lay(cluster(spec), sizes)
    return [[round(shares(a, b), 3) for b in links] for a in links]


def test_which_axes_share_wires() -> None:
    assert shared("v5e:4x4", (4, 4)) == [[1, 0], [0, 1]]  # a dim each
    assert shared("v5e:16x1", (4, 4)) == [[1, 1], [1, 1]]  # two parts of one dim
    assert shared("v4:4x4x4", (4, 16)) == [[1, 0], [0, 1]]
    # Both of the first axis' dims at the same speed, one of them the second's too.
    assert shared("v4:4x4x4", (2, 2, 16)) == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert shared("h100:2x8", (2, 8)) == [[1, 0], [0, 1]]  # network cards, NVLink
    assert shared("h100:2x8", (4, 4)) == [[1, 1], [1, 1]]  # the first leaves GPUs by NVLink too
    assert shared("mi300x:8", (2, 4)) == [[1, 0], [0, 1]]  # each pair has a wire of its own
    c = cluster("mi300x:8")
    both, inner = join(c, (2, 4), (0, 1)), lay(c, (2, 4))[1]
    assert (shares(inner, both), shares(both, inner)) == (1, pytest.approx(3 / 7))
    assert shares(lay(cluster("cpu:8"), (8, 1))[0], ALONE) == 0


@settings(deadline=None, max_examples=100)
@given(meshes(TORI + SWITCHES))
def test_an_axis_shares_all_of_its_wires_with_itself(
    case: tuple[Cluster, tuple[int, ...]],
) -> None:
    c, sizes = case
    for a in lay(c, sizes):
        assert shares(a, a) == pytest.approx(1 if a.hops else 0)
        assert all(0 <= shares(a, b) <= 1 + 1e-9 for b in lay(c, sizes))


# --- both ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(meshes(TORI + SWITCHES))
def test_every_mesh_can_be_laid(case: tuple[Cluster, tuple[int, ...]]) -> None:
    c, sizes = case
    links = lay(c, sizes)
    assert [link.size for link in links] == list(sizes)
    for link in (*links, join(c, sizes, (0, 1)), join(c, sizes, (0, 2)), join(c, sizes, (0, 1, 2))):
        check(link, c)


def check(link: AxisLink, c: Cluster) -> None:
    if link.size == 1:
        assert link == ALONE
        return
    ends = {"switch": 1, "direct": 7}  # of one device
    ports = sum(2 * n.bandwidth * ends.get(n.kind, n.dims) for n in c.network)
    assert 0 < link.shift <= link.bandwidth <= ports
    # Reaching every other device cannot be quicker than sending the same bytes once (in a ring; an
    # exchange over direct wires and cards uses both).
    if "Infinity Fabric" not in link.via or len(link.via) == 1:
        assert link.exchange <= link.bandwidth * link.size / (link.size - 1) * (1 + 1e-9)
    assert 0 < link.latency <= link.sweep < 1e-3
    assert link.via


@settings(deadline=None, max_examples=200)
@given(meshes(TORI + SWITCHES))
def test_a_split_axis_gathers_no_faster_than_the_whole(
    case: tuple[Cluster, tuple[int, ...]],
) -> None:
    c, sizes = case
    outer, inner = lay(c, sizes)[:2]
    whole = join(c, sizes, (0, 1))
    if outer.size == 1 or inner.size == 1:
        return

    def gather(link: AxisLink, result: float) -> float:
        return (link.size - 1) / link.size * result / link.bandwidth

    steps = min(
        gather(outer, 1 / inner.size) + gather(inner, 1),
        gather(inner, 1 / outer.size) + gather(outer, 1),
    )
    if len(c.network) == 1:
        assert steps >= gather(whole, 1) * (1 - 1e-9)
    else:
        # Across nodes the ring of the whole sends up to twice what a gather by stages needs.
        assert steps >= gather(whole, 1) / 2


@pytest.mark.parametrize("sizes", [(4, 4), (15,), (), (16, 0), (-4, -4), (32,)])
def test_the_mesh_must_use_every_device(sizes: tuple[int, ...]) -> None:
    c = cluster("cpu:8")
    with pytest.raises(ValueError, match=r"devices, but cpu:8 has 8"):
        lay(c, sizes)


def test_assignment_always_ends() -> None:
    for dims in [(1, 1), (16, 16), (4, 6), (12, 4, 4), (5, 7)]:
        for sizes in factorisations(math.prod(dims)):
            takes = assign(dims, sizes)
            assert [math.prod(t) for t in takes] == list(sizes)
            assert [math.prod(t[d] for t in takes) for d in range(len(dims))] == list(dims)


@pytest.mark.parametrize(
    ("spec", "sizes", "links"),
    [
        # A hybrid cube mesh: two GPUs have one link between them, or two; eight have six each.
        ("v100:2", (2,), (1,)),
        ("v100:4", (4,), (4,)),
        ("v100:8", (8,), (6,)),
        ("v100:8", (2, 4), (1, 4)),
        ("v100:8", (4, 2), (2, 1)),
        ("v100:4", (2, 2), (1, 1)),
        ("v100:8", (2, 2, 2), (1, 1, 1)),
    ],
)
def test_links_of_a_cube_mesh(spec: str, sizes: tuple[int, ...], links: tuple[int, ...]) -> None:
    c = cluster(spec)
    one = c.network[-1].bandwidth * c.network[-1].efficiency
    found = tuple(round(link.bandwidth / one, 3) for link in lay(c, sizes))
    assert found == links
    for axis, n in enumerate(sizes):  # counted once more, by numpy's order of axes
        table, ids = c.network[-1].links, np.arange(c.devices).reshape(sizes)
        groups = np.moveaxis(ids, axis, -1).reshape(-1, n)
        fewest = min(sum(table[a][b] for b in group) for group in groups for a in group)
        assert fewest == links[axis]


def test_links_lead_both_ways() -> None:
    table = cluster("v100:8").network[-1].links
    assert all(table[a][b] == table[b][a] for a in range(8) for b in range(8))
    assert all(sum(row) == 6 for row in table)
