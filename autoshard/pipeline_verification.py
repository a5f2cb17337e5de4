"""Is the prediction for a pipeline true?  Each different piece is compiled for one group's devices.

What is compiled is what a piece does in a step (`autoshard.stage_step`), as one program: its tasks
over all microbatches, then its update. It holds the activations of one microbatch, where the
schedule holds those of several: these are known, and counted on top in the plan of the pipeline.
Sends between stages, and sums over data-parallel groups, are no part of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autoshard.bound_plan import Plan, donating
from autoshard.targets import target_devices
from autoshard.trace import Traced
from autoshard.verification import Verification
from cost_models.cluster import Cluster
from passes.ir import plan as ir
from passes.ir.plan import PlanError

Tell = Callable[[str], None]


@dataclass(frozen=True)
class PipelineVerification:
    """Per different piece which pieces are like it, and its verification."""

    pieces: tuple[tuple[tuple[int, ...], Verification], ...]

    @property
    def fits(self) -> bool:
        """Whether all compiled programs fit into the devices' memory."""
        return all(v.fits for _, v in self.pieces)

    def __str__(self) -> str:
        return "\n\n".join(
            f"piece {', '.join(map(str, alike))}\n{verified}" for alike, verified in self.pieces
        )


def verify_pieces(
    plans: Sequence[ir.Plan], traced: Sequence[Traced], devices: Sequence[Any] | None, tell: Tell
) -> PipelineVerification:
    """Compile each different piece. plans, traced: of each piece, alike ones with one plan.

    devices: of one group; None for those of the plan's cluster. Raises NoCompiler, CompilerRefused.
    """
    out = []
    for plan in dict.fromkeys(map(id, plans)):
        alike = tuple(k for k, own in enumerate(plans) if id(own) == plan)
        first = plans[alike[0]]
        group = group_of(Cluster.from_dict(first.cluster), first.mesh_axes.devices)
        data = dataclasses.replace(first, cluster=group.to_dict())
        found = target_devices(group) if devices is None else devices
        tell(f"compiling piece {alike[0]} for {found[0].device_kind}")
        bound = Plan(data, donating(traced[alike[0]], data.donated))
        out.append((alike, bound.verify(found)))
    return PipelineVerification(tuple(out))


def group_of(cluster: Cluster, size: int) -> Cluster:
    """So many devices of a cluster, as near to each other as can be. Raises PlanError.

    >>> from cost_models.cluster import cluster
    >>> str(group_of(cluster("a100:16x8"), 8)), str(group_of(cluster("tpu-v5e:8x8"), 8))
    ('a100:1x8', 'tpu-v5e:4x2')
    """
    shape = [1] * len(cluster.shape)
    if cluster.platform != "tpu":
        left = size
        for k in reversed(range(len(shape))):
            shape[k] = math.gcd(left, cluster.shape[k])
            left //= shape[k]
    else:
        while math.prod(shape) < size:
            room = [k for k, n in enumerate(cluster.shape) if n % (2 * shape[k]) == 0]
            if not room:
                break
            shape[min(room, key=lambda k: (shape[k], k))] *= 2
    group = dataclasses.replace(cluster, shape=tuple(shape))
    if group.devices != size:
        raise PlanError(f"a group of {size} devices is no block of {cluster}: it is not compiled")
    return group
