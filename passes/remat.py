"""Which parts of a program are computed again in its backward half, so that it fits?

`regions_of` finds the parts (`passes.remat_region`), `worth_of` says what each is worth. As many
are taken as are needed, those first that free a byte in the least time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TypeVar

from cost_models.cluster import Cluster
from cost_models.units import format_bytes, format_seconds
from passes.bodies import Path, bodies
from passes.checkpointed import of_user
from passes.fusion import Fusion, fuse
from passes.ir.graph import LOOPS, Graph
from passes.op_seconds import op_seconds
from passes.remat_layers import remat_layers
from passes.remat_region import RematRegion, freed
from passes.remat_scans import remat_scans

P = TypeVar("P")


def regions_of(
    graph: Graph, deciders: Mapping[Path, int], backward: Collection[Path]
) -> tuple[RematRegion, ...]:
    """The parts that free memory when they are computed again.

    graph: without calls, and with no rematerialised part but the user's (`autoshard.flat.Kept`).
    backward: paths of equations that a gradient added.
    """
    user = of_user(graph)
    theirs = {_loop(op.path) for op in graph.ops if _is_loop_of_user(graph, op.region)}
    inside = [b for b in bodies(graph, deciders) if b.path not in theirs]
    nbytes = [v.type.nbytes for v in graph.values]
    scans = [r for r in remat_scans(graph, inside, backward, user) if freed(r, nbytes) > 0]
    apart = {r.chain.writer for r in scans if r.chain is not None and r.chain.writer is not None}
    layers = remat_layers(graph, inside, backward, user, apart)
    return (*scans, *(r for r in layers if freed(r, nbytes) > 0))


def _is_loop_of_user(graph: Graph, region: int) -> bool:
    """Whether the loop around lies in a part that `jax.checkpoint` computes again."""
    return bool(graph.innermost(graph.innermost(region, LOOPS), ("remat",)))


def _loop(path: Path) -> Path:
    """The path of the innermost body around an operation."""
    last = max((k for k, p in enumerate(path) if p == "body"), default=-1)
    return path[: last + 1]


@dataclass(frozen=True)
class Worth:
    """What computing parts again saves and takes on a platform: by part bytes and seconds, both on
    one device without any sharding. Bytes are those that the compiler keeps without.
    """

    regions: tuple[RematRegion, ...]
    bytes: tuple[float, ...]
    seconds: tuple[float, ...]

    def cheapest_first(self) -> tuple[int, ...]:
        """Numbers of parts, those first that free a byte in the least time."""

        def price(k: int) -> tuple[float, int]:
            return self.seconds[k] / self.bytes[k] if self.bytes[k] > 0 else inf, k

        return tuple(sorted(range(len(self.regions)), key=price))


def worth_of(graph: Graph, regions: Sequence[RematRegion], cluster: Cluster) -> Worth:
    """What computing these again is worth."""
    seconds, fusion = op_seconds(graph, cluster), fuse(graph, cluster.platform)
    return Worth(
        tuple(regions),
        tuple(_freed(graph, r, fusion) for r in regions),
        tuple(sum(seconds[o] for o in r.again) for r in regions),
    )


def _freed(graph: Graph, region: RematRegion, fusion: Fusion) -> float:
    """Bytes that a region need not keep any more, less those that it has to.

    Where a kernel of the backward half makes a residual by itself, it is what that is made of.
    """
    producers, again = graph.producers(), set(region.again)
    seen, nbytes, todo = set[int](), 0.0, list(region.residuals)
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        if fusion.stored[v]:
            nbytes += fusion.kept.of_value[v]
        elif producers[v] in again:
            todo += graph.ops[producers[v]].inputs
    return nbytes - region.kept


def fewest(fits: Callable[[int], P | None], most: int, best: P) -> P:
    """What `fits` gives for the fewest regions; None where so many do not fit. best: for all."""
    low, high = 0, most  # low do not fit, high do
    while high - low > 1:
        middle = (low + high) // 2
        found = fits(middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


# Words


def nothing_again(name: str) -> str:
    """Why there is nothing to compute again."""
    return (
        f"remat: {name} has nothing to compute again: no backward half reads results of layers "
        "that are not in a jax.checkpoint already"
    )


def note_of(worth: Worth, chosen: Sequence[int], seconds: float) -> str:
    """What is computed again, what that frees, and what it takes. seconds: more a step."""
    count = len(worth.regions)
    parts = f"{count} part{'s' * (count != 1)}"
    if not chosen:
        return f"remat: it fits with none of {parts} computed again"
    mine = [worth.regions[k] for k in chosen]
    lines = Counter(f"{r.name} at {r.source or 'an unknown line'}" for r in mine)
    where = ", ".join(f"{n} x {line}" if n > 1 else line for line, n in lines.items())
    longer = f"takes {format_seconds(seconds)} more a step" if seconds > 0 else "takes no longer"
    return (
        f"remat: {len(mine)} of {parts} computed again in the backward half ({where}), which frees "
        f"{format_bytes(sum(worth.bytes[k] for k in chosen))} on all devices together, and {longer}"
    )
