"""How is one value laid out on a mesh?  Per mesh axis: split along a dim, replicated, or partial.

This is OneFlow's SBP signature (arXiv 2110.15032, section 3.1), one entry for each mesh axis:
`S(d)` is written as the dim index d, `B` as BROADCAST and `P` as PARTIAL. Several axes may split
one dim; the earlier mesh axis is then the outer one (GSPMD, arXiv 2105.04663, section 3.1).

>>> s = Sharding((0, PARTIAL), "add")
>>> from passes.ir.mesh import Mesh
>>> s.text((64, 128), "f32", Mesh.parse("data=4,model=2"))
'f32[64{data},128] +P(model)'
>>> s.local_shape((64, 128), (4, 2))
(16, 128)
"""

from __future__ import annotations

from dataclasses import dataclass

from passes.ir.mesh import Mesh

BROADCAST = -1
PARTIAL = -2

# How a partial value's reduction is written before P: "+P(model)", "max P(model)".
_SIGN = {"": "+", "add": "+"}


@dataclass(frozen=True, slots=True)
class Sharding:
    """One entry per mesh axis: a dim index, BROADCAST or PARTIAL; `op` reduces the partial axes."""

    axes: tuple[int, ...]
    op: str = ""

    @staticmethod
    def replicated(axes: int) -> Sharding:
        """The sharding that splits nothing, on a mesh of so many axes."""
        return Sharding((BROADCAST,) * axes)

    @staticmethod
    def of_dims(dims: tuple[tuple[int, ...], ...], axes: int) -> Sharding:
        """From the mesh axes (indices) that split each dim."""
        out = [BROADCAST] * axes
        for dim, split in enumerate(dims):
            for axis in split:
                assert out[axis] == BROADCAST, f"axis {axis} splits two dims in {dims}"
                out[axis] = dim
        return Sharding(tuple(out))

    def dims(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """For each of `rank` dims the mesh axes (indices) that split it, the outer first."""
        return tuple(
            tuple(a for a, entry in enumerate(self.axes) if entry == d) for d in range(rank)
        )

    @property
    def partial(self) -> tuple[int, ...]:
        """Mesh axes (indices) over which the value is still to be reduced."""
        return tuple(a for a, entry in enumerate(self.axes) if entry == PARTIAL)

    def shards(self, sizes: tuple[int, ...]) -> int:
        """Into how many different pieces the value falls."""
        out = 1
        for entry, size in zip(self.axes, sizes, strict=True):
            if entry >= 0:
                out *= size
        return out

    def local_shape(self, shape: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape one device holds; rounds up where a dim is not divisible."""
        out = list(shape)
        for entry, size in zip(self.axes, sizes, strict=True):
            if entry >= 0:
                out[entry] = -(-out[entry] // size)
        return tuple(out)

    def divides(self, shape: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
        """Whether every split dim is divisible by the axes that split it."""
        split = [1] * len(shape)
        for entry, size in zip(self.axes, sizes, strict=True):
            if entry >= 0:
                if entry >= len(shape):
                    return False
                split[entry] *= size
        return all(s % n == 0 and (n == 1 or s > 0) for s, n in zip(shape, split, strict=True))

    def spec(self, rank: int, mesh: Mesh) -> tuple[tuple[str, ...], ...]:
        """Per dim the names of the axes that split it (plain data for a PartitionSpec)."""
        return tuple(tuple(mesh.names[a] for a in split) for split in self.dims(rank))

    def text(self, shape: tuple[int, ...], dtype: str, mesh: Mesh) -> str:
        """The GSPMD-style print-out `f32[64{data},128] +P(model)`."""
        dims = ",".join(
            f"{n}{{{','.join(names)}}}" if names else str(n)
            for n, names in zip(shape, self.spec(len(shape), mesh), strict=True)
        )
        partial = ",".join(mesh.names[a] for a in self.partial)
        sign = _SIGN.get(self.op, self.op + " ")
        return f"{dtype}[{dims}]" + (f" {sign}P({partial})" if partial else "")
