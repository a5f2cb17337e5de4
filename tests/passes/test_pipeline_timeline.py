"""The simulator against longest paths in a graph, and against small cases by hand."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.pipeline.check import faults
from passes.pipeline.generators import eager, gpipe, interleaved, one_f_one_b, two_bp, zb_h1, zb_h2
from passes.pipeline.greedy import greedy
from passes.pipeline.offload import offloaded, spread
from passes.pipeline.schedule import (
    Schedule,
    ScheduleError,
    Task,
    other_way_round,
    straight,
    there_and_back,
)
from passes.pipeline.stage_costs import StageCosts, even
from passes.pipeline.timeline import Timeline, simulate

Node = tuple[int, Task]


def longest_paths(schedule: Schedule, costs: StageCosts) -> dict[Node, float]:
    """When each task begins, by its device: the longest path to it, of all that must come before.

    An edge says how much later than the start of one task another may start.
    """
    lanes = [(d, order) for d, order in enumerate(schedule.orders)]
    lanes += [(d, tuple(t.task for t in order)) for d, order in enumerate(schedule.transfers)]
    takes = {
        (d, t): costs.seconds(t.kind, schedule.piece(d, t)) for d, order in lanes for t in order
    }
    edges = [((d, a), (d, b), takes[d, a]) for d, o in lanes for a, b in itertools.pairwise(o)]
    for a, b in inputs(schedule, list(takes)):
        edges.append((a, b, takes[a] + costs.send * (a[0] != b[0])))
    for d, order in enumerate(schedule.transfers):
        edges += [((d, t.beside), (d, t.task), 0.0) for t in order if t.beside is not None]
    graph = nx.MultiDiGraph()
    graph.add_nodes_from(takes)
    graph.add_weighted_edges_from(edges)
    starts: dict[Node, float] = {}
    for node in nx.topological_sort(graph):
        before = graph.in_edges(node, data="weight")
        starts[node] = max((starts[a] + delay for a, _, delay in before), default=0.0)
    return starts


def inputs(schedule: Schedule, nodes: list[Node]) -> Iterator[tuple[Node, Node]]:
    """What each task waits for, of what is there."""
    where = {(t.kind, t.microbatch, schedule.piece(d, t)): (d, t) for d, t in nodes}
    for (kind, m, k), node in where.items():
        backward = [("F", m, k), ("R", m, k), ("B", m, k + 1), ("BW", m, k + 1)]
        before = {
            "F": [("F", m, k - 1)],
            "W": [("B", m, k)],
            "O": [("F", m, k)],
            "R": [("O", m, k)],
        }
        for work in before.get(kind, backward):
            if work in where:
                yield where[work], node


def any_costs(data: st.DataObject, pieces: int) -> StageCosts:
    def some(least: float = 0.0) -> tuple[float, ...]:
        number = st.sampled_from([x for x in (0.0, 0.1, 0.7, 1.0, 2.3) if x >= least])
        return tuple(data.draw(st.lists(number, min_size=pieces, max_size=pieces)))

    kept = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    held = some()
    send = data.draw(st.sampled_from([0.0, 0.3]))
    return StageCosts(some(), some(), some(), send, held, tuple(kept * x for x in held), some())


def any_schedule(data: st.DataObject) -> tuple[Schedule, StageCosts]:
    p, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    kind = data.draw(st.sampled_from(["one way", "many", "greedy", "both ways"]))
    if kind == "one way":
        make = data.draw(st.sampled_from([gpipe, one_f_one_b, eager, two_bp, zb_h1, zb_h2]))
        schedule = make(p, m)
    elif kind == "many":
        chunks = data.draw(st.integers(1, 3))
        schedule = data.draw(
            st.sampled_from([spread(p, m, chunks), interleaved(p, p * -(-m // p), chunks)])
        )
    else:
        ways = [there_and_back(p)] if kind == "greedy" else [straight(p)]
        ways += [other_way_round(ways[0])] * (kind == "both ways")
        way_of = [k % len(ways) for k in range(m)]
        costs = any_costs(data, len(ways[0]))
        schedule = greedy(kind, ways, way_of, costs, 1e6, lambda k, m, piece: (k == "F") * 9.0 + m)
        return offloaded(schedule, costs) if data.draw(st.booleans()) else schedule, costs
    costs = any_costs(data, schedule.pieces)
    return offloaded(schedule, costs) if data.draw(st.booleans()) else schedule, costs


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_times_are_longest_paths(data: st.DataObject) -> None:
    schedule, costs = any_schedule(data)
    timeline = simulate(schedule, costs)
    wanted = longest_paths(schedule, costs)
    found = {(r.device, r.task): r.start for r in (*timeline.rows, *timeline.transfers)}
    assert found == pytest.approx(wanted)
    assert faults(timeline, max(timeline.peaks)) == ()


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_memory_is_never_negative_and_all_is_freed(data: st.DataObject) -> None:
    timeline = simulate(*any_schedule(data))
    for line, peak in zip(timeline.memory, timeline.peaks, strict=True):
        assert all(held >= -1e-9 for _, held in line)
        assert line[-1][1] == pytest.approx(0)
        assert max(held for _, held in line) == peak
        assert [time for time, _ in line] == sorted({time for time, _ in line})


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_orders_at_random_end_or_are_told_to_be_stuck(data: st.DataObject) -> None:
    good = one_f_one_b(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)))
    orders = tuple(tuple(data.draw(st.permutations(order))) for order in good.orders)
    schedule = dataclasses.replace(good, orders=orders)
    costs = even(schedule.devices, schedule.pieces, 1, 1, 1)
    try:
        wanted = longest_paths(schedule, costs)
    except nx.NetworkXUnfeasible:
        with pytest.raises(ScheduleError, match="nothing ends what these wait for"):
            simulate(schedule, costs)
        return
    timeline = simulate(schedule, costs)
    assert {(r.device, r.task): r.start for r in timeline.rows} == pytest.approx(wanted)


def one_microbatch(devices: int) -> Timeline:
    return simulate(one_f_one_b(devices, 1), even(devices, devices, 2, 3, 1, send=0.5))


def test_one_microbatch_by_hand() -> None:
    timeline = one_microbatch(2)
    assert [tuple(r)[:4] for r in timeline.rows] == [
        (0, 0, 2, "F"),
        (0, 9, 13, "BW"),
        (1, 2.5, 4.5, "F"),
        (1, 4.5, 8.5, "BW"),
    ]
    assert (timeline.makespan, timeline.latency, timeline.spans) == (13, 13, (13, 6))
    assert timeline.busy == (6, 6)
    assert timeline.bubble == pytest.approx(7 / 13)
    assert timeline.peaks == (1, 1)
    assert timeline.memory == (((0, 1), (13, 0)), ((0, 0), (2.5, 1), (8.5, 0)))
    assert timeline.sends == 2


def test_a_device_alone_is_never_idle() -> None:
    timeline = simulate(zb_h1(1, 4), even(1, 1, 1, 1, 1, kept=0.5))
    assert (timeline.makespan, timeline.bubble, timeline.peaks) == (12, 0, (1,))


def test_what_w_needs_is_kept_by_hand() -> None:
    """One device, F0 B0 F1 B1 W0 W1; a quarter of the activations is kept for W."""
    kinds = (("F", 0), ("B", 0), ("F", 1), ("B", 1), ("W", 0), ("W", 1))
    order = tuple(Task(kind, m, 0) for kind, m in kinds)
    schedule = Schedule("by hand", (straight(1),), (0, 0), (order,))
    timeline = simulate(schedule, even(1, 1, 1, 1, 1, kept=0.25))
    assert timeline.memory[0] == ((0, 1), (2, 1.25), (4, 0.5), (5, 0.25), (6, 0))
    assert timeline.peaks == (1.25,)


def test_nothing_at_all() -> None:
    timeline = simulate(one_f_one_b(2, 0), even(2, 2, 1, 1, 1))
    assert (timeline.makespan, timeline.latency, timeline.bubble) == (0, 0, 0)
    assert faults(timeline, 0) == ()


def test_what_can_not_be_simulated_is_said() -> None:
    costs = even(2, 2, 1, 1, 1)
    good = one_f_one_b(2, 1)
    with pytest.raises(ScheduleError, match="1F1B has 2 pieces, the costs are of 4"):
        simulate(good, even(2, 4, 1, 1, 1))
    turned = dataclasses.replace(good, orders=(good.orders[0][::-1], good.orders[1]))
    with pytest.raises(ScheduleError, match="wait for: BW0 on device 0, F0 on device 1"):
        simulate(turned, costs)
    missing = dataclasses.replace(good, orders=((), good.orders[1]))
    with pytest.raises(ScheduleError, match="wait for: F0 on device 1"):
        simulate(missing, costs)
    strange = dataclasses.replace(good, orders=((Task("F", 0, 3),), ()))
    with pytest.raises(ScheduleError, match="no piece of its microbatch lies there"):
        simulate(strange, costs)
    strange = dataclasses.replace(good, orders=((Task("O", 0, 0),), ()))
    with pytest.raises(ScheduleError, match="expected one of F, B, W, BW here"):
        simulate(strange, costs)
