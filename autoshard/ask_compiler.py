"""What does the real compiler say of a program?  Its profile, or that it does not fit, or no."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from autoshard.compiled import Profile, profile
from cost_models.cluster import Cluster
from cost_models.units import parse_bytes


class CompilerRefused(RuntimeError):
    """The target's compiler does not take the program, for another reason than its memory."""


def ask_compiler(
    lowered: jax.stages.Lowered,
    cluster: Cluster,
    sizes: Sequence[int],
    options: Mapping[str, Any],
    name: str,
) -> tuple[Profile | None, float]:
    """What the compiled program does; where it does not fit, None and the bytes it wanted.

    Raises CompilerRefused.
    """
    try:
        return profile(lowered.compile(compiler_options=dict(options)), cluster, sizes), 0.0
    except jax.errors.JaxRuntimeError as e:
        found = out_of_memory(str(e))
        if found is None:
            first = next((line for line in str(e).splitlines() if line.strip()), "")
            raise CompilerRefused(
                f"the compiler for {cluster} does not take {name}: {first[:400]}"
            ) from e
        return None, found


def out_of_memory(message: str) -> float | None:
    """Bytes that a program wanted by its compiler's message; None where it says something else.

    >>> out_of_memory("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
    ...               "memory space hbm. Used 39.00G of 15.75G hbm.")
    41875931136.0
    >>> out_of_memory("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
    ...               "for HLO temporaries (36.75G) exceeds available HBM (15.75G).") / 2**30
    36.75
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    used = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    used = used or re.search(r"memory required for .*?\(([\d.]+)([KMGT]?)\) exceeds", message)
    used = used or re.search(r"[Aa]llocat\w* (?:of )?([\d.]+)([KMGT]?)i?B?", message)
    if used is None:
        return 0.0
    return float(parse_bytes(f"{used[1]}{used[2]}iB" if used[2] else f"{used[1]}B"))
