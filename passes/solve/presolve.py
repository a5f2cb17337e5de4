"""How small does a problem become without losing its optimum?  Exact reductions until none fits.

1. *Arc consistency*: a choice with no finite pair on some edge goes.
2. *Separable edges*: a table a_i + b_j is two node costs.
3. *Functions*: where each choice of u leaves node v one finite choice, v follows u: its costs,
   edges and memory move to u.
4. *Dominated choices* go (`dominance`).
5. A node of one choice, or of at most two edges and no memory, is minimised out; two edges make
   one: new[i, j] = min_k (cost[k] + A[k, i] + B[k, j]).

Memory counts only in rows that can overflow at all; which those are is looked at again whenever
the rest has settled. Edges and nodes wait in work-lists until something near them changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from passes.solve.dominance import undominated
from passes.solve.memory import Span, row_times
from passes.solve.problem import Costs, Problem
from passes.solve.reduction import Core, Infeasible, Step
from passes.solve.tables import Picks, Pool

# Above this many neighbours, or entries to look at, a node is not searched for dominated choices;
# above _ENTRIES a degree-two node is left in place.
_DEGREE = 64
_ENTRIES = 1 << 22


def presolve(problem: Problem, pool: Pool) -> Core:
    """The reduced problem; raises Infeasible when no choice has a finite cost."""
    times = row_times(problem)
    limit = float(problem.limit) if problem.limit is not None else 0.0
    state = _State(pool, len(problem.nodes), np.full(len(times), limit), times)
    for v, node in enumerate(problem.nodes):
        spans = []
        for use in node.uses:
            begin, end = (int(i) for i in np.searchsorted(times, (use.begin, use.end)))
            if begin < end:
                spans.append((begin, end, pool.read(use.usages)))
        state.add_node(v, _range(pool, len(node.costs)), pool.read(node.costs), tuple(spans))
    for edge in problem.edges:
        table = pool.read(edge.costs)
        if edge.u == edge.v:
            state.add_unary(edge.u, np.diagonal(table)[state.labels[edge.u]])
        else:
            table = pool.rows(table, state.labels[edge.u])
            state.add_edge(
                edge.u, edge.v, pool.turned(pool.rows(pool.turned(table), state.labels[edge.v]))
            )
    return state.finish()


def reduce_again(core: Core, keep: Sequence[Picks], pool: Pool) -> Core:
    """The core with only these choices per node, reduced further; raises Infeasible."""
    state = _State(pool, core.nodes, core.slack.copy(), core.times)
    state.constant, state.trail = core.constant, list(core.trail)
    for i, v in enumerate(core.names):
        spans = tuple((b, e, pool.rows(usages, keep[i])) for b, e, usages in core.spans[i])
        state.add_node(v, core.labels[i][keep[i]], pool.rows(core.unary[i], keep[i]), spans)
    for i, around in enumerate(core.links):
        for j, table in around.items():
            if i < j:
                table = pool.turned(pool.rows(table, keep[i]))
                table = pool.turned(pool.rows(table, keep[j]))
                state.add_edge(core.names[i], core.names[j], table)
    return state.finish()


class _State:
    """The problem while it is being reduced, by the problem's node numbers."""

    def __init__(self, pool: Pool, nodes: int, slack: Costs, times: Picks) -> None:
        self.pool, self.slack, self.times = pool, slack, times
        self.unary: list[Costs] = [np.zeros(0)] * nodes
        self.labels: list[Picks] = [_range(pool, 0)] * nodes
        self.spans: list[dict[tuple[int, int], Costs]] = [{} for _ in range(nodes)]
        self.links: list[dict[int, Costs]] = [{} for _ in range(nodes)]
        self.alive = [False] * nodes
        self.constant = 0.0
        self.trail: list[Step] = []
        self.edges: deque[tuple[int, int]] = deque()
        self.nodes: deque[int] = deque()
        self.edge_waits: set[tuple[int, int]] = set()
        self.node_waits: set[int] = set()

    def add_node(self, v: int, labels: Picks, unary: Costs, spans: tuple[Span, ...]) -> None:
        """Bring node v in, less its impossible choices."""
        self.alive[v] = True
        self.labels[v], self.unary[v] = labels, unary
        self.hold(v, spans)
        self.restrict(v, np.flatnonzero(unary < np.inf))
        self.wake_node(v)

    def finish(self) -> Core:
        """Reduce as far as it goes."""
        rows = -1
        while rows != len(self.slack):
            rows = len(self.slack)
            self.drop_slack_rows()
            self.settle()
        return self.core()

    # -- small changes ---------------------------------------------------------------------------

    def wake_node(self, v: int) -> None:
        """Look at v again."""
        if v not in self.node_waits:
            self.node_waits.add(v)
            self.nodes.append(v)

    def wake_edge(self, u: int, v: int) -> None:
        """Look at the edge again."""
        edge = (min(u, v), max(u, v))
        if edge not in self.edge_waits:
            self.edge_waits.add(edge)
            self.edges.append(edge)

    def hold(self, v: int, spans: Iterable[Span]) -> None:
        """Add memory to v. What every choice takes comes off the slack for good."""
        pool, own = self.pool, self.spans[v]
        for begin, end, usages in spans:
            have = own.pop((begin, end), None)
            if have is not None:
                usages = pool.add(have, usages)
            least = pool.once(("least", id(usages)), partial(_minimum, usages))
            if least:
                self.slack[begin:end] -= least
                usages = pool.once(("rest", id(usages)), partial(_above, pool, usages, least))
            if pool.once(("any", id(usages)), partial(np.any, usages)):
                own[begin, end] = usages

    def lift(self, v: int, picks: Picks) -> list[Span]:
        """Take the memory off v, as it is for these picks of its choices."""
        taken = [(b, e, self.pool.rows(usages, picks)) for (b, e), usages in self.spans[v].items()]
        self.spans[v] = {}
        return taken

    def add_unary(self, v: int, costs: Costs) -> None:
        """Add to the costs of v, in its present choices."""
        self.unary[v] = self.pool.intern(self.unary[v] + costs)
        if not (self.unary[v] < np.inf).all():
            self.restrict(v, np.flatnonzero(self.unary[v] < np.inf))
        self.wake_node(v)

    def add_edge(self, u: int, v: int, table: Costs) -> None:
        """Add a table with rows for u and columns for v."""
        if v in self.links[u]:
            table = self.pool.add(self.links[u][v], table)
        self.set_edge(u, v, table)

    def set_edge(self, u: int, v: int, table: Costs) -> None:
        """Put a table on the edge, in both directions, and wake what it touches."""
        self.links[u][v] = table
        self.links[v][u] = self.pool.turned(table)
        self.wake_edge(u, v)
        self.wake_node(u)
        self.wake_node(v)

    def drop_edge(self, u: int, v: int) -> None:
        """Take the edge away."""
        del self.links[u][v], self.links[v][u]
        self.wake_node(u)
        self.wake_node(v)

    def restrict(self, v: int, keep: Picks) -> None:
        """Leave v only these of its present choices."""
        if not len(keep):
            raise Infeasible
        if len(keep) == len(self.unary[v]):
            return
        pool = self.pool
        self.unary[v] = pool.rows(self.unary[v], keep)
        self.labels[v] = self.labels[v][keep]
        self.hold(v, self.lift(v, keep))
        for u in self.links[v]:
            self.set_edge(v, u, pool.rows(self.links[v][u], keep))
        self.wake_node(v)

    def remove(self, v: int, step: Step) -> None:
        """Take v out; the step says how to find its choice again."""
        for u in self.links[v]:
            del self.links[u][v]
            self.wake_node(u)
        self.links[v] = {}
        self.alive[v] = False
        self.trail.append(step)

    # -- reductions ------------------------------------------------------------------------------

    def settle(self) -> None:
        """Reduce until nothing changes; edges first, since they are cheap to look at."""
        while self.edges or self.nodes:
            if self.edges:
                edge = self.edges.popleft()
                self.edge_waits.discard(edge)
                if edge[1] in self.links[edge[0]]:
                    self.reduce_edge(*edge)
            else:
                v = self.nodes.popleft()
                self.node_waits.discard(v)
                if self.alive[v]:
                    self.reduce_node(v)

    def reduce_edge(self, u: int, v: int) -> None:
        """Arc consistency, separable tables and functions on one edge."""
        table = self.links[u][v]
        kind = self.pool.once(("kind", id(table)), lambda: _kind(table))
        if kind == "plain":
            return
        if kind == "separable":
            self.drop_edge(u, v)
            self.add_unary(u, table[:, 0])
            self.add_unary(v, table[0] - table[0, 0])
            return
        finite = np.isfinite(table)
        rows, columns = finite.any(axis=1), finite.any(axis=0)
        if not (rows.all() and columns.all()):
            self.restrict(u, np.flatnonzero(rows))
            if v in self.links[u]:
                self.restrict(v, np.flatnonzero(columns))
            return
        follows_u, follows_v = (
            bool((finite.sum(axis=1) == 1).all()),
            bool((finite.sum(axis=0) == 1).all()),
        )
        if follows_u and follows_v and len(self.links[u]) < len(self.links[v]):
            follows_u = False  # either may go: let the one with fewer edges
        if follows_u:
            self.contract(u, v)
        elif follows_v:
            self.contract(v, u)

    def contract(self, u: int, v: int) -> None:
        """Node v is a function of u: move all it has to u."""
        pool, table = self.pool, self.links[u][v]
        f = pool.once(("function", id(table)), lambda: np.isfinite(table).argmax(axis=1))
        costs = table[np.arange(len(f)), f] + self.unary[v][f]
        edges = [(w, pool.rows(t, f)) for w, t in self.links[v].items() if w != u]
        spans = self.lift(v, f)
        self.remove(v, Step(v, (u,), (self.labels[u],), self.labels[v][f]))
        self.hold(u, spans)
        for w, moved in edges:
            self.add_edge(u, w, moved)
        self.add_unary(u, costs)

    def reduce_node(self, v: int) -> None:
        """Drop dominated choices of v, then v itself if it is simple enough."""
        around = self.links[v]
        if len(self.unary[v]) > 1 and len(around) <= _DEGREE:
            keep = self.kept(v)
            if len(keep) < len(self.unary[v]):
                self.restrict(v, keep)
                return  # it has been woken
        if len(self.unary[v]) == 1:
            self.fix(v)
        elif not self.spans[v] and len(around) <= 2:
            self.minimise_out(v)

    def kept(self, v: int) -> Picks:
        """The undominated choices of v; nodes that look the same are worked out once."""
        unary, usages = self.unary[v], list(self.spans[v].values())
        tables = sorted(self.links[v].values(), key=lambda t: t.shape[1])
        key = ("kept", id(unary), *sorted(map(id, tables)), "|", *sorted(map(id, usages)))
        return self.pool.once(key, lambda: undominated(unary, tables, usages))

    def fix(self, v: int) -> None:
        """A node of one choice becomes a cost of its neighbours."""
        edges = list(self.links[v].items())
        self.constant += float(self.unary[v][0])
        self.remove(v, Step(v, (), (), self.labels[v].reshape(())))
        for u, table in edges:
            self.add_unary(u, table[0])

    def minimise_out(self, v: int) -> None:
        """Remove a node that holds no memory and has at most two edges."""
        pool, unary, labels = self.pool, self.unary[v], self.labels[v]
        edges = sorted(self.links[v].items())
        entries = len(unary)
        for _, table in edges:
            entries *= table.shape[1]
        if entries > _ENTRIES:
            return
        key = ("least", id(unary), *(id(t) for _, t in edges))
        best, costs = pool.once(key, lambda: _least(pool, unary, [t for _, t in edges]))
        given = tuple(u for u, _ in edges)
        own = tuple(self.labels[u] for u in given)
        self.remove(v, Step(v, given, own, np.asarray(labels[best])))
        if len(edges) == 2:
            self.add_edge(given[0], given[1], costs)
        elif edges:
            self.add_unary(given[0], costs)
        else:
            self.constant += float(costs.min())

    def drop_slack_rows(self) -> None:
        """Forget rows that no choice can overflow, and wake the nodes that held memory there."""
        rows = len(self.slack)
        change = np.zeros(rows + 1)
        for own in self.spans:
            for (begin, end), usages in own.items():
                most = float(usages.max())
                change[begin] += most
                change[end] -= most
        tight = np.cumsum(change)[:rows] > self.slack
        # A row that is short even of what every choice takes stays: it proves infeasibility.
        tight |= self.slack < 0
        if tight.all():
            return
        place = np.concatenate([[0], np.cumsum(tight)])
        self.slack, self.times = self.slack[tight], self.times[tight]
        for v, own in enumerate(self.spans):
            if own:
                moved = [(int(place[b]), int(place[e]), usages) for (b, e), usages in own.items()]
                self.spans[v] = {}
                self.hold(v, (span for span in moved if span[0] < span[1]))
                self.wake_node(v)

    def core(self) -> Core:
        """What is left, renumbered."""
        names = tuple(v for v, alive in enumerate(self.alive) if alive)
        number = {v: i for i, v in enumerate(names)}
        return Core(
            names,
            tuple(self.labels[v] for v in names),
            tuple(self.unary[v] for v in names),
            tuple({number[u]: t for u, t in sorted(self.links[v].items())} for v in names),
            self.constant,
            tuple(tuple((b, e, x) for (b, e), x in self.spans[v].items()) for v in names),
            self.slack,
            self.times,
            tuple(self.trail),
            len(self.alive),
        )


def _range(pool: Pool, n: int) -> Picks:
    return pool.once(("range", n), lambda: np.arange(n))


def _minimum(usages: Costs) -> float:
    return float(usages.min())


def _above(pool: Pool, usages: Costs, least: float) -> Costs:
    return pool.intern(usages - least)


def _kind(table: Costs) -> str:
    """What a table allows: nothing (plain), a split in two (separable); or it has infinities."""
    if not np.isfinite(table).all():
        return "holes"
    split = table[:, :1] + (table[:1] - table[0, 0])
    return "separable" if np.array_equal(split, table) else "plain"


def _least(pool: Pool, unary: Costs, tables: list[Costs]) -> tuple[Picks, Costs]:
    """Best choice and least cost for each pair of the neighbours' choices."""
    total = unary
    for table in tables:
        total = total[..., None] + table.reshape(len(unary), *[1] * (total.ndim - 1), -1)
    return total.argmin(axis=0), pool.intern(np.ascontiguousarray(total.min(axis=0)))
