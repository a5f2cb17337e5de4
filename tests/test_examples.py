"""Every example runs, on eight virtual devices it sets up itself, in a small version."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBERED = sorted(f.name for f in EXAMPLES.glob("[0-9][0-9]_*.py"))


def test_the_examples_are_there() -> None:
    assert len(NUMBERED) >= 6
    assert len({name[:2] for name in NUMBERED}) == len(NUMBERED), "two examples share a number"


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERED)
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    spec = find_spec("autoshard")
    assert spec is not None
    assert spec.origin is not None
    home = Path(spec.origin).parent.parent
    env = {
        **os.environ,
        "AUTOSHARD_EXAMPLE_QUICK": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as `in_a_hurry`: its programs run a few times
        "PYTHONPATH": os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")]),
    }
    env.pop(
        "XLA_FLAGS", None
    )  # as in a user's shell: the virtual devices are the example's business
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,  # it may not rely on where it is started, nor leave files in the checkout
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.stdout.strip(), "an example shows something"
    assert not list(tmp_path.iterdir()), "an example leaves no files behind"
