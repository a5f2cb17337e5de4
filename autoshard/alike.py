"""Which arrays are alike, so that one line can tell of many?  `rows(tensors)`, `mirrors(tensors)`.

Arrays of one type and sharding whose paths differ only in an index, or in one name, share a line:

>>> names = [f"p[{i}]['{n}']" for i in range(3) for n in ("wk", "wq")]
>>> arrays = [TensorPlan(n, (4, 8), "float32", 128, ((), ("model",))) for n in names]
>>> for row in rows(arrays):
...     print(row.path, row.type, row.count)
p/*/{wk,wq} f32[4,8{model}] 6

A subtree that has the paths and shapes of another one *mirrors* it, as an optimizer's moments
mirror the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from passes.hints import path_of
from passes.ir.graph import short_dtype
from passes.ir.plan import TensorPlan

Path = tuple[str, ...]

# A mirror is a large part of all arrays: key and query weights of one layer do not count.
_SHARE, _LEAST = 8, 4


@dataclass(frozen=True, slots=True)
class Row:
    """Arrays told in one line. nbytes: of all on one device. first: place of the first one."""

    path: str
    type: str
    count: int
    nbytes: float
    origin: str
    first: int
    split: bool


@dataclass(frozen=True, slots=True)
class Mirror:
    """A subtree that looks like another: places of its arrays and of those they correspond to."""

    original: Path
    copy: Path
    pairs: tuple[tuple[int, int], ...]


def parts_of(tensor: TensorPlan) -> Path:
    """The parts of a tensor's path."""
    return tuple(path_of(tensor.name).split("/"))


def local_bytes(tensor: TensorPlan, mesh: Mapping[str, int]) -> float:
    """Bytes of it on one device."""
    return tensor.nbytes / math.prod(mesh.get(a, 1) for axes in tensor.spec for a in axes)


def type_text(tensor: TensorPlan) -> str:
    """`f32[64{data},128]`."""
    dims = ",".join(
        f"{n}{{{','.join(axes)}}}" if axes else str(n)
        for n, axes in zip(tensor.shape, tensor.spec, strict=True)
    )
    return f"{short_dtype(tensor.dtype)}[{dims}]"


# Lines


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row in the making; a part of its path is one name or several."""

    parts: tuple[Path, ...]
    type: str
    places: tuple[int, ...]
    origin: str


def rows(
    tensors: Sequence[TensorPlan],
    places: Sequence[int] | None = None,
    mesh: Mapping[str, int] | None = None,
    names: bool = True,
) -> list[Row]:
    """Lines for the tensors at these places (all of them, when None), in order of first mention.

    names: whether arrays of different names, not only of different indices, share a line.
    """
    chosen = range(len(tensors)) if places is None else places
    paths = [parts_of(t) for t in tensors]
    drafts = _over_indices(tensors, paths, chosen)
    deepest = max((len(d.parts) for d in drafts), default=0) if names else 0
    for position in reversed(range(deepest)):
        drafts = _over_names(drafts, position)
    out = [
        Row(
            path="/".join(_part_text(p) for p in d.parts),
            type=d.type,
            count=len(d.places),
            nbytes=sum(local_bytes(tensors[k], mesh or {}) for k in d.places),
            origin=d.origin,
            first=min(d.places),
            split=any(tensors[d.places[0]].spec),
        )
        for d in drafts
    ]
    return sorted(out, key=lambda r: r.first)


def _over_indices(
    tensors: Sequence[TensorPlan], paths: Sequence[Path], places: Sequence[int]
) -> list[_Draft]:
    """One draft for tensors whose paths differ in indices only."""
    groups: dict[tuple[Path, str, str], list[int]] = {}
    used: dict[tuple[Path, int], set[str]] = {}
    for k in places:
        masked = tuple("*" if p.isdigit() else p for p in paths[k])
        groups.setdefault((masked, type_text(tensors[k]), tensors[k].origin), []).append(k)
        for position, part in enumerate(paths[k]):
            used.setdefault((masked, position), set()).add(part)
    out = []
    for (masked, type, origin), members in groups.items():
        parts = tuple(
            _indices({paths[k][i] for k in members}, used[masked, i]) for i in range(len(masked))
        )
        out.append(_Draft(tuple((p,) for p in parts), type, tuple(members), origin))
    return out


def _indices(found: set[str], all_of_them: set[str]) -> str:
    """`3`, `*` for all indices there are, `{0-2,5}` for some of them."""
    if len(found) == 1:
        return next(iter(found))
    if found == all_of_them:
        return "*"
    runs: list[list[int]] = []
    for n in sorted(map(int, found)):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    spans = (str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return f"{{{','.join(spans)}}}"


def _over_names(drafts: Sequence[_Draft], position: int) -> list[_Draft]:
    """One draft for those that differ in the name at this position only."""
    out: dict[object, _Draft] = {}
    for d in drafts:
        key: object = d
        if position < len(d.parts) and not d.parts[position][0].startswith(("*", "{")):
            rest = (*d.parts[:position], *d.parts[position + 1 :])
            key = (rest, len(d.parts), d.type, d.origin)
        if key in out:
            old = out[key]
            names = (*old.parts[position], *d.parts[position])
            parts = (*old.parts[:position], names, *old.parts[position + 1 :])
            out[key] = replace(old, parts=parts, places=(*old.places, *d.places))
        else:
            out[key] = d
    return list(out.values())


def _part_text(names: Path, most: int = 24) -> str:
    """`wq`, `{wk,wq}`, or `{wk,wo,.. 7 more}` where that gets too long."""
    if len(names) == 1:
        return names[0]
    shown = list(names)
    while len(shown) > 1 and len(",".join(shown)) > most:
        shown.pop()
    left = len(names) - len(shown)
    return "{" + ",".join(shown) + (f",.. {left} more" if left else "") + "}"


# Mirrors


def mirrors(tensors: Sequence[TensorPlan]) -> list[Mirror]:
    """Large subtrees that look like another one of the same tensors, the largest first."""
    least = max(_LEAST, len(tensors) // _SHARE)
    return _pair(tensors, tensors, least, alone=True)


def counterparts(results: Sequence[TensorPlan], arguments: Sequence[TensorPlan]) -> list[Mirror]:
    """Subtrees of the results that look like one of the arguments: state that goes round."""
    return _pair(arguments, results, 2, alone=False)


def _pair(
    originals: Sequence[TensorPlan], copies: Sequence[TensorPlan], least: int, alone: bool
) -> list[Mirror]:
    """alone: both are the same tensors, so that a subtree must not be paired with itself."""
    by_look: dict[object, list[Path]] = {}
    theirs = _subtrees(originals)
    for prefix, found in theirs.items():
        by_look.setdefault(_look(originals, found), []).append(prefix)
    out: list[Mirror] = []
    ours = theirs if alone else _subtrees(copies)
    for prefix, found in sorted(ours.items(), key=lambda item: -len(item[1])):
        if len(found) < least or any(_inside(prefix, m.copy) for m in out):
            continue
        for original in sorted(by_look.get(_look(copies, found), ()), key=_rank):
            if alone and (
                _related(prefix, original) or any(_inside(original, m.copy) for m in out)
            ):
                continue
            pairs = zip(sorted(theirs[original].items()), sorted(found.items()), strict=True)
            out.append(Mirror(original, prefix, tuple((a, b) for (_, a), (_, b) in pairs)))
            break
    return out


def _subtrees(tensors: Sequence[TensorPlan]) -> dict[Path, dict[Path, int]]:
    """Every prefix of a path: the rest of the paths under it, and where these tensors are."""
    out: dict[Path, dict[Path, int]] = {}
    for k, tensor in enumerate(tensors):
        parts = parts_of(tensor)
        for depth in range(1, len(parts)):
            out.setdefault(parts[:depth], {})[parts[depth:]] = k
    return out


def _look(tensors: Sequence[TensorPlan], found: Mapping[Path, int]) -> object:
    return frozenset((rest, tensors[k].shape) for rest, k in found.items())


def _inside(path: Path, prefix: Path) -> bool:
    return path[: len(prefix)] == prefix


def _rank(path: Path) -> tuple[int, bool, Path]:
    """Which of several alike is the original: the shortest path, of those the one called params."""
    return len(path), not any("param" in part.lower() for part in path), path


def _related(copy: Path, original: Path) -> bool:
    """Whether one holds the other, or both are layers of one stack or stand the wrong way round."""
    if _inside(copy, original) or _inside(original, copy) or _rank(copy) < _rank(original):
        return True
    if len(copy) != len(original):
        return False
    differing = list(_differences(copy, original))
    return len(differing) == 1 and all(p.isdigit() for p in differing[0])


def _differences(a: Path, b: Path) -> Iterator[tuple[str, str]]:
    return ((x, y) for x, y in zip(a, b, strict=True) if x != y)
