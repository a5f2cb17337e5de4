"""What went wrong, in one sentence, and with which exit code?  `failure(error)`.

Whose fault it is decides: a command or a target that can not be used gets a sentence, an exception
in the user's own code keeps the user's part of the traceback, and everything else is our fault.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from autoshard.cli_target import TargetError, TargetFailed, first_line
from cost_models.cluster import ClusterError
from passes.anchors import HintConflict
from passes.hints import HintError
from passes.ir.mesh import MeshError
from passes.ir.plan import PlanError

NO_PLAN, USER, OURS = 1, 2, 3

# Sentences that are meant for the user. Those in modules that are slow to import go by name.
_MEANT = (TargetError, ClusterError, HintConflict, HintError, MeshError, PlanError, OSError)
_MEANT_BY_NAME = frozenset(
    {
        "CalibrationError",
        "CompilerRefused",
        "DevicesError",
        "HintUnmet",
        "NoBlocks",
        "NoCompiler",
        "NoFeasiblePlan",
        "NoSpmdPipeline",
        "NoStages",
        "NoTimeLoop",
        "NotMeasured",
        "NotSharded",
        "PictureError",
        "ProblemError",
        "ScheduleError",
    }
)
# Where plain ValueErrors and TypeErrors are sentences for the user too.
_CHECKS = frozenset(
    {
        "api.py",
        "cli_planning.py",
        "jit_options.py",
        "remat.py",
        "stages_wanted.py",
        "time_wanted.py",
        "units.py",
        "wishes.py",
    }
)

_PACKAGES = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Failure:
    """details: a traceback, or nothing."""

    code: int
    sentence: str
    details: str = ""


def failure(error: Exception, target: str = "") -> Failure:
    """What to tell the user about an exception."""
    if isinstance(error, TargetFailed) and error.__cause__ is not None:
        return Failure(USER, str(error), users_part(error.__cause__))
    if type(error).__name__ in ("NoFeasiblePlan", "NoSolution"):
        return Failure(NO_PLAN, str(error))
    if isinstance(error, _MEANT) or type(error).__name__ in _MEANT_BY_NAME or _checked(error):
        return Failure(USER, str(error))
    said = first_line(error)
    if _in_trace(error):
        return Failure(USER, f"tracing {target or 'it'} failed: {said}", users_part(error))
    return Failure(
        OURS,
        f"a fault of autoshard's own, please report it: {said}",
        "".join(traceback.format_exception(error)),
    )


def users_part(error: BaseException) -> str:
    """The traceback without the frames of autoshard, of Python's import system and of jax."""
    out = traceback.TracebackException.from_exception(error)
    link: traceback.TracebackException | None = out
    while link is not None:
        kept = [f for f in link.stack if not _hidden(f.filename)]
        link.stack = traceback.StackSummary.from_list(kept)
        link.__notes__ = None  # jax's, about the frames it leaves out
        link = link.__cause__ or link.__context__
    return "".join(out.format()) if out.stack or isinstance(error, SyntaxError) else ""


def _hidden(file: str) -> bool:
    if file.startswith("<frozen") or "/jax/_src/" in file:
        return True
    return any(
        Path(file).is_relative_to(_PACKAGES / p) for p in ("autoshard", "passes", "cost_models")
    )


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _file(frame: FrameType) -> Path:
    return Path(frame.f_code.co_filename)


def _checked(error: Exception) -> bool:
    """A ValueError or TypeError that one of our own checks raised."""
    frames = _frames(error)
    return (
        isinstance(error, ValueError | TypeError)
        and bool(frames)
        and _file(frames[-1]).name in _CHECKS
        and _hidden(str(_file(frames[-1])))
    )


def _in_trace(error: Exception) -> bool:
    """Whether it came out of jax, or of the user's function, while that was traced or run."""
    frames = _frames(error)
    ours = [k for k, f in enumerate(frames) if _file(f).is_relative_to(_PACKAGES / "autoshard")]
    if not ours:
        return False
    last = frames[ours[-1]]
    if ours[-1] == len(frames) - 1:  # jax leaves out its own frames
        return last.f_code.co_name in ("trace", "traced_as_it_is")
    return _file(last).name in ("trace.py", "same_numbers.py", "annotation.py", "retarget.py")
