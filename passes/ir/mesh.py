"""Which named axes do the devices form?  `Mesh.parse("data=4,model=2")`.

A mesh here is only names and sizes; where an axis lies on the wires is the business of
`cost_models.topology`, and real devices enter in `autoshard.mesh`.

>>> str(Mesh.parse("data=4,model=2"))
'data=4 model=2'
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass


class MeshError(ValueError):
    """A mesh that cannot be: a size below one, a name twice, or text that is not `name=size`."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named axes, the slowest-varying device index first."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes):
            raise MeshError(f"{len(self.names)} axis names but {len(self.sizes)} axis sizes")
        if not self.names or not all(isinstance(n, str) and n for n in self.names):
            raise MeshError(
                f"a mesh has one name, a string, for each of its axes, not {list(self.names)}"
            )
        if len(set(self.names)) != len(self.names):
            raise MeshError(f"a mesh axis is named twice: {', '.join(self.names)}")
        for name, size in zip(self.names, self.sizes, strict=True):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise MeshError(
                    f"mesh axis {name!r} has size {size!r}; give a whole number above zero"
                )

    @staticmethod
    def of(axes: Mapping[str, int]) -> Mesh:
        """The mesh with these axis names and sizes, in the order of the mapping."""
        return Mesh(tuple(axes), tuple(axes.values()))

    @staticmethod
    def parse(text: str) -> Mesh:
        """Read `data=4,model=2` (commas or blanks between axes); raises MeshError."""
        axes: dict[str, int] = {}
        for part in re.split(r"[,\s]+", text.strip()):
            found = re.fullmatch(r"([A-Za-z_]\w*)=(\d+)", part)
            if not found:
                raise MeshError(
                    f"cannot read {part!r} as a mesh axis; write a mesh as data=4,model=2"
                )
            if found[1] in axes:
                raise MeshError(f"mesh axis {found[1]!r} is given twice in {text!r}")
            axes[found[1]] = int(found[2])
        return Mesh.of(axes)

    @property
    def devices(self) -> int:
        """How many devices the mesh has in all."""
        return math.prod(self.sizes)

    def as_dict(self) -> dict[str, int]:
        """Axis name to size, in order."""
        return dict(zip(self.names, self.sizes, strict=True))

    def __str__(self) -> str:
        return " ".join(f"{n}={s}" for n, s in self.as_dict().items())
