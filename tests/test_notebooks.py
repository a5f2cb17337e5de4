"""The notebooks run, show what they assert, and are stored as one run of their .py files."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jupytext
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))
# They need no jax.
QUICK = ("01_rooflines", "02_collectives", "06_from_gpipe_to_zero_bubble")
PLACES = re.compile(r"/(?:home|root|tmp|usr|opt|work|Users|mnt|var)/")  # of some machine
COLOURS = re.compile(r"\x1b\[[0-9;]*m")

each = pytest.mark.parametrize("source", SOURCES, ids=lambda file: file.stem)


def stored(source: Path) -> nbformat.NotebookNode:
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def run(source: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: a kernel's sockets and its event loop are none of pytest's."""
    spec = find_spec("autoshard")
    assert spec is not None
    assert spec.origin is not None
    home = Path(spec.origin).parent.parent
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")]),
    }
    env.pop("XLA_FLAGS", None)
    return subprocess.run(
        [sys.executable, str(NOTEBOOKS / "run_notebooks.py"), "--check", str(source)],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_the_notebooks_are_there() -> None:
    assert [s.name[:2] for s in SOURCES] == ["01", "02", "03", "04", "05", "06"]
    assert {s.stem for s in SOURCES} == {f.stem for f in NOTEBOOKS.glob("*.ipynb")}
    readme = (NOTEBOOKS.parent.parent / "README.md").read_text()
    assert [s.stem for s in SOURCES if f"{s.stem}.ipynb" not in readme] == []


@each
def test_the_notebook_is_its_py_file(source: Path) -> None:
    read = jupytext.read(source, fmt="py:percent")
    here = [(cell.cell_type, cell.source) for cell in read.cells]
    assert [(cell.cell_type, cell.source) for cell in stored(source).cells] == here, (
        "renew it: make notebooks"
    )


@each
def test_what_is_stored_was_run_and_tells_of_no_machine(source: Path) -> None:
    whole = stored(source)
    code = [cell for cell in whole.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 2
    assert not any(output.get("metadata") for output in outputs)
    assert not any(cell.metadata for cell in whole.cells)
    assert set(whole.metadata) == {"kernelspec", "language_info"}
    shown = [output.text for output in outputs if output.output_type == "stream"]
    assert not [text for text in shown if PLACES.search(text)]
    assert source.with_suffix(".ipynb").stat().st_size < 300_000


@each
def test_the_notebook_asserts_what_it_shows(source: Path) -> None:
    asserts = [n for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.Assert)]
    assert len(asserts) >= 3


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(s, marks=[] if s.stem in QUICK else [pytest.mark.slow], id=s.stem)
        for s in SOURCES
    ],
)
def test_the_notebook_runs(source: Path) -> None:
    done = run(source)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize(
    ("cell", "complaint"),
    [
        ("assert 1 + 1 == 3, 'sums'", "AssertionError: sums"),
        ("import warnings; warnings.warn('old name', stacklevel=1)", "UserWarning: old name"),
    ],
)
def test_a_wrong_notebook_would_be_noticed(cell: str, complaint: str, tmp_path: Path) -> None:
    source = tmp_path / "00_wrong.py"
    source.write_text(f"# %%\n{cell}\n")
    done = run(source)
    assert done.returncode != 0
    assert complaint in COLOURS.sub("", done.stderr)
    assert not source.with_suffix(".ipynb").exists()
