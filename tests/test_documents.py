"""The documents name files and links that exist, and every file of ours.

pytest tests/test_documents.py --update-golden      renews the list in docs/architecture.md
"""

from __future__ import annotations

import ast
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


def first_line(file: Path) -> str:
    """The start of a module's docstring: the question it answers."""
    doc = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0]
    start = " ".join(doc.split())
    question = re.match(r".*?[?:.](?=\s|$)", start)
    return question[0].rstrip(":") if question else start


def file_list() -> str:
    """A table for each folder of the three packages."""
    out = []
    for package in ("cost_models", "passes", "autoshard"):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        home = Path(spec.origin).parent
        for folder in sorted({file.parent for file in home.rglob("*.py")}):
            out += ["", f"### {folder.relative_to(home.parent)}/", "", "| file | |", "|---|---|"]
            files = [file for file in sorted(folder.glob("*.py")) if file.name != "__init__.py"]
            out += [f"| `{file.name}` | {first_line(file)} |" for file in files]
    return "\n".join([*out, ""])


def test_the_list_of_files_is_complete(request: pytest.FixtureRequest) -> None:
    document = ROOT / "docs" / "architecture.md"
    before, begin, rest = document.read_text().partition("<!-- files -->\n")
    found, end, after = rest.partition("\n<!-- end of files -->")
    assert begin
    assert end
    if request.config.getoption("--update-golden"):
        document.write_text(f"{before}{begin}{file_list()}{end}{after}")
    else:
        assert found == file_list(), "renew it: pytest tests/test_documents.py --update-golden"
