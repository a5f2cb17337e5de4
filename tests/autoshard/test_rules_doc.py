"""The committed table of rules is the one that the rules give now."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoshard.jax_compat import jax_version, lowerable_primitives

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "rules.md"
WRITTEN_WITH = (0, 10, 2)


@pytest.fixture(scope="module")
def page() -> str:
    """What the generator writes in a fresh process, where nothing else has loaded parts of jax."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "autoshard.rules_doc"],
        cwd=ROOT, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not PAGE.exists(), reason="runs from an installed wheel, which has no docs")
@pytest.mark.skipif(
    jax_version() != WRITTEN_WITH,
    reason=f"docs/rules.md is written with jax {'.'.join(map(str, WRITTEN_WITH))}; "
    "another jax has other primitives",
)
def test_the_page_is_current(page: str) -> None:
    assert PAGE.read_text() == page, "run: python -m autoshard.rules_doc > docs/rules.md"


def test_every_primitive_has_a_row(page: str) -> None:
    rows = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    usual = {"add", "dot_general", "gather", "scan", "jit", "psum", "sort", "scan_slice"}
    assert usual <= rows
    assert usual - {"scan_slice"} <= set(lowerable_primitives())
    assert "| hand |" in page
    assert "unless Shardy has a rule" not in page, "say in rules_doc why a primitive has no rule"
