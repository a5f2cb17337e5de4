"""What is the exact minimum of a sum of small tables?  Bucket elimination (dynamic programming).

A node v with neighbours N(v) is removed by minimising it out:

    m(x_N) = min over x_v of  cost_v[x_v] + sum_(u in N) cost_uv[x_u, x_v] + messages that name v

and m becomes a table over N(v). After the last node the minimum is a number; going back through
the nodes each picks the best choice given those picked before. The work is the sum over v of the
table sizes, so a greedy order removes first the node whose table is smallest. A traced program is
chain-like, and its tables stay small; `Order.largest` tells before any table is made.

>>> order = plan_order((2, 2), {0: {1}, 1: {0}})
>>> tables = {(0, 1): np.array([[0.0, 3.0], [4.0, 1.0]])}
>>> minimise(order, [np.array([2.0, 0.0]), np.array([0.0, 0.0])], tables)
(1.0, [1, 1])
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from passes.solve.problem import Costs

# Above this many entries a message is computed one choice of the removed node at a time, so that
# the running minimum stays in cache.
_BLOCKED = 1 << 14


@dataclass(frozen=True, slots=True)
class Order:
    """An elimination order. scopes: per position the neighbours left, earliest-removed first.

    work: entries over all tables; largest: entries of the largest.
    """

    nodes: tuple[int, ...]
    position: tuple[int, ...]
    scopes: tuple[tuple[int, ...], ...]
    work: float
    largest: float


def plan_order(  # noqa: C901 (one loop with its bookkeeping)
    sizes: Sequence[int],
    neighbours: Mapping[int, set[int]],
    most_work: float = np.inf,
    most_entries: float = np.inf,
) -> Order | None:
    """A greedy order: always remove the node whose table is smallest, the lower index on a tie.

    None as soon as the work or the entries of one table exceed what is allowed.
    """
    graph = {v: set(n) for v, n in neighbours.items()}
    weight: dict[int, float] = {}
    heap: list[tuple[float, int]] = []

    def push(v: int) -> None:
        table = float(sizes[v])
        for u in graph[v]:
            table *= sizes[u]
        if weight.get(v) != table:
            weight[v] = table
            heapq.heappush(heap, (table, v))

    for v in graph:
        push(v)
    nodes: list[int] = []
    scopes: list[set[int]] = []
    work = largest = 0.0
    while heap:
        table, v = heapq.heappop(heap)
        if v not in graph or weight[v] != table:
            continue
        around = graph.pop(v)
        work += table
        largest = max(largest, table)
        if work > most_work or largest > most_entries:
            return None
        nodes.append(v)
        scopes.append(around)
        for u in around:
            graph[u] |= around
            graph[u] -= {u, v}
        for u in around:
            push(u)
    position = [0] * (max(nodes, default=-1) + 1)
    for p, v in enumerate(nodes):
        position[v] = p
    sorted_scopes = tuple(tuple(sorted(s, key=position.__getitem__)) for s in scopes)
    return Order(tuple(nodes), tuple(position), sorted_scopes, work, largest)


Table = tuple[tuple[int, ...], Costs]  # the nodes it names, earliest-removed first, and its entries


def minimise(
    order: Order, unary: Sequence[Costs], tables: Mapping[tuple[int, int], Costs]
) -> tuple[float, list[int]]:
    """The minimum and a choice per node (-1 for nodes that the order does not name)."""
    buckets = _fill(order, unary, tables)
    value = 0.0
    for p, v in enumerate(order.nodes):
        message = _remove(buckets[p], v, order.scopes[p], unary)
        if order.scopes[p]:
            buckets[order.position[order.scopes[p][0]]].append((order.scopes[p], message))
        else:
            value += float(message)
    return value, _trace_back(order, buckets, len(unary))


def _fill(
    order: Order, unary: Sequence[Costs], tables: Mapping[tuple[int, int], Costs]
) -> list[list[Table]]:
    """Each table in the bucket of its first-removed node, with its axes in removal order."""
    position = order.position
    buckets: list[list[Table]] = [[((v,), unary[v])] for v in order.nodes]
    for (u, v), costs in tables.items():
        if position[u] < position[v]:
            buckets[position[u]].append(((u, v), costs))
        else:
            buckets[position[v]].append(((v, u), costs.T))
    return buckets


def _remove(bucket: list[Table], v: int, scope: tuple[int, ...], unary: Sequence[Costs]) -> Costs:
    """Minimise v out of the sum of a bucket's tables; the result's axes follow the scope."""
    shape = tuple(len(unary[u]) for u in scope)
    parts = sorted((_spread(t, v, scope) for t in bucket), key=lambda a: a.size)
    entries = len(unary[v])
    for n in shape:
        entries *= n
    if entries <= _BLOCKED:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return np.broadcast_to(total.min(axis=0), shape)
    out = np.full(shape, np.inf)
    room = np.empty(shape)
    for k in range(len(unary[v])):
        head: Costs = np.zeros(())
        for part in parts[:-1]:
            head = head + part[k]
        np.add(head, parts[-1][k], out=room)
        np.minimum(out, room, out=out)
    return out


def _spread(table: Table, v: int, scope: tuple[int, ...]) -> Costs:
    """A table as a broadcastable array over (v, *scope)."""
    names, costs = table
    have = set(names)
    assert names[0] == v, f"table over {names} in the bucket of {v}"
    sizes = iter(costs.shape[1:])
    return costs.reshape(costs.shape[0], *(next(sizes) if u in have else 1 for u in scope))


def _trace_back(order: Order, buckets: list[list[Table]], nodes: int) -> list[int]:
    """Pick the best choice of each node, last-removed first, given those already picked."""
    choice = [-1] * nodes
    for p in range(len(order.nodes) - 1, -1, -1):
        total: Costs = np.zeros(())
        for names, costs in buckets[p]:
            index: Any = (slice(None), *(choice[u] for u in names[1:]))
            total = total + costs[index]
        choice[order.nodes[p]] = int(total.argmin())
    return choice
