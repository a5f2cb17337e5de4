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

from collections.abc import Mapping, Sequence

import numpy as np

from passes.solve.buckets import Table
from passes.solve.chains import chain_order
from passes.solve.problem import Costs
from passes.solve.tables import Picks

_Link = tuple[int, Costs, Costs, Costs]  # neighbour, table, message from it, message to it


class Messages:
    """Messages on one graph, kept between passes, so that a small change of costs is soon absorbed.

    belief: per node its costs plus the messages into it. bound: the lower bound of the last pass
    back; before: of the pass before that one.
    """

    def __init__(self, unary: Sequence[Costs], links: Sequence[Mapping[int, Costs]]) -> None:
        self._order = chain_order(links)
        self.sizes = [len(u) for u in unary]
        self.flat = np.concatenate([np.zeros(0), *unary])
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.intp)
        self.belief = [self.flat[a:b] for a, b in zip(self.starts, self.starts[1:], strict=False)]
        self._links = links
        self._message: dict[tuple[int, int], Costs] = {}
        self._ahead: list[list[_Link]] = []
        self._behind: list[list[_Link]] = []
        for v, around in enumerate(links):
            for u in around:
                self._message[u, v] = np.zeros(self.sizes[v])
        self._wire()
        self.before = self.bound = -np.inf

    def _wire(self) -> None:
        """Lists of neighbours ahead and behind, with the arrays that a visit needs."""
        rank = {v: i for i, v in enumerate(self._order)}
        for v, around in enumerate(self._links):
            links = [
                (u, t, self._message[u, v], self._message[v, u]) for u, t in sorted(around.items())
            ]
            self._ahead.append([link for link in links if rank[link[0]] > rank[v]])
            self._behind.append([link for link in links if rank[link[0]] < rank[v]])
        self._share = [
            1.0 / max(len(a), len(b), 1) for a, b in zip(self._ahead, self._behind, strict=True)
        ]

    def add(self, change: Costs) -> None:
        """Change the node costs (flat, all nodes one after the other); messages stay."""
        self.flat += change
        self.before = self.bound = -np.inf

    def sweep(self) -> float:
        """Once through and back; returns the new bound."""
        self.before = self._run(self._order, self._ahead)
        self.bound = self._run(self._order[::-1], self._behind)
        return self.bound

    def _run(self, order: list[int], onward: list[list[_Link]]) -> float:
        belief, share, least = self.belief, self._share, np.minimum.reduce
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
        for v, around in enumerate(self._links):
            for u, table in around.items():
                if v < u:
                    rows, columns = keep[v], keep[u]
                    left = table[rows[:, None], columns] - self._message[v, u][columns]
                    tables.append(((v, u), left - self._message[u, v][rows][:, None]))
        return [b[k] for b, k in zip(self.belief, keep, strict=True)], tables
