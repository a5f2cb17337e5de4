"""How does a rule function put a rule together?  It asks for factors and hangs them on dims.

A dim of length one is never split, so it gets no factor at all. Factors are named i, j, k, ... in
the order in which they are asked for, unless a name is given.

>>> f = Factors()
>>> rows, columns = f.parallel(4), f.reduction(8, "add")
>>> print(f.rule([(rows, columns)], [(rows,)]))
i j -> i  {i=4 j=8}  add(j)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from passes.ir.graph import Signature, Type
from passes.ir.rule import Dim, Factor, Kind, Rule

_LETTERS = "ijklmnopqrstuvwxyzabcdefgh"


def letter(index: int) -> str:
    """The name of the factor with this index: i, j, ..., z, a, ..., h, i1, j1, ..."""
    turn, place = divmod(index, len(_LETTERS))
    return _LETTERS[place] + (str(turn) if turn else "")


class Factors:
    """The factors of one rule while it is being written."""

    __slots__ = ("_factors",)

    def __init__(self) -> None:
        self._factors: list[Factor] = []

    def add(self, size: int, kind: Kind, name: str = "", op: str = "", halo: int = 0) -> Dim:
        """A new factor, as a dim that consists of it alone; () when its size is one."""
        if size == 1:
            return ()
        index = len(self._factors)
        self._factors.append(Factor(name or self._free_letter(), size, kind, op, halo))
        return (index,)

    def _free_letter(self) -> str:
        taken = {f.name for f in self._factors}
        index = len(self._factors)
        while letter(index) in taken:
            index += 1
        return letter(index)

    def parallel(self, size: int, name: str = "") -> Dim:
        """A dim of independent pieces."""
        return self.add(size, "parallel", name)

    def reduction(self, size: int, op: str, name: str = "") -> Dim:
        """A dim that operands have and results lack: splitting it leaves partial results."""
        return self.add(size, "reduction", name, op)

    def whole(self, size: int, name: str = "") -> Dim:
        """A dim that must not be split."""
        return self.add(size, "whole", name)

    def parallel_dims(self, shape: Iterable[int]) -> tuple[Dim, ...]:
        """One parallel factor per dim."""
        return tuple(self.parallel(n) for n in shape)

    def whole_dims(self, shape: Iterable[int]) -> tuple[Dim, ...]:
        """One factor per dim, none of which may be split."""
        return tuple(self.whole(n) for n in shape)

    def rule(
        self,
        operands: Sequence[Sequence[Dim]],
        results: Sequence[Sequence[Dim]],
        *,
        linear: tuple[tuple[int, ...], ...] = (),
        flops: float = 0.0,
        moved: float | None = None,
        fuses: bool = False,
    ) -> Rule:
        """The finished rule."""
        return Rule(
            tuple(self._factors),
            tuple(tuple(dims) for dims in operands),
            tuple(tuple(dims) for dims in results),
            linear,
            flops,
            moved,
            fuses,
        )


def identity(s: Signature, *, linear: tuple[tuple[int, ...], ...] = ()) -> Rule:
    """Result n is operand n, dim by dim; operands beyond the results are only read."""
    f = Factors()
    dims = tuple(f.parallel_dims(t.shape) for t in s.operands)
    return f.rule(dims, dims[: len(s.results)], linear=linear, fuses=True)


def is_float(t: Type) -> bool:
    """Whether elements are real or complex floating point numbers."""
    return t.dtype.startswith(("float", "bfloat", "complex"))


def is_complex(t: Type) -> bool:
    """Whether elements are complex numbers."""
    return t.dtype.startswith("complex")
