"""Into how many blocks is each region cut?  As many as were asked for, or until a block is small.

>>> divisors(12)
[1, 2, 3, 4, 6, 12]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from passes.block_loops import Blocked
from passes.ir.graph import Graph
from passes.regions import Refused, Region, along

_FAR = 2  # times as many blocks as are needed


class NoBlocks(ValueError):
    """A program that can not run in so many blocks; the sentence says why, and what is nearest."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """count: the blocks of every region; or, where it is 0, nbytes: of a huge value, all devices
    together, that a block has at most.
    """

    count: int = 0
    nbytes: int = 0

    def __bool__(self) -> bool:
        return self.count > 1 or self.nbytes > 0


NO_BLOCKS = Blocks()


def counts_of(graph: Graph, regions: Sequence[Region], blocks: Blocks) -> tuple[int, ...]:
    """The number of blocks of each region; 1 for none. Raises NoBlocks."""
    if blocks.count:
        return tuple(_asked(graph, regions, r, blocks.count) for r in regions)
    return tuple(_small_enough(graph, region, blocks.nbytes) for region in regions)


def _small_enough(graph: Graph, region: Region, nbytes: int) -> int:
    """The fewest blocks that are small enough and divide; where those are far more, ragged ones."""
    times, length = -(-largest(graph, region) // nbytes), region.axis.length
    if times == 1:
        return 1
    fit = (n for n in divisors(length) if times <= n <= _FAR * times)
    even = next((n for n in fit if along(region, graph, n)), 0)
    if even or along(region, graph, length):
        return even or min(length, 1 << (times - 1).bit_length())
    return next(n for n in reversed(divisors(length)) if n == 1 or along(region, graph, n))


def largest(graph: Graph, region: Region) -> int:
    """Bytes of the largest huge value of a region."""
    ops = (graph.ops[region.body.units[k].op] for k in region.units)
    return max(graph.values[v].type.nbytes for op in ops for v in op.outputs if v in region.values)


def divisors(n: int) -> list[int]:
    """All numbers that divide n."""
    small = [p for p in range(1, int(n**0.5) + 1) if n % p == 0]
    return sorted({*small, *(n // p for p in small)})


def _asked(graph: Graph, regions: Sequence[Region], region: Region, count: int) -> int:
    if along(region, graph, count) is not None:
        return count
    lengths = {r.axis.length for r in regions}
    fit = [n for n in divisors(min(lengths)) if all(along(r, graph, n) for r in regions)]
    near = min(fit or [1], key=lambda n: (abs(n - count), n))
    raise NoBlocks(
        f"{made_at(graph, region.root)} can not be cut into {count} blocks along its dim "
        f"{region.axis.dim} of {region.axis.length}; the nearest number that divides is {near}"
    )


# Words


def made_at(graph: Graph, o: int) -> str:
    """What an operation makes, and where it stands."""
    op = graph.ops[o]
    return f"{graph.values[op.outputs[0]].type} of {op.name} at {op.source or 'an unknown line'}"


def nothing_to_cut(graph: Graph, name: str, refused: Sequence[Refused]) -> str:
    """Why a program has no region."""
    if not refused:
        return f"nothing in {name} is much larger than what it is made of: there are no blocks"
    first = refused[0]
    op = graph.ops[first.op]
    return (
        f"nothing of {name} can run in blocks: {made_at(graph, first.root)} is huge, but {op.name} "
        f"at {op.source or 'an unknown line'} needs it whole along every dim"
    )


def notes_of(
    graph: Graph,
    regions: Sequence[Region],
    counts: Sequence[int],
    bodies: Sequence[Blocked],
    before: Sequence[str],
) -> tuple[str, ...]:
    """What runs in blocks, where it stands in the user's code, and what is computed again.

    before: products that scans compute again, besides.
    """
    lines: Counter[str] = Counter()
    for loop in (loop for body in bodies for loop in body.loops):
        region = regions[loop.region]
        lines[
            f"{made_at(graph, region.root)}: in {counts[loop.region]} blocks along its dim "
            f"{region.axis.dim}"
        ] += 1
    notes = [f"{line}, {n} loop{'s' * (n > 1)}" for line, n in lines.items()]
    again = dict.fromkeys(before)
    again |= {
        f"{op.name} at {op.source}": None
        for body in bodies
        for loop in body.loops
        for op in (graph.ops[o] for o in sorted(loop.again))
        if op.name in ("dot_general", "conv_general_dilated")
    }
    if again:
        notes.append(f"computed again, block by block: {', '.join(again)}")
    return tuple(notes)
