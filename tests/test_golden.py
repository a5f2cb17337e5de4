"""The golden fixture and the markers themselves: a golden test that cannot fail proves nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TEST = """
import pytest

def test_print_out(golden):
    golden("small", {text!r})

@pytest.mark.libtpu
def test_compiler():
    pass
"""


def run(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run one golden test in a folder of its own, with our conftest."""
    (folder / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    libtpu: x\n    xdist_group: x\n")
    (folder / "test_small.py").write_text(TEST.format(text=text))
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one golden text in it, written by --update-golden."""
    home = tmp_path_factory.mktemp("small")
    first = run(home, "one\ntwo\n")
    assert first.returncode == 1, "a golden text that does not exist yet must fail"
    assert "--update-golden" in first.stdout
    assert run(home, "one\ntwo\n", "--update-golden").returncode == 0
    return home


def test_the_same_text_passes_but_for_blanks_at_line_ends(folder: Path) -> None:
    assert run(folder, "one  \ntwo").returncode == 0


def test_another_text_fails_with_a_diff_and_leaves_the_file(folder: Path) -> None:
    done = run(folder, "one\n2\n")
    assert done.returncode == 1
    assert "-two\n+2\n" in done.stdout
    assert (folder / "golden" / "small.txt").read_text() == "one\ntwo\n"


def test_without_the_tpu_compiler_its_tests_are_skipped_in_one_line(folder: Path) -> None:
    (folder / "hide.py").write_text("import sys; sys.modules['libtpu'] = None")
    done = run(folder, "one\ntwo\n", "-p", "hide")
    assert "1 passed, 1 skipped" in done.stdout
    assert "needs the TPU compiler: autoshard[verify-tpu]" in done.stdout
