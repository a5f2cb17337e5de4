"""Eight virtual CPU devices for every test, golden print-outs, and the tests that need a compiler.

pytest --update-golden      rewrite tests/golden/*.txt from what the tests print now; read the
                            diff before committing it
pytest --hypothesis-profile=default
                            other random cases each time, instead of the same ones
"""

from __future__ import annotations

import difflib
import gc
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# jax reads these once, when it first looks for devices. Nothing may have imported it yet.
assert "jax" not in sys.modules, "jax was imported before tests/conftest.py; no virtual devices"
DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
# XLA:CPU compiles a program with its older emitters, in one piece, in half the time or less. Newer
# jax has the other emitters only: its tests are the ones that run what users run.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} {QUICK}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu: do not ask the network which TPU this is
# libtpu lets one process in at a time, for the sake of a TPU; our tests only compile with it.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"

# Traced programs are many small objects that stay: Python's collector, and with it jax's, would
# look at them some thousand times in vain. (`autoshard.plan` does without it, for that reason.)
gc.set_threshold(50_000, 10, 10)

settings.register_profile("same cases every time", derandomize=True)
settings.load_profile("same cases every time")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite tests/golden/*.txt instead of comparing",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("libtpu") is None:
        for item in items:
            if item.get_closest_marker("libtpu"):
                item.add_marker(
                    pytest.mark.skip(reason="needs the TPU compiler: autoshard[verify-tpu]")
                )


@pytest.fixture(scope="module")
def in_a_hurry() -> Iterator[None]:
    """For programs that run once, if at all: XLA need not make them fast.

    What its partitioner and its other passes over a whole program do stays as it is.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares the text with tests/golden/<name>.txt."""
    update = request.config.getoption("--update-golden")

    def compare(name: str, text: str) -> None:
        __tracebackhide__ = True
        file = GOLDEN / f"{name}.txt"
        text = "".join(line.rstrip() + "\n" for line in text.rstrip().splitlines())
        before = file.read_text() if file.exists() else None
        if before == text:
            return
        if update:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            return
        if before is None:
            pytest.fail(
                f"no {file.name} in tests/golden; write it with --update-golden", pytrace=False
            )
        diff = difflib.unified_diff(
            before.splitlines(),
            text.splitlines(),
            f"golden/{file.name}",
            "printed now",
            lineterm="",
        )
        how = "If the new text is right: pytest --update-golden, then read the diff."
        pytest.fail("\n".join([*diff, "", how]), pytrace=False)

    return compare
