"""Where do my all-gathers come from?  `audit(fn, *args, cluster=...)`, of a sharded function.

The function is compiled for the cluster as it is, without planning and without the hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoshard.ask_compiler import ask_compiler
from autoshard.compiled import Profile, fits
from autoshard.retarget import lowered_for
from autoshard.targets import target_devices
from cost_models.cluster import Cluster
from cost_models.cluster import cluster as read_cluster


@dataclass(frozen=True, slots=True)
class Audit:
    """What a program does.

    compiled: None where it does not fit; needed: bytes it wants. added: options that the compiler
    had to be given beside `options`.
    """

    name: str
    cluster: str
    mesh: tuple[tuple[str, int], ...]
    memory_limit: float
    compiled: Profile | None
    needed: float
    options: Mapping[str, Any]
    added: Mapping[str, str]

    @property
    def fits(self) -> bool:
        """Whether the compiled program fits into the devices' memory."""
        return fits(self.compiled, self.memory_limit)

    def __str__(self) -> str:
        from autoshard.report_compiled import report_audit

        return report_audit(self)


def audit(
    fn: Callable[..., Any],
    *args: Any,
    cluster: str | Cluster,
    compiler_options: Mapping[str, Any] | None = None,
    devices: Sequence[Any] | None = None,
) -> Audit:
    """Compile a sharded function for a cluster, and list what its devices send each other.

    fn: jitted with shardings, or of arguments that have some, or with constraints inside. args:
    arrays or jax.ShapeDtypeStruct. devices: those to compile for, None for the cluster's.

    Raises NotSharded, NoCompiler, CompilerRefused.
    """
    hardware = read_cluster(cluster) if isinstance(cluster, str) else cluster
    name = str(getattr(fn, "__name__", "function"))
    lowered, mesh = lowered_for(fn, args, devices or target_devices(hardware))
    options = dict(compiler_options or {})
    found = ask_compiler(lowered, hardware, tuple(n for _, n in mesh), options, name)
    return Audit(
        name,
        str(hardware),
        mesh,
        hardware.memory_limit,
        found.compiled,
        found.needed,
        options,
        found.added,
    )
