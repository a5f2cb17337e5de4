"""From below: no choice can cost less than what?  Sequential tree-reweighted message passing.

TRW-S (Kolmogorov, IEEE PAMI 28(10), 2006) cuts the graph into chains that follow a node order, gives
each chain a share of the costs, and moves costs between chains so that the sum of the chains'
minima - always a lower bound - rises. A message m_uv is a cost taken from the edge (and from u) and
put on v; with b_v = cost_v + sum of messages into v, a visit to v sends along each edge ahead

    m_vt[j] = min_i ( b_v[i] / n_v - m_tv[i] + table[i, j] ),    n_v = max(edges ahead, behind)

First through the order, then back. The bound of a pass is the sum of the minima taken off on the way.

*Reduced costs.* When v is visited, each chain through it has b_v / n_v for its min-marginal, so a
choice i of v can only be part of something that costs at least  bound + b_v[i] - min b_v. The bound
of the pass before is one that certainly holds at that moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from passes.solve.problem import Costs
from passes.solve.tables import Picks

_Link = tuple[int, Costs, Costs, Costs]  # neighbour, table, message from it, message to it


class Messages:
    """Messages on one graph, kept between passes, so that a small change of costs is soon absorbed.

    belief: per node its costs plus the messages into it. bound: the last pass's lower bound.
    entries: table entries looked at so far (a measure of work).
    """

    def __init__(
        self, unary: Sequence[Costs], links: Sequence[Mapping[int, Costs]], old: Messages | None = None
    ) -> None:
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
        self.entries = 0.0
        self._pass_entries = 2.0 * sum(t.size for around in links for t in around.values()) / 2

    def _wire(self) -> None:
        """Lists of neighbours ahead and behind, with the arrays that a visit needs."""
        for v, around in enumerate(self._links):
            links = [(u, t, self._message[u, v], self._message[v, u]) for u, t in sorted(around.items())]
            self._ahead.append([link for link in links if link[0] > v])
            self._behind.append([link for link in links if link[0] < v])
        self._share = [
            1.0 / max(len(a), len(b), 1) for a, b in zip(self._ahead, self._behind, strict=True)
        ]

    def add(self, change: Costs) -> None:
        """Change the node costs (flat, all nodes one after the other); messages stay."""
        self.flat += change
        self.before = self.bound = -np.inf

    def sweep(self) -> float:
        """Once through and back; returns the new bound."""
        self.before = self._run(range(len(self.sizes)), self._ahead)
        self.bound = self._run(range(len(self.sizes) - 1, -1, -1), self._behind)
        self.entries += self._pass_entries
        return self.bound

    def _run(self, order: range, onward: list[list[_Link]]) -> float:
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
        return self.flat - np.repeat(lows, self.sizes)

    def decode(self) -> npt.NDArray[np.intp]:
        """A choice per node: each the best given those before it and messages from those after."""
        choice = np.zeros(len(self.sizes), dtype=np.intp)
        for v in range(len(self.sizes)):
            own = self.belief[v]
            for u, table, back, _ in self._behind[v]:
                own = own - back + table[:, choice[u]]
            choice[v] = own.argmin()
        return choice

    def restricted(self, unary: Sequence[Costs], keep: Sequence[Picks], links: Sequence[Mapping[int, Costs]]) -> Messages:
        """The same messages for fewer choices; unary and links are the restricted ones."""
        out = Messages(unary, links)
        for (u, v), message in self._message.items():
            out._message[u, v][:] = message[keep[v]]
            out.belief[v] += message[keep[v]]
        out.entries = self.entries
        return out
