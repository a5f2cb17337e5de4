"""The loops that take nearly all of a large solve's time, compiled by numba where it is there.

Without numba they are plain Python: the same answers, hundreds of times slower. The arrays are
those of `flat.Flat`. Nothing here decides anything; what the loops compute is said where they are
used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from passes.solve.memory import Indices
from passes.solve.problem import Costs

try:
    from numba import njit
except ImportError:  # pragma: no cover - an install without numba
    njit = None  # type: ignore[assignment]

F = TypeVar("F", bound=Callable[..., Any])

# What a weight on memory becomes where a tree did not fit.
HEAVIER, HEAVIER_BY = 1.6, 0.15


class Edges(NamedTuple):
    """What trees see of a `Flat`. edges: those of node v from at[v] to at[v + 1]."""

    start: Indices
    size: Indices
    edges: Indices
    at: Indices
    first: Indices
    second: Indices
    table: Indices
    tables: Costs


class Spans(NamedTuple):
    """What nodes take of rows [begin, end): usage[first + i] with choice i. at[v]: v's first."""

    at: Indices
    begin: Indices
    end: Indices
    first: Indices
    usage: Costs


class Tree(NamedTuple):
    """Room for one tree after another.

    nodes: in the order they join; parents, by: of each the place of its parent, and the edge;
    found: its new choice; value, pick: a row of numbers. Per node of the graph, stamps: the tree it
    was last in; place: where it stands there; touched, touches: how many of a tree's nodes it is
    next to. waiting: nodes that may join.
    """

    nodes: Indices
    parents: Indices
    by: Indices
    found: Indices
    value: Costs
    pick: Indices
    stamps: Indices
    place: Indices
    touched: Indices
    touches: Indices
    waiting: Indices


def compiled(function: F) -> F:
    """The function as machine code, kept on disk for the next process where that can be written."""
    if njit is None:
        return function
    try:
        return cast(F, njit(cache=True)(function))
    except RuntimeError:  # no place for the cache
        return cast(F, njit(function))


@compiled
def send(
    order: Indices,
    start: Indices,
    size: Indices,
    share: Costs,
    edges: Indices,
    edge_at: Indices,
    far: Indices,
    table: Indices,
    tables: Costs,
    near_at: Indices,
    far_at: Indices,
    belief: Costs,
    to_near: Costs,
    to_far: Costs,
    down: bool,
) -> float:
    """Visit the nodes in order and send messages along these edges; the sum of minima taken off.

    belief: costs of nodes plus messages into them. near_at, to_near: where messages to the visited
    node begin, and these; far_at, to_far: likewise of the other end, far. down: whether the visited
    node's choices are the rows of tables. Beliefs and messages to far ends are brought up to date.
    """
    bound = 0.0
    part = np.empty(size.max())
    message = np.empty(size.max())
    for v in order:
        s, n = start[v], size[v]
        low = belief[s : s + n].min()
        bound += low
        for a in range(edge_at[v], edge_at[v + 1]):
            e = edges[a]
            m, begin, t = size[far[e]], start[far[e]], table[e]
            for i in range(n):
                part[i] = (belief[s + i] - low) * share[v] - to_near[near_at[e] + i]
            if down:
                message[:m] = np.inf
                for i in range(n):
                    for j in range(m):
                        y = tables[t + i * m + j] + part[i]
                        message[j] = y if y < message[j] else message[j]
            else:
                for j in range(m):
                    best = np.inf
                    for i in range(n):
                        y = tables[t + j * n + i] + part[i]
                        best = y if y < best else best
                    message[j] = best
            least = message[:m].min()
            bound += least
            for j in range(m):
                new, old = message[j] - least, to_far[far_at[e] + j]
                belief[begin + j] = belief[begin + j] + new - old
                to_far[far_at[e] + j] = new
    return bound


@compiled
def choose(
    order: Indices,
    start: Indices,
    size: Indices,
    ahead: Indices,
    ahead_at: Indices,
    behind: Indices,
    behind_at: Indices,
    first: Indices,
    table: Indices,
    tables: Costs,
    to_first: Indices,
    unary: Costs,
    backward: Costs,
    choice: Indices,
) -> float:
    """Choose node by node, in order, what is cheapest given the choices before; their cost.

    What is still to come counts by its messages (Kolmogorov, IEEE PAMI 28(10), 2006, section 3.3).
    """
    total = 0.0
    own = np.empty(size.max())
    for v in order:
        s, n = start[v], size[v]
        own[:n] = unary[s : s + n]
        for a in range(behind_at[v], behind_at[v + 1]):
            e = behind[a]
            row = table[e] + choice[first[e]] * n
            for i in range(n):
                own[i] += tables[row + i]
        best, at = np.inf, 0
        for i in range(n):
            cost = own[i]
            for a in range(ahead_at[v], ahead_at[v + 1]):
                cost += backward[to_first[ahead[a]] + i]
            if cost < best:
                best, at = cost, i
        choice[v] = at
        total += own[at]
    return total


@compiled
def price(
    node: Indices,
    begin: Indices,
    end: Indices,
    first: Indices,
    usage: Costs,
    start: Indices,
    prices: Costs,
    priced: Costs,
) -> None:
    """Per choice what its memory costs at these prices per row and byte, into `priced`."""
    before = np.zeros(len(prices) + 1)
    for r in range(len(prices)):
        before[r + 1] = before[r] + prices[r]
    priced[:] = 0.0
    for k in range(len(node)):
        weight = before[end[k]] - before[begin[k]]
        if weight != 0.0:
            s, f = start[node[k]], first[k]
            for i in range(start[node[k] + 1] - s):
                priced[s + i] += weight * usage[f + i]


@compiled
def _next_random(state: Any, below: int) -> int:
    """A number from 0 to below - 1: Marsaglia's xorshift (J. Statistical Software 8(14), 2003)."""
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return int(x % np.uint64(below))


@compiled
def _grow(  # noqa: C901 (one loop, compiled as one)
    state: Any, most: int, g: Edges, stamp: int, tree: Tree
) -> int:
    """A random tree of at most so many nodes that has all edges between its nodes; their number."""
    nodes, stamps, place, waiting = tree.nodes, tree.stamps, tree.place, tree.waiting
    touched, touches = tree.touched, tree.touches
    nodes[0] = _next_random(state, len(place))
    tree.parents[0], tree.by[0] = -1, -1
    stamps[nodes[0]], place[nodes[0]] = stamp, 0
    count, ready = 1, 0
    while True:
        v = nodes[count - 1]
        for a in range(g.at[v], g.at[v + 1]):
            e = g.edges[a]
            u = g.second[e] if g.first[e] == v else g.first[e]
            if touched[u] != stamp:
                touched[u], touches[u] = stamp, 0
            touches[u] += 1
            if stamps[u] != stamp and touches[u] == 1:
                waiting[ready] = u
                ready += 1
        if count == most:
            return count
        joined = -1
        while ready > 0 and joined < 0:
            k = _next_random(state, ready)
            u = waiting[k]
            ready -= 1
            waiting[k] = waiting[ready]
            if stamps[u] != stamp and touches[u] == 1:
                joined = u
        if joined < 0:
            return count
        for a in range(g.at[joined], g.at[joined + 1]):
            e = g.edges[a]
            u = g.second[e] if g.first[e] == joined else g.first[e]
            if stamps[u] == stamp:
                tree.parents[count], tree.by[count] = place[u], e
        nodes[count], stamps[joined], place[joined] = joined, stamp, count
        count += 1


@compiled
def _minimise(  # noqa: C901 (one loop, compiled as one)
    count: int,
    g: Edges,
    stamp: int,
    tree: Tree,
    unary: Costs,
    memory: Costs,
    weight: float,
    choice: Indices,
) -> int:
    """The best choices on a tree, all else fixed, into its `found`; entries looked at.

    Costs are unary + weight * memory.
    """
    nodes, stamps, value, pick, found = tree.nodes, tree.stamps, tree.value, tree.pick, tree.found
    work = 0
    for a in range(count):
        v = nodes[a]
        s, n = g.start[v], g.size[v]
        for i in range(n):
            value[a, i] = unary[s + i] + weight * memory[s + i]
        for b in range(g.at[v], g.at[v + 1]):
            e = g.edges[b]
            if g.first[e] == v and stamps[g.second[e]] != stamp:
                m, t = g.size[g.second[e]], g.table[e] + choice[g.second[e]]
                for i in range(n):
                    value[a, i] += g.tables[t + i * m]
            elif g.second[e] == v and stamps[g.first[e]] != stamp:
                t = g.table[e] + choice[g.first[e]] * n
                for i in range(n):
                    value[a, i] += g.tables[t + i]
            work += n
    for a in range(count - 1, 0, -1):
        v, p, e = nodes[a], tree.parents[a], tree.by[a]
        n, m, t = g.size[v], g.size[nodes[p]], g.table[e]
        down = g.first[e] == nodes[p]
        for j in range(m):
            best, at = np.inf, 0
            for i in range(n):
                y = value[a, i] + (g.tables[t + j * n + i] if down else g.tables[t + i * m + j])
                if y < best:
                    best, at = y, i
            value[p, j] += best
            pick[a, j] = at
        work += n * m
    found[0] = value[0, : g.size[nodes[0]]].argmin()
    for a in range(1, count):
        found[a] = pick[a, found[tree.parents[a]]]
    return work


@compiled
def _change(count: int, g: Edges, stamp: int, tree: Tree, unary: Costs, choice: Indices) -> float:
    """What a tree's new choices cost more than those it has: unary and table costs."""
    cost = 0.0
    for a in range(count):
        v = tree.nodes[a]
        s, n, old, new = g.start[v], g.size[v], choice[v], tree.found[a]
        cost += unary[s + new] - unary[s + old]
        for b in range(g.at[v], g.at[v + 1]):
            e = g.edges[b]
            t = g.table[e]
            if g.first[e] == v:
                u = g.second[e]
                to = tree.found[tree.place[u]] if tree.stamps[u] == stamp else choice[u]
                m = g.size[u]
                cost += g.tables[t + new * m + to] - g.tables[t + old * m + choice[u]]
            elif tree.stamps[g.first[e]] != stamp:
                t += choice[g.first[e]] * n
                cost += g.tables[t + new] - g.tables[t + old]
    return cost


@compiled
def _place(
    count: int, tree: Tree, spans: Spans, choice: Indices, wanted: bool, over: Costs, change: Costs
) -> tuple[bool, int]:
    """Whether a tree's new choices fit into each row, or take no more of one that is over; rows
    looked at. Where they fit and are wanted, `over` is brought up to date. change: all zero.
    """
    low, high = len(over), 0
    for a in range(count):
        v, old, new = tree.nodes[a], choice[tree.nodes[a]], tree.found[a]
        for k in range(spans.at[v], spans.at[v + 1]) if new != old else range(0):
            more = spans.usage[spans.first[k] + new] - spans.usage[spans.first[k] + old]
            if more != 0.0:
                change[spans.begin[k]] += more
                change[spans.end[k]] -= more
                low, high = min(low, spans.begin[k]), max(high, spans.end[k])
    fits, run = True, 0.0
    for r in range(low, high):
        run += change[r]
        if run > 0.0 and over[r] + run > 0.0:
            fits = False
            break
    run = 0.0
    for r in range(low, high):
        run += change[r]
        change[r] = 0.0
        if fits and wanted:
            over[r] += run
    change[high] = 0.0
    return fits, max(0, high - low)


@compiled
def improve(
    state: Any,
    tries: int,
    weights: Costs,
    heavier: int,
    judged: float,
    g: Edges,
    spans: Spans,
    tree: Tree,
    unary: Costs,
    memory: Costs,
    choice: Indices,
    over: Costs,
    gained: Costs,
) -> float:
    """Try so many random trees, and take what fits and costs no more; entries looked at.

    Each tree, of at most as many nodes as `tree` has room for, is minimised at one of the weights
    on `memory`, and up to so many times at a heavier one while it does not fit; what it costs is
    judged at the weight `judged`. choice, over (bytes above the limit per row) and gained[0] (unary
    and table costs) are brought up to date.
    """
    work, most, nodes, found = 0.0, len(tree.nodes), tree.nodes, tree.found
    change = np.zeros(len(over) + 1)
    for attempt in range(tries):
        stamp = attempt + 1
        weight = weights[_next_random(state, len(weights))]
        small = _next_random(state, 2) == 0
        limit = 2 + _next_random(state, (min(most, 20) if small else most) - 1)
        count = _grow(state, limit, g, stamp, tree)
        for _ in range(1 + heavier):
            work += _minimise(count, g, stamp, tree, unary, memory, weight, choice)
            cost = _change(count, g, stamp, tree, unary, choice)
            held, same = 0.0, True
            for a in range(count):
                s, old = g.start[nodes[a]], choice[nodes[a]]
                held += memory[s + found[a]] - memory[s + old]
                same = same and found[a] == old
            if same:
                break
            better = cost + judged * held <= 0.0
            fits, rows = _place(count, tree, spans, choice, better, over, change)
            work += rows
            if fits and better:
                gained[0] -= cost
                for a in range(count):
                    choice[nodes[a]] = found[a]
            if fits:
                break
            weight = HEAVIER * weight + HEAVIER_BY
    return work
