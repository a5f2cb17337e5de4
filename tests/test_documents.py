"""The documents name files, links and commands that exist."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(
    r"(?<![\w/.])((?:autoshard|passes|cost_models|examples|tests)/[\w./]*\w\.(?:py|toml|txt))\b"
)


def exists(path: str) -> bool:
    """In the checkout, or where the package is installed."""
    package, _, rest = path.partition("/")
    if package in ("examples", "tests"):
        return (ROOT / path).exists()
    spec = find_spec(package)
    return (
        spec is not None and spec.origin is not None and (Path(spec.origin).parent / rest).exists()
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_the_named_files_exist(document: Path) -> None:
    named = set(PATH.findall(document.read_text()))
    assert [path for path in sorted(named) if not exists(path)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_the_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_readme_first_shows_the_two_commands() -> None:
    shown = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M)
    assert shown[:2] == ["demo", "test"]


def test_a_missing_file_would_be_noticed() -> None:
    assert PATH.findall("see `passes/no_such_pass.py` and x/passes/a.py") == [
        "passes/no_such_pass.py"
    ]
    assert not exists("passes/no_such_pass.py")
    assert exists("passes/ir/graph.py")
