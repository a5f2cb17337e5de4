"""What users may rely on, frozen: `autoshard.__all__`, its signatures, the CLI's words.

A change here is a change for users: `--update-golden`, read the diff, and say it in CHANGELOG.md.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import autoshard

NAMES = {"Cluster", "OPEN", "Plan", "annotate", "audit", "calibrate", "cluster"}
NAMES |= {"StackedArray", "parallelize", "plan"}
COMMANDS = {"plan", "run", "compare", "explain", "verify", "audit", "calibrate", "clusters"}


def parameters(function: Callable[..., Any]) -> str:
    """`(x, *axes, priority=0)`: names, kinds and defaults, without types."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def members(cls: type) -> Iterator[str]:
    """Public fields, properties and methods that the class itself defines, sorted."""
    found = dict.fromkeys(getattr(cls, "__dataclass_fields__", {}), "")
    for name, value in vars(cls).items():
        value = getattr(value, "__func__", value)  # a static or class method
        found[name] = parameters(value) if isinstance(value, types.FunctionType) else ""
    return (f"{name}{found[name]}" for name in sorted(found) if not name.startswith("_"))


def describe(name: str) -> Iterator[str]:
    """A line for a public name, and one for each member of a class."""
    value = getattr(autoshard, name)
    if isinstance(value, type):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        yield f"class {name}" + (f"({bases})" if bases else "")
        yield from (f"    {member}" for member in members(value))
    elif callable(value):
        yield f"{name}{parameters(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def test_the_names_are_the_agreed_ones() -> None:
    public = set(autoshard.__all__)
    assert public >= NAMES
    errors = public - NAMES
    assert all(issubclass(getattr(autoshard, name), Exception) for name in errors), errors
    assert list(autoshard.__all__) == sorted(autoshard.__all__)


def test_the_api_is_as_recorded(golden: Callable[[str, str], None]) -> None:
    golden("public_api", "\n".join(line for name in autoshard.__all__ for line in describe(name)))


def test_every_public_name_is_described() -> None:
    values = [getattr(autoshard, name) for name in autoshard.__all__]
    assert all(inspect.getdoc(v) for v in values if callable(v))


def commands() -> dict[str, Any]:
    """The CLI's commands by name."""
    typer = pytest.importorskip("typer")
    from autoshard import cli

    app = next(v for v in vars(cli).values() if isinstance(v, typer.Typer))
    return dict(typer.main.get_command(app).commands)


def test_the_commands_are_as_recorded(golden: Callable[[str, str], None]) -> None:
    found = commands()
    assert set(found) >= COMMANDS
    lines = []
    for name in sorted(found):
        parameters = [p for p in found[name].params if p.name != "help"]
        arguments = [str(p.name).upper() for p in parameters if p.param_type_name == "argument"]
        options = sorted(
            " ".join([*p.opts, *p.secondary_opts])
            for p in parameters
            if p.param_type_name == "option"
        )
        lines += [" ".join(["autoshard", name, *arguments]), *(f"    {o}" for o in options)]
    golden("public_cli", "\n".join(lines))
