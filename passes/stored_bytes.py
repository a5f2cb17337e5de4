"""How many bytes does a value take as the compiler keeps it, and as it is sent to a reader?

XLA:TPU multiplies float32 operands of a product at default precision as bfloat16, in one pass of
its matrix unit (docs.jax.dev/en/latest/201/precision.html). It converts them as early as it can: a
value that only such products read is made, kept and sent as bfloat16, half its bytes, also through
reshapes and stacks on the way; and a float32 value is converted before it is gathered for them
(seen in compiled programs, jax 0.10.2 and libtpu 0.0.42.1). Sums are made in float32 all the same.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from passes.ir.graph import Graph, Op

_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})

# What hands on the elements of its operands as they are.
_PASSES = frozenset(
    {
        "broadcast_in_dim",
        "copy",
        "expand_dims",
        "rev",
        "region_enter",
        "region_exit",
        "reshape",
        "scan_slice",
        "scan_stack",
        "slice",
        "squeeze",
        "transpose",
    }
)


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """of_value: bytes of every whole value. narrow: reads, as (op, operand), at half of them.

    one_pass: float32 products that are multiplied as bfloat16.
    """

    of_value: tuple[int, ...]
    narrow: frozenset[tuple[int, int]]
    one_pass: frozenset[int] = frozenset()

    def sent(self, value: int, narrow: bool) -> float:
        """Bytes of a value as it is sent to such a reader."""
        return self.of_value[value] / 2 if narrow else self.of_value[value]


def stored_bytes(
    graph: Graph, platform: str, at_hand: Set[tuple[int, int]] = frozenset()
) -> StoredBytes:
    """What values take on this platform's compiler.

    at_hand: reads, as (op, operand), for which the value need not be kept at all.
    """
    plain = [v.type.nbytes for v in graph.values]
    if platform != "tpu":
        return StoredBytes(tuple(plain), frozenset())
    outputs = set(graph.outputs)
    wide = [
        v.type.dtype != "float32" or v.kind != "result" or v.id in outputs for v in graph.values
    ]
    readers: list[list[tuple[int, int]]] = [[] for _ in graph.values]
    for op in graph.ops:
        for k, v in enumerate(op.inputs):
            if (op.id, k) not in at_hand:
                readers[v].append((op.id, k))
    narrow: set[tuple[int, int]] = set()
    one_pass = {op.id for op in graph.ops if _is_one_pass(op)}
    for op in reversed(graph.ops):  # readers come before what they read
        for v in op.outputs:
            wide[v] = wide[v] or not readers[v] or not narrow.issuperset(readers[v])
        if op.id in one_pass or (op.name in _PASSES and not _all_wide(op, wide)):
            narrow |= {(op.id, k) for k, v in enumerate(op.inputs) if _float32(graph, v)}
    halved = tuple(n if w else n // 2 for n, w in zip(plain, wide, strict=True))
    # A value that is narrow already is not halved again on its way.
    again = frozenset(r for v, rs in enumerate(readers) if wide[v] for r in rs if r in narrow)
    return StoredBytes(halved, again, frozenset(one_pass))


def _all_wide(op: Op, wide: list[bool]) -> bool:
    """Whether none of its results is kept narrow."""
    return all(wide[v] for v in op.outputs)


def _float32(graph: Graph, v: int) -> bool:
    return graph.values[v].type.dtype == "float32"


def _is_one_pass(op: Op) -> bool:
    """Whether it is a product at default precision."""
    if op.name not in _PRODUCTS:
        return False
    precision = op.params.get("precision")
    asked = precision if isinstance(precision, tuple | list) else (precision,)
    return all(p is None or "DEFAULT" in str(p).upper() for p in asked)
