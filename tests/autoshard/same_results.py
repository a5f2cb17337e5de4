"""How far apart are the results of two functions, and what do the examples run?"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def worst(got: Any, want: Any, floor: float = 1e-3) -> float:
    """The largest difference of any two numbers, against the largest number of that array."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    out = 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        a, b = (np.asarray(z, np.float64) for z in (x, y))
        largest = float(np.abs(b).max(initial=0))
        out = max(out, float(np.abs(a - b).max(initial=0)) / (floor + largest))
    return out


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The job of an example, small."""
    monkeypatch.setenv("AUTOSHARD_EXAMPLE_QUICK", "1")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "example", module)
    spec.loader.exec_module(module)
    return module.job()
