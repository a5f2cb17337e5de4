"""What does the real compiler say of a program?  Its profile, or that it does not fit, or no."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from autoshard.compiled import Profile, profile
from cost_models.cluster import Cluster
from cost_models.units import parse_bytes

# Without a device XLA:GPU can not try which tiles a product takes. It asks a table, and gives up on
# some shapes that the table does not have, such as 6304 x 768 (ViT-B of 197 places on 8 devices;
# jax 0.10.2). cuBLAS, which takes any, is asked then.
_NO_TILES = "Couldn't find output tile sizes"
_CUBLAS = {"xla_gpu_enable_triton_gemm": "False"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a compiler made of a program.

    compiled: None where it does not fit; needed: the bytes it wanted then. added: options that it
    had to be given beside those asked for.
    """

    compiled: Profile | None
    needed: float
    added: Mapping[str, str]


class CompilerRefused(RuntimeError):
    """The target's compiler does not take the program, for another reason than its memory."""


def ask_compiler(
    lowered: jax.stages.Lowered,
    cluster: Cluster,
    sizes: Sequence[int],
    options: Mapping[str, Any],
    name: str,
) -> Answer:
    """What the compiled program does, or that it does not fit. Raises CompilerRefused."""
    try:
        return _asked(lowered, cluster, sizes, options, {})
    except jax.errors.JaxRuntimeError as e:
        if _NO_TILES not in str(e) or options.keys() & _CUBLAS.keys():
            raise _refused(cluster, name, e) from e
    try:
        return _asked(lowered, cluster, sizes, options, _CUBLAS)
    except jax.errors.JaxRuntimeError as e:
        raise _refused(cluster, name, e) from e


def _asked(
    lowered: jax.stages.Lowered,
    cluster: Cluster,
    sizes: Sequence[int],
    options: Mapping[str, Any],
    added: Mapping[str, str],
) -> Answer:
    """Raises jax.errors.JaxRuntimeError where it is not for memory that the compiler refuses."""
    try:
        compiled = lowered.compile(compiler_options={**options, **added})
        return Answer(profile(compiled, cluster, sizes), 0.0, added)
    except jax.errors.JaxRuntimeError as e:
        wanted = out_of_memory(str(e))
        if wanted is None:
            raise
        return Answer(None, wanted, added)


def _refused(cluster: Cluster, name: str, error: Exception) -> CompilerRefused:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return CompilerRefused(f"the compiler for {cluster} does not take {name}: {first[:400]}")


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
