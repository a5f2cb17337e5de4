"""A sum of tables as flat arrays, in the order in which messages visit its nodes.

Compiled kernels know no lists of lists. All choices of all nodes lie one after the other, node v
from `start[v]` on; an edge's table lies row by row from `table[e]` on, with the end that is visited
first as rows; equal tables lie there once. The edges of a node are a slice of a list of edges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from passes.solve.chains import chain_order
from passes.solve.memory import Indices
from passes.solve.problem import Costs


@dataclass(frozen=True, slots=True)
class Flat:
    """Nodes and edges.

    order: the nodes as they are visited. start: per node its first choice, and the end of all.
    size: choices per node. first, second: the ends of each edge, in the order of visits. table:
    where an edge's table begins in `tables`. ahead, behind: the edges of node v to nodes visited
    later and earlier, from ahead_at[v] to ahead_at[v + 1]. to_first, to_second: where the message
    to that end begins. share: one over how many chains go through a node.
    """

    order: Indices
    start: Indices
    size: Indices
    first: Indices
    second: Indices
    table: Indices
    tables: Costs
    ahead: Indices
    ahead_at: Indices
    behind: Indices
    behind_at: Indices
    to_first: Indices
    to_second: Indices
    share: Costs

    @staticmethod
    def of(sizes: Sequence[int], links: Sequence[Mapping[int, Costs]]) -> Flat:
        """Lay out the tables of links; those of equal tables must be one object."""
        order = np.array(chain_order(links), dtype=np.intp)
        rank = np.empty(len(order), dtype=np.intp)
        rank[order] = np.arange(len(order))
        places: dict[int, int] = {}
        rows: list[Costs] = [np.zeros(0)]
        edges: list[tuple[int, int, int]] = []
        end = 0
        for v, around in enumerate(links):
            for u, t in around.items():
                if rank[v] < rank[u]:
                    if id(t) not in places:
                        places[id(t)] = end
                        rows.append(t.ravel())
                        end += t.size
                    edges.append((v, u, places[id(t)]))
        first, second, table = np.array(edges, dtype=np.intp).reshape(-1, 3).T.copy()
        size = np.array(sizes, dtype=np.intp)
        ahead, ahead_at = _by_node(first, len(size))
        behind, behind_at = _by_node(second, len(size))
        chains = np.maximum(np.diff(ahead_at), np.diff(behind_at))
        return Flat(
            order,
            _places(size),
            size,
            first,
            second,
            table,
            np.concatenate(rows),
            ahead,
            ahead_at,
            behind,
            behind_at,
            _places(size[first]),
            _places(size[second]),
            1.0 / np.maximum(chains, 1),
        )

    @property
    def pairs(self) -> int:
        """Entries of all tables, equal ones counted as often as they stand on an edge."""
        return int((self.size[self.first] * self.size[self.second]).sum())


def _places(lengths: Indices) -> Indices:
    """Where each of several parts begins that lie one after the other, and where the last ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.intp)


def _by_node(node: Indices, nodes: int) -> tuple[Indices, Indices]:
    """Edges sorted by a node each has, and where those of each node begin."""
    edges = np.argsort(node, kind="stable").astype(np.intp)
    return edges, np.searchsorted(node[edges], np.arange(nodes + 1)).astype(np.intp)
