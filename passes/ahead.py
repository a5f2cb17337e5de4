"""When does a gather begin that runs beside what comes before it?

XLA:TPU gathers what is there early piece by piece inside the kernels that run before its reader,
one such gather at a time (`async_collective_fusion` in a compiled program; `passes.compiler`). So
the whole copy lies in memory as long as its gather takes: from the step after which arithmetic
takes as long, but not before the reader of the last gather has run. An MLP's step for v5e and v5p
gathers a batch of 134 MB from the first backward product on. Gathers that take little but their
latency hold up none: one GPT's forward pass for v5e gathers scales and biases together at its
start, and its head of 66 MB beside the four products before it. That little is up to twice the
latency is a choice, not seen. (jax 0.10.2, libtpu 0.0.42.1.)

XLA:GPU combines gathers along the same axis of what is there already, up to 30 MiB of results
(`xla_gpu_all_gather_combine_threshold_bytes`): all of them lie there from the first reader on.
Seven of eight gradients of 4 MiB are one gather, for A100 and H100. (jax 0.10.2.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

from passes.answer import Change
from passes.priced import Priced
from passes.reshard import reshard_seconds

_COMBINED = 30 * 2**20


def gathers_ahead(priced: Priced, changed: Sequence[Change]) -> Mapping[int, int]:
    """By place in changed the step at which a gather begins, of those that begin early."""
    when = priced.live.when
    gathers = [n for n, c in enumerate(changed) if _runs_beside(priced, c)]
    takes = {n: _seconds(priced, changed[n], changed[n].nbytes) for n in gathers}
    long = (n for n in gathers if takes[n] > 2 * _seconds(priced, changed[n], 1.0))
    uses = sorted({when[changed[n].op] for n in long})
    clock = _clock(priced)
    out: dict[int, int] = {}
    for n in gathers:
        use = when[changed[n].op]
        before = bisect_left(uses, use)
        free = uses[before - 1] if before else 0
        out[n] = min(use, max(free, bisect_left(clock, clock[use] - takes[n])))
    return out


def gathers_combined(priced: Priced, changed: Sequence[Change]) -> Mapping[int, int]:
    """By place in changed the step of the first reader of gathers that are combined with it."""
    if priced.cluster.platform != "gpu":
        return {}
    graph, when = priced.graph, priced.live.when
    makers = graph.producers()
    alone = [n for n, c in enumerate(changed) if _is_a_gather(c) and not graph.ops[c.op].region]
    out: dict[int, int] = {}
    open_: dict[int, tuple[int, float]] = {}  # by mesh axis the first reader's step, and the bytes
    for n in sorted(alone, key=lambda n: (when[changed[n].op], n)):
        c = changed[n]
        axis, size = c.moves[0].axis, c.moves[0].larger * c.nbytes
        first, total = open_.get(axis, (-1, 0.0))
        there = makers[c.value] < 0 or when[makers[c.value]] < first
        if first < 0 or not there or total + size > _COMBINED:
            first, total = when[c.op], 0.0
        open_[axis] = first, total + size
        out[n] = first
    return out


def _is_a_gather(c: Change) -> bool:
    """Whether all that a reader needs of a value is one gather."""
    return c.side != "result" and len(c.moves) == 1 and c.moves[0].kind == "all_gather"


def _seconds(priced: Priced, c: Change, nbytes: float) -> float:
    return reshard_seconds(c.moves, nbytes, priced.links)


def first_gather(priced: Priced, changed: Sequence[Change]) -> int:
    """The step of the first gather outside loops; that of the program's end where there is none."""
    graph, when = priced.graph, priced.live.when
    ops = (c.op for c in changed if any(m.kind == "all_gather" for m in c.moves))
    return min((when[o] for o in ops if not graph.ops[o].region), default=priced.live.steps)


def _runs_beside(priced: Priced, c: Change) -> bool:
    """Whether it gathers what is there early, on a TPU; in a loop each trip gathers its own."""
    return (
        priced.cluster.platform == "tpu"
        and c.side != "result"
        and c.value in priced.overlap.early
        and not priced.graph.ops[c.op].region
        and any(m.kind == "all_gather" for m in c.moves)
    )


def _clock(priced: Priced) -> list[float]:
    """Seconds of arithmetic before each step, at best."""
    before = priced.overlap.before
    each = [b - a for a, b in pairwise((*before, *before[-1:]))]
    return list(accumulate((each[o] for o in priced.live.order), initial=0.0))
