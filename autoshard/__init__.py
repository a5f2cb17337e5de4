"""Say how to split a JAX function over many devices, why so, how fast and in how much memory.

    plan = autoshard.plan(train_step, state, batch, cluster="tpu-v5e:4x4")
    print(plan)

Importing does no work: it starts no backend, and jax itself is imported when one of the names that
need it is first used, so that `autoshard --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from autoshard import _siblings as _siblings  # first: refuses a foreign passes or cost_models
from cost_models.cluster import Cluster, ClusterError, UnknownCluster, cluster
from passes.anchors import HintConflict
from passes.hints import OPEN, HintError
from passes.ir.mesh import MeshError
from passes.ir.plan import PlanError

if TYPE_CHECKING:
    from autoshard.annotation import annotate
    from autoshard.api import Plan, parallelize, plan
    from autoshard.ask_compiler import CompilerRefused
    from autoshard.auditing import audit
    from autoshard.calibration import calibrate
    from autoshard.calibration_suite import CalibrationError
    from autoshard.mesh import DevicesError
    from autoshard.stacked_array import StackedArray
    from autoshard.targets import NoCompiler
    from passes.block_counts import NoBlocks
    from passes.microbatch_loop import NoTimeLoop
    from passes.search import NoFeasiblePlan

__all__ = [  # noqa: RUF022 (in plain order)
    "CalibrationError",
    "Cluster",
    "ClusterError",
    "CompilerRefused",
    "DevicesError",
    "HintConflict",
    "HintError",
    "MeshError",
    "NoBlocks",
    "NoCompiler",
    "NoFeasiblePlan",
    "NoTimeLoop",
    "OPEN",
    "Plan",
    "PlanError",
    "StackedArray",
    "UnknownCluster",
    "annotate",
    "audit",
    "calibrate",
    "cluster",
    "parallelize",
    "plan",
]

# Where the names live that bring in jax, or a solver.
_LATER = {
    "CalibrationError": "autoshard.calibration_suite",
    "CompilerRefused": "autoshard.ask_compiler",
    "DevicesError": "autoshard.mesh",
    "NoBlocks": "passes.block_counts",
    "NoCompiler": "autoshard.targets",
    "NoFeasiblePlan": "passes.search",
    "NoTimeLoop": "passes.microbatch_loop",
    "Plan": "autoshard.api",
    "StackedArray": "autoshard.stacked_array",
    "annotate": "autoshard.annotation",
    "audit": "autoshard.auditing",
    "calibrate": "autoshard.calibration",
    "parallelize": "autoshard.api",
    "plan": "autoshard.api",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module 'autoshard' has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(_LATER[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*(n for n in globals() if n.startswith("__")), *__all__})
