"""What do our problems look like?  Made-up ones to try a solver on: tiny ones and transformers.

`random_problem` and `knotty_problem` make small problems that brute force can solve, with forbidden
pairs, duplicate edges and memory limits that bind. `transformer` writes down the train step of a
transformer as einsums, and makes of it the problem that autoshard would: one node per operation
whose choices assign each mesh axis to an index letter, edges that price the resharding, and memory
over the live intervals. Repeated layers share their cost arrays.

>>> transformer(layers=1).nodes[0].label
'tokens'
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from passes.solve.problem import INFINITY, Costs, Edge, Node, Problem, Use


def random_problem(seed: int, *, limit: bool = True, forbidden: float = 0.2) -> Problem:
    """A problem of at most 7 nodes with at most 4 choices; the limit, if any, is often tight."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, rng.integers(1, 8))
    top = int(rng.choice([3, 10, 1000]))

    def numbers(shape: tuple[int, ...]) -> Costs:
        costs = rng.integers(-top // 4, top, shape).astype(np.float64)
        costs[rng.random(shape) < rng.choice([0.0, forbidden])] = INFINITY
        return costs

    nodes = []
    for n in sizes:
        uses = []
        for _ in range(rng.integers(0, 4)):
            begin = int(rng.integers(0, 8))
            usages = rng.integers(0, 12, n).astype(np.float64)
            uses.append(Use(begin, begin + int(rng.integers(0, 5)), usages))
        nodes.append(Node(numbers((int(n),)), tuple(uses)))
    edges = []
    for _ in range(rng.integers(0, 2 * len(sizes) + 1)):
        u, v = (int(i) for i in rng.integers(0, len(sizes), 2))
        if u != v:
            edges.append(Edge(u, v, numbers((len(nodes[u].costs), len(nodes[v].costs)))))
    problem = Problem(f"random {seed}", tuple(nodes), tuple(edges))
    if not limit:
        return problem
    least = problem.memory([0] * len(nodes)).max(initial=0.0)
    return Problem(
        problem.name, problem.nodes, problem.edges, float(rng.integers(0, int(least) + 10))
    )


def knotty_problem(seed: int, *, whole: bool = True) -> Problem:
    """Six nodes, most pairs joined, memory that differs by choice and time: nothing to presolve.

    whole: costs are whole numbers. The limit lies between the least and the largest peak of a few
    random choices, and now and then below.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 5, 6)

    def numbers(shape: tuple[int, ...]) -> Costs:
        costs = rng.uniform(0, 100, shape)
        return np.round(costs) if whole else costs

    nodes = []
    for n in sizes:
        begins = sorted(int(b) for b in rng.integers(0, 6, 2))
        uses = [
            Use(b, b + 2 + int(rng.integers(0, 4)), np.round(rng.uniform(0, 40, n))) for b in begins
        ]
        nodes.append(Node(numbers((int(n),)), tuple(uses)))
    edges = []
    for u in range(6):
        for v in range(u + 1, 6):
            if rng.random() < 0.6:
                table = numbers((int(sizes[u]), int(sizes[v])))
                table[rng.random(table.shape) < 0.1] = INFINITY
                edges.append(Edge(u, v, table))
    problem = Problem(f"knotty {seed}", tuple(nodes), tuple(edges))
    peaks = [problem.memory(rng.integers(0, sizes).tolist()).max() for _ in range(6)]
    limit = np.round(rng.uniform(0.7 * min(peaks), max(peaks)))
    return Problem(problem.name, problem.nodes, problem.edges, float(limit))


# A made-up accelerator: FLOP/s, memory bytes/s, and link bytes/s of the mesh axes, inner fastest.
_FLOPS = 2e14
_MEMORY = 8e11
_LINKS = (5e10, 1e11, 2e11)
_LATENCY = 2e-6
_PICO = 1e12

Letters = str
Layout = tuple[str, ...]  # per mesh axis the letter it splits, or "."


@dataclass(slots=True)
class _Op:
    """One einsum: operand node ids with their letters, result letters, elementwise or not."""

    name: str
    inputs: tuple[int, ...]
    specs: tuple[Letters, ...]
    out: Letters
    matmul: bool = False
    argument: bool = False
    consumers: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Program:
    """Operations in program order; `einsum` appends one and returns its index."""

    sizes: dict[str, int]
    ops: list[_Op] = field(default_factory=list)

    def argument(self, name: str, out: Letters) -> int:
        self.ops.append(_Op(name, (), (), out, argument=True))
        return len(self.ops) - 1

    def einsum(self, name: str, spec: str, *inputs: int) -> int:
        left, out = spec.split("->")
        specs = tuple(left.split(","))
        matmul = bool(set("".join(specs)) - set(out)) and len(specs) == 2
        for i in inputs:
            self.ops[i].consumers.append(len(self.ops))
        self.ops.append(_Op(name, inputs, specs, out, matmul))
        return len(self.ops) - 1


def transformer(
    layers: int = 4,
    mesh: Sequence[int] = (4, 2),
    *,
    tight: float | None = None,
    batch: int = 32,
    width: int = 2048,
    name: str = "",
) -> Problem:
    """A train step (forward, backward, adam) on a mesh. tight: limit between least and free peak.

    tight=None sets no limit; 0.5 sets it half-way between the smallest conceivable peak and the
    peak of the cheapest choice per node.
    """
    sizes = {"b": batch, "s": 1024, "t": 1024, "d": width, "h": 16, "k": width // 16}
    program = _train_step(layers, {**sizes, "f": 4 * width, "v": 50304})
    return _price(
        program, tuple(mesh), tight, name or f"transformer {layers} layers, mesh {tuple(mesh)}"
    )


def _train_step(layers: int, sizes: dict[str, int]) -> _Program:
    """Forward as written here, backward by transposing each einsum, then an update per weight."""
    p = _Program(sizes)
    tokens, mask = p.argument("tokens", "bs"), p.argument("mask", "st")
    weights: dict[int, str] = {}

    def weight(name: str, spec: Letters) -> int:
        w = p.argument(name, spec)
        weights[w] = spec
        return w

    x = p.einsum("embed", "bs,vd->bsd", tokens, weight("table", "vd"))
    for i in range(layers):
        x = _attention(p, x, mask, weight, f"layer{i}.")
        y = p.einsum(f"layer{i}.norm2", "bsd->bsd", x)
        y = p.einsum(f"layer{i}.up", "bsd,df->bsf", y, weight(f"layer{i}.wi", "df"))
        y = p.einsum(f"layer{i}.gelu", "bsf->bsf", y)
        y = p.einsum(f"layer{i}.down", "bsf,fd->bsd", y, weight(f"layer{i}.wo", "fd"))
        x = p.einsum(f"layer{i}.add2", "bsd,bsd->bsd", x, y)
    logits = p.einsum("logits", "bsd,dv->bsv", x, weight("head", "dv"))
    loss = p.einsum("loss", "bsv,bs->bsv", logits, tokens)
    _backward(p, loss, weights, (tokens, mask))
    return p


def _attention(p: _Program, x: int, mask: int, weight, pre: str) -> int:  # type: ignore[no-untyped-def]
    y = p.einsum(pre + "norm1", "bsd->bsd", x)
    q = p.einsum(pre + "q", "bsd,dhk->bshk", y, weight(pre + "wq", "dhk"))
    k = p.einsum(pre + "k", "btd,dhk->bthk", y, weight(pre + "wk", "dhk"))
    v = p.einsum(pre + "v", "btd,dhk->bthk", y, weight(pre + "wv", "dhk"))
    a = p.einsum(pre + "scores", "bshk,bthk->bhst", q, k)
    a = p.einsum(pre + "mask", "bhst,st->bhst", a, mask)
    a = p.einsum(pre + "softmax", "bhst->bhst", a)
    o = p.einsum(pre + "mix", "bhst,bthk->bshk", a, v)
    o = p.einsum(pre + "out", "bshk,hkd->bsd", o, weight(pre + "wp", "hkd"))
    return p.einsum(pre + "add1", "bsd,bsd->bsd", x, o)


def _backward(p: _Program, loss: int, weights: dict[int, str], stop: tuple[int, ...]) -> None:
    """Gradients in reverse order; a value read twice sums its gradients; then adam."""
    gradient: dict[int, int] = {loss: loss}
    for i in range(loss, -1, -1):
        op = p.ops[i]
        if i not in gradient or op.argument:
            continue
        for j, (source, spec) in enumerate(zip(op.inputs, op.specs, strict=True)):
            if source in stop:
                continue
            rest = [
                (n, s) for k, (n, s) in enumerate(zip(op.inputs, op.specs, strict=True)) if k != j
            ]
            if not op.matmul and op.out == spec:
                rest = []  # elementwise: its own saved result is enough
            specs = ",".join([op.out, *(s for _, s in rest)])
            g = p.einsum(f"d {op.name}", f"{specs}->{spec}", gradient[i], *(n for n, _ in rest))
            own = p.ops[source].out
            if source in gradient:
                g = p.einsum("sum", f"{own},{spec}->{own}", gradient[source], g)
            gradient[source] = g
    for w, spec in weights.items():
        m = p.argument(f"adam {p.ops[w].name}", spec)
        p.einsum(f"update {p.ops[w].name}", f"{spec},{spec},{spec}->{spec}", w, m, gradient[w])


def _price(  # noqa: C901 (one problem, built top to bottom)
    p: _Program, mesh: tuple[int, ...], tight: float | None, name: str
) -> Problem:
    """Node costs, resharding edges and memory, with one array object for each distinct matrix."""

    def bytes_of(letters: Letters) -> float:
        return 2.0 * math.prod(p.sizes[c] for c in letters)

    @cache
    def layouts(letters: Letters) -> tuple[Layout, ...]:
        each = [*sorted(set(letters)), "."]
        return tuple(
            lay for lay in itertools.product(each, repeat=len(mesh))
            if all(p.sizes[c] % math.prod(n for a, n in zip(lay, mesh, strict=True) if a == c) == 0
                   for c in set(letters))
        )  # fmt: skip

    def shards(lay: Layout, letters: Letters) -> int:
        return math.prod(n for a, n in zip(lay, mesh, strict=True) if a in letters)

    @cache
    def own(letters: Letters, out: Letters, matmul: bool, argument: bool) -> Costs:
        costs = []
        for lay in layouts(letters):
            work = math.prod(p.sizes[c] for c in set(letters))
            seconds = 0.0 if argument else 6 * work / shards(lay, letters) / _MEMORY
            if matmul:
                seconds = max(
                    2 * work / shards(lay, letters) / _FLOPS,
                    2 * bytes_of(out) / shards(lay, out) / _MEMORY,
                )
            for a, n, link in zip(lay, mesh, _LINKS, strict=False):
                if a != "." and a not in out:
                    seconds += _LATENCY + 2 * bytes_of(out) / shards(lay, out) * (n - 1) / n / link
            costs.append(round(seconds * _PICO))
        return np.array(costs, dtype=np.float64)

    @cache
    def reshard(made: Letters, out: Letters, read: Letters, spec: Letters) -> Costs:
        rename = dict(zip(spec, out, strict=True))
        table = np.zeros((len(layouts(made)), len(layouts(read))))
        for i, a in enumerate(layouts(made)):
            have = tuple(c if c in out else "." for c in a)
            for j, b in enumerate(layouts(read)):
                want = tuple(rename.get(c, ".") for c in b)
                table[i, j] = round(_PICO * _reshard_seconds(have, want, bytes_of(out), mesh))
        return table

    last = [max(op.consumers, default=i) for i, op in enumerate(p.ops)]
    nodes, edges = [], []
    usage: dict[tuple[Letters, Letters], Costs] = {}
    for i, op in enumerate(p.ops):
        letters = "".join(sorted(set("".join(op.specs) + op.out)))
        key = (letters, op.out)
        if key not in usage:
            usage[key] = np.array(
                [bytes_of(op.out) / shards(lay, op.out) for lay in layouts(letters)]
            )
        end = len(p.ops) if op.argument else last[i] + 1
        use = Use(0 if op.argument else i, end, usage[key])
        nodes.append(Node(own(letters, op.out, op.matmul, op.argument), (use,), op.name))
        for source, spec in zip(op.inputs, op.specs, strict=True):
            made = p.ops[source]
            read = "".join(sorted(set("".join(made.specs) + made.out)))
            edges.append(Edge(source, i, reshard(read, made.out, letters, spec)))
    problem = Problem(name, tuple(nodes), tuple(edges))
    if tight is None:
        return problem
    low = _peak([n.uses[0] for n in nodes], [int(n.uses[0].usages.argmin()) for n in nodes])
    free = _peak([n.uses[0] for n in nodes], [int(n.costs.argmin()) for n in nodes])
    return Problem(name, problem.nodes, problem.edges, low + tight * (free - low))


def _peak(uses: Sequence[Use], choice: Sequence[int]) -> float:
    change = np.zeros(max(u.end for u in uses) + 1)
    for use, c in zip(uses, choice, strict=True):
        change[use.begin] += use.usages[c]
        change[use.end] -= use.usages[c]
    return float(np.cumsum(change).max())


def _reshard_seconds(have: Layout, want: Layout, nbytes: float, mesh: tuple[int, ...]) -> float:
    """One collective per mesh axis whose entry changes: slice, all-gather or all-to-all."""
    local = nbytes / math.prod(n for a, n in zip(have, mesh, strict=True) if a != ".")
    seconds = 0.0
    for a, b, n, link in zip(have, want, mesh, _LINKS, strict=False):
        if a == b or n == 1:
            continue
        if a == ".":
            local /= n
        elif b == ".":
            seconds += _LATENCY + local * (n - 1) / link
            local *= n
        else:
            seconds += _LATENCY + local * (n - 1) / n / link
    return seconds
