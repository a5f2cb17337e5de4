"""Which function does `train.py:job` mean?  The command line's TARGET, loaded and called.

A target is `file.py:name` or `package.module:name`; `name` takes no arguments and gives back
`(fn, args)`: what `jax.jit` would take, and its arguments, or their shapes, as a tuple.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

Job = tuple[Callable[..., Any], tuple[Any, ...]]


class TargetError(ValueError):
    """A target that can not be used: no such file or name, or not what a target should be."""


class TargetFailed(Exception):
    """The user's own code raised while the target was imported or called: the cause."""


def load(target: str) -> Job:
    """The function and arguments of a target. Raises TargetError, TargetFailed with a cause."""
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise TargetError(
            f"cannot read {target!r} as a target; write file.py:name or package.module:name"
        )
    made = _function(_module(where), where, name)
    try:
        result = made()
    except Exception as error:
        raise TargetFailed(f"{target} raised {first_line(error)}") from error
    return _job(target, result)


def _module(where: str) -> ModuleType:
    if where.endswith(".py") or "/" in where:
        return _from_file(Path(where).expanduser())
    if "" not in sys.path and "." not in sys.path:
        sys.path.insert(0, "")  # modules of the current folder, as `python -m` finds them
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name and (where == error.name or where.startswith(error.name + ".")):
            raise TargetError(
                f"there is no module {error.name!r}; give a file as path/to/file.py:name"
            ) from None
        raise TargetFailed(f"{where} raised {first_line(error)}") from error
    except Exception as error:
        raise TargetFailed(f"{where} raised {first_line(error)}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise TargetError(f"there is no file {path}{hint}")
    name = path.stem if path.stem not in sys.modules else f"autoshard_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as if Python had been started on the file
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise TargetFailed(f"{path} raised {first_line(error)}") from error
    return module


def _function(module: ModuleType, where: str, name: str) -> Callable[[], Any]:
    if not hasattr(module, name):
        here = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(name, here, n=3) or sorted(here)[:3]
        said = f"; it has {', '.join(near)}" if near else ""
        raise TargetError(f"{where} has no {name!r}{said}")
    found = getattr(module, name)
    if not callable(found):
        raise TargetError(
            f"{where}:{name} is {type(found).__name__}, not a function; a target takes no "
            "arguments and gives back (fn, args)"
        )
    needed = _needed(found)
    if needed:
        raise TargetError(
            f"{where}:{name} needs {', '.join(needed)}; a target takes no arguments and gives back "
            "(fn, args)"
        )
    return found  # type: ignore[no-any-return]


def _needed(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    must = [p for p in parameters if p.default is inspect.Parameter.empty]
    return [p.name for p in must if p.kind not in open_ended]


def _job(target: str, result: Any) -> Job:
    wanted = f"{target} should give back (fn, args), args being a tuple"
    if not isinstance(result, tuple | list) or len(result) != 2:
        size = f" of {len(result)}" if isinstance(result, tuple | list) else ""
        raise TargetError(f"{wanted}; it gave a {type(result).__name__}{size}")
    fn, args = result
    if not callable(fn):
        raise TargetError(f"{wanted}; the first is {type(fn).__name__}, not a function")
    if not isinstance(args, tuple | list):
        raise TargetError(
            f"{wanted}; the second is {type(args).__name__}: write (fn, (x,)) for one argument"
        )
    return fn, tuple(args)


def first_line(error: BaseException) -> str:
    """`ValueError: what it says`, without further lines."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
