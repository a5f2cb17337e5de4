"""What do a problem's numbers mean?  `Priced`: the problem of one graph on one mesh, explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cost_models.cluster import Cluster
from cost_models.topology import AxisLink
from passes.decisions import Decisions, Group
from passes.fusion import Fusion
from passes.hints import HintError
from passes.ir.graph import Graph
from passes.ir.mesh import Mesh
from passes.liveness import Liveness
from passes.loop_stacks import Stacks
from passes.overlap import Overlap
from passes.relaid import Copied
from passes.solve.problem import Problem
from passes.strategies import Axes, Layouts, Strategy


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a problem node stands for. kind: "group", "op" or "copy"; index: its id there.

    choices: per choice a sharding of the group's dims ("group"), of the value's dims ("copy"), or a
    strategy ("op").
    """

    kind: str
    index: int
    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Priced:
    """The problem and what its numbers mean.

    node_of_group: per group its node, or -1 where it has only one choice. owner: per op the node
    that decides its strategy, or -1. tables: per op the strategy under each choice of its owner.
    constant: seconds that no choice changes. only: per group its sole choice where it has no node.
    layouts: what strategies want and make, as far as it was asked.
    narrow: copies that are sent as narrow readers want them. copied: as of passes.relaid. stacks:
    as of passes.loop_stacks. like: per operation the first one that is split as it is, and costs as
    much, under every choice. picked: as of passes.bags, where their tiles are turned.
    """

    graph: Graph
    mesh: Mesh
    links: tuple[AxisLink, ...]
    cluster: Cluster
    decisions: Decisions
    live: Liveness
    problem: Problem
    meanings: tuple[Meaning, ...]
    node_of_group: tuple[int, ...]
    only: tuple[Axes, ...]
    owner: tuple[int, ...]
    tables: tuple[tuple[Strategy, ...], ...]
    copies: Mapping[tuple[int, int], int]
    fusion: Fusion
    constant: float
    layouts: Layouts
    narrow: frozenset[int]
    overlap: Overlap
    copied: Mapping[int, Copied]
    stacks: Stacks
    like: tuple[int, ...]
    picked: Mapping[int, int]


class HintUnmet(HintError):
    """A hard hint that no legal sharding of its value meets."""


def label_of(graph: Graph, producers: Sequence[int], group: Group) -> str:
    """The argument among the values of a group, or its largest value and who makes it."""
    for v in group.members:
        if graph.values[v].name:
            return graph.values[v].name
    largest = max(group.members, key=lambda v: (graph.values[v].type.nbytes, -v))
    type, maker = graph.values[largest].type, producers[largest]
    if maker < 0:
        return f"{type} {graph.values[largest].kind}"
    op = graph.ops[maker]
    return f"{type} of {op.name} {op.source}".strip()
