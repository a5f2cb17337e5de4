"""What can a sum of tables not be less than?  Mini-bucket elimination, where it is too wide.

Elimination is exact but its tables may be too large. Mini-buckets (Dechter and Rish, J. ACM 50(2),
2003) keep each table under a cap: where removing a node would join too much, its tables are put in
groups, and each group is minimised over its own copy of the node. That can only lower the result.
Before the copies part, costs are shifted between them until their min-marginals are equal (Ihler,
Flerova, Dechter and Otten, UAI 2012), so that the copies tend to agree.

After message passing little cost is left to argue about, and tables of a few thousand entries find
most of what messages along chains cannot see: disagreement around a cycle.

>>> edges = [((0, 1), np.array([[0.0, 1], [1, 0]])), ((1, 2), np.array([[0.0, 1], [1, 0]])),
...          ((0, 2), np.array([[1.0, 0], [0, 1]]))]
>>> lower_bound((2, 2, 2), [np.zeros(2)] * 3, edges, cap=8).bound
1.0
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from passes.solve.problem import Costs

Table = tuple[tuple[int, ...], Costs]  # the nodes it names, rising, and its entries


@dataclass(frozen=True, slots=True)
class Bound:
    """What the sum is at least; whether no node had to be copied, so that it is exact; entries."""

    bound: float
    exact: bool
    work: float


def lower_bound(
    sizes: Sequence[int], unary: Sequence[Costs], tables: Iterable[Table], cap: float
) -> Bound:
    """A lower bound of the sum of costs per node and tables, with no table above the cap."""
    state = _Buckets(sizes, tables)
    bound, work = state.constant, 0.0
    exact = True
    while state.heap:
        weight, v = heapq.heappop(state.heap)
        if state.weight[v] != weight:
            continue
        groups = _groups(state.take(v), sizes, cap)
        exact = exact and len(groups) <= 1
        sums = [_join(v, scope, tables_of, sizes) for scope, tables_of in groups]
        work += sum(s.size for s in sums)
        if not sums:
            bound += float(unary[v].min())
        _agree(unary[v], sums)
        for (scope, _), total in zip(groups, sums, strict=True):
            message = total.min(axis=0)
            low = float(message.min())
            if low == np.inf:
                return Bound(np.inf, True, work)
            bound += low
            if len(scope) > 1:
                state.put(tuple(sorted(scope - {v})), message - low)
        state.reweigh(u for scope, _ in groups for u in scope if u != v)
    return Bound(bound, exact, work)


class _Buckets:
    """The tables that are left, and for each node which of them name it."""

    def __init__(self, sizes: Sequence[int], tables: Iterable[Table]) -> None:
        self.sizes = sizes
        self.tables: dict[int, Table] = {}
        self.of: list[set[int]] = [set() for _ in sizes]
        self.weight = [-1.0] * len(sizes)
        self.heap: list[tuple[float, int]] = []
        self._next = 0
        self.constant = 0.0
        for scope, table in tables:
            free = tuple(v for v in scope if sizes[v] > 1)
            if free:
                self.put(free, table.reshape([sizes[v] for v in free]))
            else:
                self.constant += float(table.min())
        self.reweigh(range(len(sizes)))

    def put(self, scope: tuple[int, ...], table: Costs) -> None:
        """Add a table."""
        self.tables[self._next] = (scope, table)
        for v in scope:
            self.of[v].add(self._next)
        self._next += 1

    def take(self, v: int) -> list[Table]:
        """Remove v and the tables that name it, the largest first."""
        names = sorted(self.of[v], key=lambda t: (-self.tables[t][1].size, t))
        taken = [self.tables.pop(t) for t in names]
        for name, (scope, _) in zip(names, taken, strict=True):
            for u in scope:
                self.of[u].discard(name)
        self.weight[v] = math.nan
        return taken

    def reweigh(self, nodes: Iterable[int]) -> None:
        """Work out anew how large the table of these nodes' removal would be."""
        for v in set(nodes):
            around = {v}.union(*(self.tables[t][0] for t in self.of[v]))
            weight = math.prod((self.sizes[u] for u in around), start=1.0)
            if weight != self.weight[v]:
                self.weight[v] = weight
                heapq.heappush(self.heap, (weight, v))


def _groups(
    tables: Sequence[Table], sizes: Sequence[int], cap: float
) -> list[tuple[set[int], list[Table]]]:
    """First fit: each table joins the first group whose joint table stays under the cap."""
    groups: list[tuple[set[int], list[Table]]] = []
    for table in tables:
        for scope, members in groups:
            if math.prod(sizes[u] for u in scope.union(table[0])) <= cap:
                scope.update(table[0])
                members.append(table)
                break
        else:
            groups.append((set(table[0]), [table]))
    return groups


def _join(v: int, scope: set[int], tables: Sequence[Table], sizes: Sequence[int]) -> Costs:
    """The sum of tables as one array: v first, then the others rising."""
    axes = [v, *sorted(scope - {v})]
    total = np.zeros([sizes[u] for u in axes])
    for names, table in tables:
        front = np.moveaxis(table, names.index(v), 0)
        total += front.reshape([sizes[u] if u in names else 1 for u in axes])
    return total


def _agree(unary: Costs, sums: Sequence[Costs]) -> None:
    """Shift costs between the copies of a node so that they have the same min-marginals."""
    if not sums:
        return
    each = [s.reshape(len(unary), -1).min(axis=1) for s in sums]
    total = unary + np.sum(each, axis=0)
    finite = np.isfinite(total)
    for s, own in zip(sums, each, strict=True):
        shift = np.zeros(len(unary))
        shift[finite] = total[finite] / len(sums) - own[finite]
        shift[~finite] = unary[~finite]
        s += shift.reshape(-1, *[1] * (s.ndim - 1))
