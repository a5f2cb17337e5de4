"""How are a plan's shardings written for pasting?  As Python: a mesh, and nested PartitionSpecs.

Dicts, tuples and lists keep their form; any other container (a NamedTuple, a dataclass, a module's
state) becomes a dict by the names of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import PartitionSpec


def specs_text(mesh: dict[str, int], in_shardings: Any, out_shardings: Any) -> str:
    """Python text that defines `mesh`, `in_shardings` and `out_shardings`."""
    names, sizes = tuple(mesh), tuple(mesh.values())
    types = f"(AxisType.Auto,) * {len(names)}"
    return "\n".join(
        [
            "import jax",
            "from jax.sharding import AxisType, PartitionSpec as P",
            "",
            f"mesh = jax.make_mesh({sizes!r}, {names!r}, axis_types={types})",
            f"in_shardings = {expression(in_shardings)}",
            f"out_shardings = {expression(out_shardings)}",
        ]
    )


def expression(tree: Any, indent: str = "") -> str:
    """A Python expression for a pytree of PartitionSpecs, `P` being PartitionSpec.

    >>> print(expression({"w": PartitionSpec(None, "model"), "b": [PartitionSpec()]}))
    {
        'w': P(None, 'model'),
        'b': [
            P(),
        ],
    }
    """
    if tree is None:
        return "None"
    if isinstance(tree, PartitionSpec):
        return f"P({', '.join(map(repr, tree))})"
    inner = indent + "    "
    if type(tree) in (tuple, list):
        opening, closing = "()" if type(tree) is tuple else "[]"
        parts = [expression(x, inner) for x in tree]
    else:
        opening, closing = "{}"
        parts = [f"{key!r}: {expression(x, inner)}" for key, x in _children(tree)]
    if not parts:
        return opening + closing
    return f"{opening}\n" + "".join(f"{inner}{p},\n" for p in parts) + f"{indent}{closing}"


def _children(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Name and part, one level down."""
    if isinstance(tree, dict):
        yield from tree.items()
        return
    below, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    for path, part in below:
        key = path[0]
        yield getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))), part
