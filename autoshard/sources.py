"""Which line of the user's own code does an equation come from?

The innermost frame that is neither in an installed package, nor in Python's library, nor in
autoshard: `train.py:14 (loss)`. Where every frame belongs to a library, jax's own choice stands.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from functools import cache
from typing import Any

from autoshard.jax_compat import frames, summarize

_STDLIB = sysconfig.get_paths()["stdlib"]
_HERE = os.path.dirname(os.path.abspath(__file__))


@cache
def is_users(file: str) -> bool:
    """Whether a source file is the user's, not a library's or autoshard's own."""
    if "site-packages" in file or "dist-packages" in file or file.startswith("<"):
        return False
    if file.startswith(_STDLIB + os.sep):
        return False
    return os.path.dirname(os.path.abspath(file)) != _HERE


def source_of(source_info: Any, caller: str = "") -> str:
    """`file.py:line (function)` of an equation, or "" when jax kept no traceback.

    caller: what is said where no frame is the user's, if it is not empty.
    """
    found = frames(source_info)
    users = line_of(found)
    if users:
        return users
    if not found or caller:
        return caller
    text = summarize(source_info)
    place, _, function = text.partition(" ")
    if os.path.dirname(os.path.abspath(place)) == _HERE:
        return ""  # autoshard added it, for no line of the user's
    parts = os.path.basename(place).split(":")
    return ":".join(parts[:2]) + (f" {function}" if function else "")


def is_at_a_line(source_info: Any) -> bool:
    """Whether an equation comes from a line of the user's, not from a library function alone.

    jax traces library functions once for all their callers.
    """
    return bool(line_of(frames(source_info)))


def line_of(found: Sequence[tuple[str, int, str]]) -> str:
    """The innermost of these (file, line, function) that is the user's; empty where none is."""
    for file, line, function in found:
        if is_users(file):
            return f"{os.path.basename(file)}:{line} ({function.rsplit('.', 1)[-1]})"
    return ""
