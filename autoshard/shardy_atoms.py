"""Which dims of which values are the same index?  Atoms: lengths that are merged and cut.

>>> a = Atoms()
>>> merged, heads, inner = a.new(12), a.new(3), a.new(4)
>>> a.same([merged], [heads, inner])
>>> a.expand([merged]) == a.expand([heads, inner])
True
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Atoms:
    """Atoms by number; an atom may have become another one, or have been cut into several."""

    __slots__ = ("_becomes", "_size", "_whole")

    def __init__(self) -> None:
        self._size: list[int] = []
        self._becomes: list[tuple[int, ...]] = []  # () while it stands for itself
        self._whole: list[bool] = []

    def new(self, size: int) -> int:
        """A new atom of this length."""
        self._size.append(size)
        self._becomes.append(())
        self._whole.append(False)
        return len(self._size) - 1

    def dim(self, size: int) -> list[int]:
        """A new atom for a dim; none when its length is one."""
        return [] if size == 1 else [self.new(size)]

    def size(self, atom: int) -> int:
        """Length of an atom."""
        return self._size[atom]

    def expand(self, atoms: Iterable[int]) -> list[int]:
        """The atoms that these stand for now, outermost first."""
        out: list[int] = []
        for atom in atoms:
            if self._becomes[atom]:
                out.extend(self.expand(self._becomes[atom]))
            else:
                out.append(atom)
        return out

    def is_whole(self, atom: int) -> bool:
        """Whether a current atom must not be split."""
        return self._whole[atom]

    def keep_whole(self, atoms: Iterable[int]) -> None:
        """Nothing may split these."""
        for atom in self.expand(atoms):
            self._whole[atom] = True

    def same(self, left: Sequence[int], right: Sequence[int]) -> None:
        """Both lists are the same index; what can not be cut into common pieces stays whole."""
        a, b = self.expand(left), self.expand(right)
        while a and b:
            n, m = self._size[a[0]], self._size[b[0]]
            if a[0] == b[0]:
                a, b = a[1:], b[1:]
            elif n == m:
                self._merge(a[0], b[0])
                a, b = self.expand(a[1:]), self.expand(b[1:])
            elif m and n % m == 0:
                a = [*self._cut(a[0], m), *a[1:]]
            elif n and m % n == 0:
                b = [*self._cut(b[0], n), *b[1:]]
            else:
                break
        self.keep_whole((*a, *b))

    def _merge(self, a: int, b: int) -> None:
        self._becomes[b] = (a,)
        self._whole[a] |= self._whole[b]

    def _cut(self, atom: int, outer: int) -> tuple[int, int]:
        """Cut a current atom into an outer piece of this length and the rest."""
        pieces = self.new(outer), self.new(self._size[atom] // outer)
        self._becomes[atom] = pieces
        if self._whole[atom]:
            self.keep_whole(pieces)
        return pieces
