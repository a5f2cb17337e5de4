"""How do the options of a command become a plan?  What is checked before that takes its time?"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from autoshard.cli_options import as_number
from autoshard.cli_target import TargetError, load
from autoshard.progress import progress

if TYPE_CHECKING:
    from autoshard.api import Plan
    from cost_models.cluster import Cluster


@dataclass(frozen=True)
class Asked:
    """The options of a command that plans, by their names there."""

    mesh: str | None = None
    hint: list[str] | None = None
    solver: str = "ilp"
    microbatches: str | None = None
    blockwise: str | None = None
    time_axis: list[str] | None = None
    remat: str | None = None
    stages: str | None = None
    schedule: str | None = None
    chunks: int | None = None
    memory_limit: str | None = None
    donate: list[int] | None = None

    @classmethod
    def among(cls, options: Mapping[str, Any]) -> Self:
        """Those that a command has."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in options.items() if k in names})

    def options(self) -> dict[str, Any]:
        """For `autoshard.plan`. Raises ValueError, HintError or MeshError for what can not be
        read."""
        return {
            "mesh": _mesh(self.mesh),
            "hints": _hints(self.hint),
            "solver": self.solver,
            "microbatches": as_number(self.microbatches),
            "blockwise": as_number(self.blockwise),
            "time_axes": _time_axes(self.time_axis),
            "remat": self.remat,
            "stages": as_number(self.stages),
            "schedule": self.schedule,
            "chunks": self.chunks,
            "memory_limit": self.memory_limit,
            "donate_argnums": tuple(self.donate or ()),
        }


def planned(target: str, cluster: str | Cluster | None, asked: Asked) -> Plan:
    """Load the target and plan it."""
    from cost_models.cluster import cluster as read_cluster

    # Before the target is loaded: it is quick.
    hardware = read_cluster(cluster) if isinstance(cluster, str) else cluster
    options = asked.options()
    fn, args = load(target)
    from autoshard.api import plan

    with progress("planning") as tell:
        return plan(fn, *args, cluster=hardware, **options, progress=tell)


def pipelines_compared(target: str, cluster: str | None, asked: Asked) -> str:
    """The best pipeline beside those that experts would take, as a table."""
    options = asked.options()
    fn, args = load(target)
    from autoshard.api import plan
    from autoshard.pipeline_comparison import as_text, beside

    kept = ("hints", "memory_limit", "donate_argnums")
    common = {"cluster": cluster, **{k: options[k] for k in kept}}
    stages = options["stages"] or "auto"
    with progress("planning") as tell:
        found = plan(fn, *args, **common, mesh=options["mesh"], stages=stages, progress=tell)
        return as_text(beside(found, lambda **o: plan(fn, *args, **common, **o), stages, tell))


def check_writable(*files: Path | None) -> None:
    """OSError for a file that can not be written."""
    for file in files:
        if file is None:
            continue
        if not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"cannot write {file}: there is no folder {file.parent}")
        if file.is_dir():
            raise IsADirectoryError(f"cannot write {file}: it is a folder; give the name of a file")
        if not os.access(file.absolute().parent, os.W_OK | os.X_OK):
            raise PermissionError(f"cannot write {file}: the folder {file.parent} is not writable")


def check_runs(target: str, fn: Callable[..., Any]) -> None:
    """TargetError for a function that `run` can not call beside its sharded form."""
    from autoshard.api import Parallelized

    static = [k for k in ("static_argnums", "static_argnames") if k in getattr(fn, "options", ())]
    if isinstance(fn, Parallelized) and static:
        raise TargetError(
            f"{target} has static arguments ({static[0]}), which run does not know; give them to "
            "the function beforehand, as functools.partial does"
        )


def _mesh(text: str | None) -> dict[str, int] | None:
    from passes.ir.mesh import Mesh

    return None if text is None else Mesh.parse(text).as_dict()


def _hints(texts: list[str] | None) -> dict[str, Any]:
    from passes.hints import HintError, parse_spec

    out: dict[str, Any] = {}
    for text in texts or ():
        glob, sign, spec = text.partition("=")
        if not sign or not glob:
            raise HintError(
                f"cannot read --hint {text!r}; write GLOB=SPEC: 'params/**/wq=None,model'"
            )
        if glob in out and out[glob] != parse_spec(spec):
            raise HintError(f"--hint {glob!r} is given twice, with different specs; remove one")
        out[glob] = parse_spec(spec)
    return out


def _time_axes(texts: list[str] | None) -> dict[str, int | str | None] | None:
    axes: dict[str, int | str | None] = {}
    for text in texts or ():
        name, sign, size = text.partition("=")
        if not (name and sign and size):
            raise ValueError(f"cannot read --time-axis {text!r}; write NAME=NUMBER: micro=8")
        if name in axes:
            raise ValueError(f"--time-axis {name!r} is given twice; remove one")
        axes[name] = as_number(size)
    return axes or None
