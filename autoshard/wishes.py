"""What does a user ask of a plan?  The options of `plan` and `parallelize`, checked and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from autoshard.devices import cluster_here
from autoshard.remat import checked
from autoshard.time_wanted import TimeWanted, time_wanted
from cost_models.cluster import Cluster
from cost_models.cluster import cluster as read_cluster
from cost_models.units import parse_bytes
from passes.ir.mesh import Mesh
from passes.search import SOLVERS, Progress

Hints = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a user asks of a plan, as in `plan`."""

    cluster: str | Cluster | None
    mesh: Mapping[str, int] | None
    hints: Hints | None
    memory_limit: float | str | None
    solver: str
    fused_attention: bool
    microbatches: int | str | None
    blockwise: int | str | None
    time_axes: Mapping[str, int | str] | None
    remat: str | None
    stages: int | str | None
    schedule: str | None
    chunks: int | None
    shared_update: bool | None
    progress: Progress | None

    @staticmethod
    def of(given: Mapping[str, Any]) -> Wishes:
        """From the options of `plan` or `parallelize` by name, whatever else is given."""
        return Wishes(**{f.name: given[f.name] for f in fields(Wishes)})

    def check(self) -> None:
        """ValueError and TypeError for what can not be asked for, whatever the function."""
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown solver {self.solver!r}; there are {', '.join(SOLVERS)}")
        if self.hints is not None and not isinstance(self.hints, Mapping):
            raise TypeError(
                f"hints is a mapping of globs to specs, not {type(self.hints).__name__}"
            )
        for name in ("schedule", "chunks", "shared_update") if self.stages is None else ():
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is of a pipeline: give stages too, a number or 'auto'")
        checked(self.remat)
        time_wanted(self.time_axes, self.microbatches, self.blockwise)

    @property
    def time(self) -> TimeWanted:
        """Its time axes, however they were given."""
        return time_wanted(self.time_axes, self.microbatches, self.blockwise)

    @property
    def limit(self) -> float | None:
        """Bytes per device; None for the cluster's."""
        return None if self.memory_limit is None else float(parse_bytes(self.memory_limit))

    @property
    def hardware(self) -> Cluster:
        """The cluster: the devices here if none is given."""
        if self.cluster is None:
            return cluster_here()
        if not isinstance(self.cluster, str | Cluster):
            raise TypeError(f"cluster is text such as 'cpu:8', or a Cluster, not {self.cluster!r}")
        return read_cluster(self.cluster) if isinstance(self.cluster, str) else self.cluster

    def mesh_on(self, cluster: Cluster) -> Mesh | None:
        """The mesh that was asked for; None to search."""
        mesh = self.mesh
        if mesh is None:
            return None
        if not isinstance(mesh, Mapping):
            raise TypeError(f"mesh is a mapping such as {{'data': 4, 'model': 2}}, not {mesh!r}")
        # numpy's whole numbers too, so that a size may be computed
        out = Mesh.of({n: int(s) if isinstance(s, np.integer) else s for n, s in mesh.items()})
        if out.devices != cluster.devices:
            raise ValueError(
                f"mesh {out} has {out.devices} devices, but the cluster {cluster} has "
                f"{cluster.devices}"
            )
        return out
