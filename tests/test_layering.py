"""The architecture as a test: who may import whom, and what importing costs.

Every import counts, also one inside a function or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGES = ("cost_models", "passes", "autoshard")

# Room -> what its modules may import besides the standard library. The longest matching room
# counts. An entry allows the named module and everything below it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "cost_models": ("cost_models", "numpy"),
    # The data all passes share: no pass, no solver.
    "passes.ir": ("passes.ir", "cost_models", "numpy"),
    # A rule sees one operation's types and nothing else.
    "passes.rules": ("passes.ir", "passes.rules", "numpy"),
    # Problem -> Solution: the solver knows no graph, no mesh and no cluster.
    "passes.solve": ("passes.solve", "numpy", "networkx", "numba", "ortools"),
    # Tables of tasks and their times: they know no graph, no mesh and no cluster.
    "passes.pipeline": ("passes.pipeline", "numpy", "ortools"),
    "passes": ("passes", "cost_models", "numpy", "networkx"),
    "autoshard": ("autoshard", "passes", "cost_models", "numpy", "jax"),
    # The only two that may look into jax's compiler bindings.
    "autoshard.jax_compat": ("numpy", "jax", "jaxlib"),
    "autoshard.shardy": ("autoshard", "passes", "numpy", "jax", "jaxlib.mlir"),
    # The only ones that know a terminal.
    "autoshard.cli": ("autoshard", "passes", "cost_models", "numpy", "jax", "typer", "rich"),
    "autoshard.cli_options": ("typer",),
    "autoshard.cli_schedule": ("autoshard", "passes", "rich"),
    "autoshard.report": ("autoshard", "passes", "cost_models", "numpy", "rich"),
    "autoshard.progress": ("autoshard", "rich"),
    # It is an extra, and only who asks for a picture needs it.
    "autoshard.timeline_picture": ("autoshard", "passes", "matplotlib"),
}

# Private names of jax (a part that starts with one underscore) may be used here only.
MAY_USE_PRIVATE_JAX = ("autoshard.jax_compat",)

# Imports that close a cycle on purpose: (importer, imported) -> why. They must sit in a function.
DEFERRED: dict[tuple[str, str], str] = {
    ("passes.ir.graph", "passes.ir.text"): "str(graph) is the print-out, which is its own subject",
    ("autoshard.verification", "autoshard.report_compiled"): "str() of it, likewise",
    ("autoshard.auditing", "autoshard.report_compiled"): "str() of it, likewise",
}

VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "core", "base"}


def root() -> Path:
    """The folder that holds the three packages: the checkout, or site-packages."""
    spec = find_spec("cost_models")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


@cache
def modules() -> dict[str, Path]:
    """Dotted name to file, of every module of the three packages."""
    out = {}
    for package in PACKAGES:
        for file in sorted((root() / package).rglob("*.py")):
            parts = file.relative_to(root()).with_suffix("").parts
            out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return out


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


Imports = tuple[tuple[str, int], ...]


def named(code: ast.Module) -> Imports:
    """(dotted name, line) of everything imported; `from a import b` counts as a.b."""
    out = []
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            out += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            out += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return tuple(out)


@cache
def imports(module: str) -> Imports:
    return named(tree(module))


def room(module: str) -> str:
    return max((r for r in MAY_IMPORT if within(module, r)), key=len)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def known(name: str) -> str | None:
    """The module of ours that an imported dotted name means, if any."""
    return next((n for n in (name, name.rpartition(".")[0]) if n in modules()), None)


def private(dotted: str) -> bool:
    parts = dotted.split(".")
    return parts[0] in ("jax", "jaxlib") and any(
        p.startswith("_") and not p.startswith("__") for p in parts[1:]
    )


def jax_names(module: str) -> dict[str, str]:
    """Local name -> the dotted jax name it stands for."""
    out = {}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            out |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            out |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return {k: v for k, v in out.items() if v.split(".")[0] in ("jax", "jaxlib")}


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` of an attribute chain."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else None
    return None


def offences(module: str, imported: Imports) -> list[str]:
    """Imports that a module's room does not allow."""
    allowed = MAY_IMPORT[room(module)]
    return [
        f"{module}:{line} imports {name}; {room(module)} may import {', '.join(allowed)}"
        for name, line in imported
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(within(name, a) for a in allowed)
    ]


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_what_its_room_allows(module: str) -> None:
    found = offences(module, imports(module))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("passes.ir.mesh", "import jax.numpy"),
        ("passes.price", "from ortools.sat.python import cp_model"),
        ("passes.solve.problem", "import passes.ir.mesh"),
        ("passes.rules.shape", "from passes import reshard"),
        ("cost_models.roofline", "def f():\n    from passes.ir import graph"),
        ("autoshard.trace", "import rich"),
        ("autoshard.trace", "from jaxlib.mlir import ir"),
    ],
)
def test_a_wrong_import_would_be_caught(module: str, code: str) -> None:
    assert offences(module, named(ast.parse(code)))


@pytest.mark.parametrize("module", [m for m in modules() if m not in MAY_USE_PRIVATE_JAX])
def test_private_names_of_jax_stay_in_the_compat_module(module: str) -> None:
    names = jax_names(module)
    found = [f"{module}:{line} imports {n}" for n, line in imports(module) if private(n)]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and (chain := dotted(node)):
            first, _, rest = chain.partition(".")
            if first in names and private(f"{names[first]}.{rest}"):
                found.append(f"{module}:{node.lineno} uses {chain}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_can_be_imported(package: str) -> None:
    """With what it needs, from wherever the package is installed."""
    for module in modules():
        if module.split(".")[0] == package and not module.endswith("__main__"):
            importlib.import_module(module)


def test_no_import_cycle() -> None:
    edges: dict[str, set[str]] = {}
    for module in modules():
        edges[module] = {
            target
            for name, _ in imports(module)
            if (target := known(name)) and target != module and (module, target) not in DEFERRED
        }
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]), pytrace=False)


@pytest.mark.parametrize(("importer", "imported"), DEFERRED)
def test_a_deferred_import_sits_in_a_function(importer: str, imported: str) -> None:
    top = [n for n in tree(importer).body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert imported not in {n.module for n in top if isinstance(n, ast.ImportFrom)}
    assert imported in {known(name) for name, _ in imports(importer)}, "no longer needed: drop it"


def test_what_counts_as_private() -> None:
    assert private("jax._src.core")
    assert private("jax.extend.core._private")
    assert not private("jax.extend.core.Var")
    assert not private("numpy._core")


def test_every_module_has_a_telling_name() -> None:
    assert not [m for m in modules() if m.rpartition(".")[2] in VAGUE]


def test_test_files_have_distinct_names_and_no_init() -> None:
    here = Path(__file__).parent
    assert not list(here.rglob("__init__.py")), "tests/passes/__init__.py would shadow passes"
    names = Counter(f.name for f in here.rglob("*.py"))
    assert [n for n, count in names.items() if count > 1] == []


# What importing may not bring in, for every module of a tier.
HEAVY = {
    "cost_models": {"jax", "networkx", "numba", "ortools", "rich", "typer", "passes", "autoshard"},
    "passes": {"jax", "jaxlib", "numba", "ortools", "rich", "typer", "autoshard"},
    "autoshard": {"numba", "ortools", "flax", "matplotlib", "optax", "sklearn"},
}


def in_fresh_python(code: str, **env: str) -> str:
    """What a new process prints; fails the test when it fails."""
    path = os.pathsep.join([str(root()), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_brings_in_nothing_heavy(package: str) -> None:
    # The one module that needs ortools is imported when a solver is first called.
    names = [m for m in modules() if within(m, package) and not m.endswith("__main__")]
    names = [m for m in names if not within(m, "passes.solve") and m != "autoshard.cli"]
    # No such platform: looking for devices would fail, so importing looks for none.
    loaded = in_fresh_python(
        f"import sys, {', '.join(names)}; print(*sys.modules)", JAX_PLATFORMS="none_such"
    )
    assert HEAVY[package].isdisjoint(loaded.split())


@pytest.mark.parametrize(
    ("package", "first", "seconds"),
    [("cost_models", "numpy", 0.5), ("passes", "numpy, networkx", 0.5), ("autoshard", "jax", 1.0)],
)
def test_importing_is_quick(package: str, first: str, seconds: float) -> None:
    # CPU seconds beyond those of the libraries, so that a busy machine does not matter.
    code = (
        f"import time, {first}; t = time.process_time(); import {package};"
        "print(time.process_time() - t)"
    )
    assert float(in_fresh_python(code)) < seconds
