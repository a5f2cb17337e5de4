"""What may one operation split?  An einsum-like rule over index letters (factors).

The notation is that of Shardy's op sharding rules (openxla/shardy, docs/propagation.md) and of
einops: dims are separated by blanks, a dim made of several factors is put in parentheses (major
first), `.` is a dim that nothing splits.

>>> sizes = {"b": 2, "i": 4, "j": 4, "k": 8}
>>> print(Rule.parse("b i k, b k j -> b i j", sizes, reduce={"k": "add"}))
b i k, b k j -> b i j  {b=2 i=4 k=8 j=4}  add(k)
>>> print(Rule.parse("(h d) -> h d", {"h": 4, "d": 8}))
(h d) -> h d  {h=4 d=8}
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["parallel", "reduction", "halo", "whole"]
Dim = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Factor:
    """One index letter: its length, what a split of it means, and its reduction or halo."""

    name: str
    size: int
    kind: Kind = "parallel"
    op: str = ""  # of a reduction: add, max, min, mul, and, or, xor, argmax, argmin, custom
    halo: int = 0  # of a halo: elements wanted from the neighbours, both sides together


@dataclass(frozen=True, slots=True)
class Rule:
    """Factors of one operation, and which dims of which operand or result each one indexes.

    operands, results: per tensor, per dim, the factor indices from major to minor; () for a dim
        that can not be split. The sizes of a dim's factors multiply to its length.
    linear: groups of operand indices. A mesh axis may be partial (P, add) on the results when it is
        partial on all operands of one group and replicated on every other operand.
    flops: FLOP of the whole operation. moved: bytes it reads and writes, None for all its
        operands and results.
    fuses: XLA fuses it with its neighbours, so that it pays no memory traffic of its own.
    source: "hand", "shardy" or "whole".
    """

    factors: tuple[Factor, ...]
    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    linear: tuple[tuple[int, ...], ...] = ()
    flops: float = 0.0
    moved: float | None = None
    fuses: bool = False
    source: str = "hand"

    def is_batch(self, dim: Dim) -> bool:
        """Whether this dim of a result is one of every operand's too."""
        return all(any(set(d) & set(dim) for d in dims) for dims in self.operands)

    @staticmethod
    def parse(
        text: str,
        sizes: Mapping[str, int],
        *,
        reduce: Mapping[str, str] | None = None,
        whole: Collection[str] = (),
        halo: Mapping[str, int] | None = None,
        linear: tuple[tuple[int, ...], ...] = (),
        flops: float = 0.0,
        moved: float | None = None,
        fuses: bool = False,
        source: str = "hand",
    ) -> Rule:
        """Read `b i k, b k j -> b i j`; `sizes` gives each letter's length.

        Raises ValueError when the text can not be read or a letter has no size.
        """
        if text.count("->") != 1:
            raise ValueError(f"a rule needs one '->': {text!r}")
        reduce, halo = reduce or {}, halo or {}
        index: dict[str, int] = {}
        left, right = text.split("->")
        operands, results = _read_side(left, index), _read_side(right, index)
        factors = []
        for name in index:
            if name not in sizes:
                raise ValueError(f"factor {name!r} of {text!r} has no size")
            kind: Kind = "parallel"
            if name in reduce:
                kind = "reduction"
            elif name in whole:
                kind = "whole"
            elif name in halo:
                kind = "halo"
            factors.append(Factor(name, sizes[name], kind, reduce.get(name, ""), halo.get(name, 0)))
        return Rule(tuple(factors), operands, results, linear, flops, moved, fuses, source)

    @staticmethod
    def whole(operands: Sequence[tuple[int, ...]], results: Sequence[tuple[int, ...]]) -> Rule:
        """The rule that splits nothing, for operands and results of these shapes."""
        factors: list[Factor] = []

        def dims(shape: tuple[int, ...]) -> tuple[Dim, ...]:
            first = len(factors)
            factors.extend(Factor(f"w{first + i}", n, "whole") for i, n in enumerate(shape))
            return tuple((first + i,) for i in range(len(shape)))

        lefts = tuple(dims(s) for s in operands)
        rights = tuple(dims(s) for s in results)
        return Rule(tuple(factors), lefts, rights, source="whole")

    def with_source(self, source: str) -> Rule:
        """The same rule, said to come from elsewhere."""
        return replace(self, source=source)

    def splittable(self, factor: int) -> bool:
        """Whether any mesh axis may be put on this factor."""
        return self.factors[factor].kind != "whole" and self.factors[factor].size > 1

    def notation(self) -> str:
        """`b i k, b k j -> b i j` alone."""

        def dim(d: Dim) -> str:
            if not d:
                return "."
            names = " ".join(self.factors[f].name for f in d)
            return f"({names})" if len(d) > 1 else names

        def side(tensors: tuple[tuple[Dim, ...], ...]) -> str:
            return ", ".join(" ".join(dim(d) for d in t) or "[]" for t in tensors)

        return f"{side(self.operands)} -> {side(self.results)}".strip()

    def __str__(self) -> str:
        sizes = " ".join(f"{f.name}={f.size}" for f in self.factors)
        kinds: dict[str, list[str]] = {}
        for f in self.factors:
            if f.kind != "parallel":
                kinds.setdefault(f.op if f.kind == "reduction" else f.kind, []).append(f.name)
        marks = " ".join(f"{kind}({' '.join(names)})" for kind, names in kinds.items())
        return f"{self.notation()}  {{{sizes}}}" + (f"  {marks}" if marks else "")


def _read_side(text: str, index: dict[str, int]) -> tuple[tuple[Dim, ...], ...]:
    """The tensors on one side of the arrow; nothing at all means no tensors, `[]` a scalar."""
    if not text.strip():
        return ()
    tensors = []
    for part in text.split(","):
        dims = re.findall(r"\([^()]*\)|[^\s()]+", part.replace("[]", " "))
        tensors.append(
            tuple(
                ()
                if d == "."
                else tuple(index.setdefault(n, len(index)) for n in d.strip("()").split())
                for d in dims
            )
        )
    return tuple(tensors)
