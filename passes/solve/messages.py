"""What can no choice cost less than?  Messages along chains: a lower bound, and reduced costs.

TRW-S (Kolmogorov, IEEE PAMI 28(10), 2006) cuts the graph into chains that follow a node order, and
gives each chain a share of the costs, and moves costs between chains so that the sum of the chains'
minima - always a lower bound - rises. A message m_uv is a cost taken from the edge (and from u) and
put on v; with b_v = cost_v + sum of messages into v, a visit to v sends along each edge ahead

    m_vt[j] = min_i ( b_v[i] / n_v - m_tv[i] + table[i, j] ),    n_v = max(edges ahead, behind)

First through the order, then back. A pass's bound is the sum of the minima taken off on the way.

*Reduced costs.* When v is visited, each chain through it has b_v / n_v for its min-marginal, so a
choice i of v can only be part of something that costs at least  bound + b_v[i] - min b_v. The bound
of the pass before is one that certainly holds at that moment.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from passes.solve.buckets import Table
from passes.solve.flat import Flat
from passes.solve.problem import Costs
from passes.solve.tables import Picks

_Link = tuple[int, Costs, Costs, Costs]  # neighbour, table, message from it, message to it

# Edges from which a pass is worth the second that loading its kernel takes; and so many passes over
# edges, after which it would have been.
_LARGE, _MANY = 3000, 60_000


class Messages:
    """Messages on one graph, kept between passes, so that a small change of costs is soon absorbed.

    flat: the costs of all nodes, one after the other, plus the messages into them; belief: that of
    each node. bound: the lower bound of the last pass back; before: of the pass before that one.
    backward: the messages to the first ends of edges.
    compiled: whether passes run as machine code, by default where the graph is large, or after
    many passes; both ways give the same numbers to the last bit.
    """

    def __init__(
        self,
        unary: Sequence[Costs],
        links: Sequence[Mapping[int, Costs]],
        compiled: bool | None = None,
    ) -> None:
        self.graph = Flat.of([len(u) for u in unary], links)
        self.sizes = self.graph.size.tolist()
        self.starts = self.graph.start
        self.flat = np.concatenate([np.zeros(0), *unary])
        self.belief = [self.flat[a:b] for a, b in itertools.pairwise(self.starts)]
        self.backward = np.zeros(self.graph.to_first[-1])
        self._forward = np.zeros(self.graph.to_second[-1])
        self._links = links
        self._ahead: list[list[_Link]] = []
        self._behind: list[list[_Link]] = []
        self._compiled = len(self.graph.first) > _LARGE if compiled is None else compiled
        if not self._compiled:
            self._wire()
        self.before = self.bound = -np.inf
        self._left = _MANY if compiled is None else np.inf

    def _message(self, edge: int) -> tuple[Costs, Costs]:
        """The messages to the first and to the second end of an edge."""
        back, forth = self.graph.to_first, self.graph.to_second
        return (
            self.backward[back[edge] : back[edge + 1]],
            self._forward[forth[edge] : forth[edge + 1]],
        )

    def _wire(self) -> None:
        """Lists of neighbours ahead and behind, with the arrays that a visit needs."""
        graph = self.graph
        for v, around in enumerate(self._links):
            for out, edges, at, far, mine in (
                (self._ahead, graph.ahead, graph.ahead_at, graph.second, 0),
                (self._behind, graph.behind, graph.behind_at, graph.first, 1),
            ):
                found = []
                for e in edges[at[v] : at[v + 1]].tolist():
                    u, messages = int(far[e]), self._message(e)
                    found.append((u, around[u], messages[mine], messages[1 - mine]))
                out.append(found)

    def add(self, change: Costs) -> None:
        """Change the node costs (flat, all nodes one after the other); messages stay."""
        self.flat += change
        self.before = self.bound = -np.inf

    def state(self) -> tuple[Costs, Costs, Costs]:
        """All that passes change, to return to."""
        return self.flat.copy(), self.backward.copy(), self._forward.copy()

    def restore(self, state: tuple[Costs, Costs, Costs]) -> None:
        """Return to a state."""
        self.flat[:], self.backward[:], self._forward[:] = state
        self.before = self.bound = -np.inf

    def sweep(self) -> float:
        """Once through and back; returns the new bound."""
        order = self.graph.order
        self._left -= len(self.graph.first)
        if self._left < 0 and not self._compiled:
            self._compiled, self._left = _has_compiler(), np.inf
        if self._compiled:
            self.before, self.bound = self._run_compiled()
        else:
            self.before = self._run(order.tolist(), self._ahead)
            self.bound = self._run(order[::-1].tolist(), self._behind)
        return self.bound

    def _run_compiled(self) -> tuple[float, float]:
        from passes.solve.kernels import send

        g = self.graph
        kernel: Any = send
        nodes, tables = (g.start, g.size, g.share), (g.table, g.tables)
        ahead = (g.ahead, g.ahead_at, g.second, *tables, g.to_first, g.to_second, self.flat)
        behind = (g.behind, g.behind_at, g.first, *tables, g.to_second, g.to_first, self.flat)
        return (
            kernel(g.order, *nodes, *ahead, self.backward, self._forward, True),
            kernel(g.order[::-1].copy(), *nodes, *behind, self._forward, self.backward, False),
        )

    def _run(self, order: list[int], onward: list[list[_Link]]) -> float:
        belief, share, least = self.belief, self.graph.share, np.minimum.reduce
        bound = 0.0
        for v in order:
            own = belief[v]
            low = own.min()
            bound += low
            if not onward[v]:
                continue
            part = (own - low) * share[v]
            for u, table, back, forth in onward[v]:
                message = least(table + (part - back)[:, None], axis=0)
                low = message.min()
                bound += low
                message -= low
                target = belief[u]
                target += message
                target -= forth
                forth[:] = message
        return float(bound)

    def reduced(self) -> Costs:
        """Flat: how much more than `before` a solution costs at least that takes each choice."""
        lows = np.minimum.reduceat(self.flat, self.starts[:-1])
        above: Costs = self.flat - np.repeat(lows, self.sizes)
        return above

    def rest(self, keep: Sequence[Picks]) -> tuple[list[Costs], list[Table]]:
        """The same sum of costs after all messages, for these choices: per node, and per edge."""
        tables: list[Table] = []
        for e, (v, u) in enumerate(zip(self.graph.first, self.graph.second, strict=True)):
            v, u = int(v), int(u)
            rows, columns = keep[v], keep[u]
            to_v, to_u = self._message(e)
            left = self._links[v][u][rows[:, None], columns] - to_u[columns]
            left = left - to_v[rows][:, None]
            tables.append(((v, u), left) if v < u else ((u, v), left.T))
        return [b[k] for b, k in zip(self.belief, keep, strict=True)], tables


def _has_compiler() -> bool:
    """Whether the kernels are more than plain Python."""
    from importlib.util import find_spec

    return find_spec("numba") is not None
