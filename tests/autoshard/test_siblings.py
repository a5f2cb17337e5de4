"""A foreign `passes` or `cost_models` is refused at import, with both places in the message."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from autoshard._siblings import check_siblings, found_at


def home() -> Path:
    spec = find_spec("autoshard")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


def import_autoshard(*path: Path) -> subprocess.CompletedProcess[str]:
    """`import autoshard._siblings` in a new process that looks in these folders first."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-P", "-c", "import autoshard._siblings"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_our_own_are_fine() -> None:
    check_siblings()
    assert found_at("passes") == home().resolve() / "passes"
    assert import_autoshard(home()).returncode == 0


@pytest.mark.parametrize("foreign", ["passes/__init__.py", "cost_models/__init__.py", "passes.py"])
def test_a_foreign_one_is_refused(tmp_path: Path, foreign: str) -> None:
    other = tmp_path / foreign
    other.parent.mkdir(exist_ok=True)
    other.write_text("raise RuntimeError('must not be imported to be refused')")
    done = import_autoshard(tmp_path, home())
    assert done.returncode != 0
    name = Path(foreign).parts[0].removesuffix(".py")
    assert "ImportError" in done.stderr
    assert str(home().resolve() / name) in done.stderr
    assert str(tmp_path.resolve() / Path(foreign).parts[0]) in done.stderr
    assert "must not be imported" not in done.stderr


def test_a_bare_folder_of_that_name_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()  # a later regular package wins over it
    assert import_autoshard(tmp_path, home()).returncode == 0


def test_a_missing_one_is_reported(tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()
    with pytest.raises(ImportError, match=r"'passes' at .*, but Python finds one at"):
        check_siblings(tmp_path)
    assert found_at("no_such_package") is None
