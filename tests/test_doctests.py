"""Every example in a docstring does what it says."""

from __future__ import annotations

import doctest
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGES = ("autoshard", "passes", "cost_models")


def modules_with_examples() -> list[str]:
    out = []
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        home = Path(spec.origin).parent
        for file in sorted(home.rglob("*.py")):
            if ">>> " in file.read_text():
                parts = file.relative_to(home.parent).with_suffix("").parts
                out.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return out


@pytest.mark.parametrize("module", modules_with_examples())
def test_the_docstring_examples_hold(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
