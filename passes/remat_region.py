"""What is a part of a program that can be computed again?  A `RematRegion`.

A *residual* is a value of the forward half that the backward half reads. A region is a layer that
stands in the program by itself, or a scan over layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from passes.bodies import Body, Path
from passes.ir.graph import Graph, Op
from passes.through_scans import Chain


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a body. equations: paths of those that are computed again, in order.

    values: what is made again; leaves: of what. before: the path of the equation that reads it
    first; beside: values of the backward half that are there by then.
    """

    body: Path
    equations: tuple[Path, ...]
    values: tuple[int, ...]
    leaves: tuple[int, ...]
    before: Path
    beside: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RematRegion:
    """name: what it is; source: its line. again: ids of the operations that are computed again.

    residuals: values that need not be kept, of a scan the stacks; kept: bytes that have to be
    instead, of all layers and on all devices together.

    Of a scan: reader: the path of the backward one, chain: what it makes again. Else layer.
    """

    name: str
    source: str
    again: tuple[int, ...]
    residuals: tuple[int, ...]
    kept: float
    reader: Path = ()
    chain: Chain | None = None
    layer: Layer | None = None


def freed(region: RematRegion, nbytes: Sequence[float]) -> float:
    """Bytes that a region need not keep, less those that it has to. nbytes: of each value."""
    return sum(nbytes[v] for v in region.residuals) - region.kept


def under(graph: Graph) -> Mapping[Path, tuple[Op, ...]]:
    """By path of an equation of any body, its operations: itself, or what lies in it."""
    out: dict[Path, list[Op]] = {}
    for op in graph.ops:
        for n in range(1, len(op.path) + 1):
            out.setdefault(op.path[:n], []).append(op)
    return {path: tuple(ops) for path, ops in out.items()}


def maker_of(body: Body) -> Mapping[int, int]:
    """Per value that a body's equations make, the place of the equation among its units."""
    return {v: k for k, u in enumerate(body.units) for v in u.makes}
