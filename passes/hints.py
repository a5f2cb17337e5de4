"""Which arguments does a hint mean, and what does it say?  `{"params/**/wq": (None, "model")}`.

Arguments are named by their path, with slashes: jax's `params['layers'][0]['wq']` is
`params/layers/0/wq`. In a glob `*` and `?` stand for characters of one part of the path, `**` for
any number of whole parts, also none:

>>> path_of("params['layers'][0]['wq']")
'params/layers/0/wq'
>>> match("params/**/wq", "params/layers/0/wq"), match("params/*", "params/layers/0/wq")
(True, False)

Where no argument has such a path, a glob that describes a group (a dict, a tuple, a dataclass)
means all arrays in it, as the prefix of a pytree does in jax:

>>> named("batch*", ["params['w']", "batch['x']", "batch['y']"])
[1, 2]

What a hint says, its spec, has one entry for each dim: the name of the mesh axis that splits it,
a tuple of names, None for *do not split*, OPEN for *the planner decides*; one `...` stands for any
number of open dims. As in a PartitionSpec, dims that a glob's spec does not reach are not split.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, Final

from passes.ir.graph import Graph, Hint, Value

Dims = tuple[tuple[str, ...] | None, ...]


class HintError(ValueError):
    """A hint that can not be followed; says whose, about which value, and what to do."""


class _Open:
    """The type of OPEN, the one entry that leaves a dim to the planner."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "OPEN"

    def __reduce__(self) -> str:  # a copy is the thing itself
        return "OPEN"


OPEN: Final = _Open()

_SUFFIX = re.compile(r"\.(\w+)|\[('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^\]]*)\]")


def path_of(name: str) -> str:
    """The slashed path of an argument's name as jax gives it."""
    at = re.match(r"[^.\[]*", name)
    assert at is not None
    parts, end = [at[0]] if at[0] else [], at.end()
    while found := _SUFFIX.match(name, end):
        parts.append(found[1] if found[1] is not None else _key(found[2]))
        end = found.end()
    return "/".join(parts) + name[end:]


def _key(text: str) -> str:
    """What stands between brackets: an index, or a string as Python writes it."""
    return str(ast.literal_eval(text)) if text[:1] in ("'", '"') else text.strip("<>")


def match(glob: str, path: str) -> bool:
    """Whether the glob describes the whole path."""
    return _pattern(glob).fullmatch(path + "/") is not None


def named(glob: str, names: Sequence[str]) -> list[int]:
    """Places of the names that a glob means: those it describes, else those in such a group."""
    paths = [path_of(name) for name in names]
    found = [
        k
        for k, (name, path) in enumerate(zip(names, paths, strict=True))
        if glob == name or match(glob, path)
    ]
    return found or [k for k, path in enumerate(paths) if match(f"{glob}/**", path)]


@lru_cache(maxsize=256)
def _pattern(glob: str) -> re.Pattern[str]:
    """A pattern for paths in which every part ends with a slash, the last one too."""
    signs = {"*": "[^/]*", "?": "[^/]"}
    parts = (
        "(?:[^/]*/)*" if part == "**" else "".join(signs.get(c, re.escape(c)) for c in part) + "/"
        for part in glob.split("/")
    )
    return re.compile("".join(parts))


def spec_dims(spec: Iterable[Any], rank: int, *, short: bool, where: str) -> Dims:
    """A spec as `Hint.dims` for a value of this rank; `short` lets it name the first dims only.

    Raises HintError, its message beginning with `where`: for a wrong number of entries, an axis
    given twice, or an entry that is no axis name.
    """
    entries = list(spec)
    gaps = [n for n, entry in enumerate(entries) if entry is Ellipsis]
    if len(gaps) > 1:
        raise HintError(
            f"{where}: '...' is given {len(gaps)} times; it may stand in one place only"
        )
    if gaps:
        missing = rank - len(entries) + 1
        entries[gaps[0] : gaps[0] + 1] = [OPEN] * max(missing, 0)
    elif short:
        entries += [None] * (rank - len(entries))
    if len(entries) != rank:
        raise HintError(
            f"{where}: {_count(len(entries), 'entry', 'entries')} for"
            f" {_count(rank, 'dim', 'dims')}; give one per dim, or end with ... to leave the"
            " others open"
        )
    dims = tuple(_entry(entry, where) for entry in entries)
    names = [axis for dim in dims for axis in dim or ()]
    for axis in names:
        if names.count(axis) > 1:
            raise HintError(
                f"{where}: axis {axis!r} is given twice; it can split a value only once"
            )
    return dims


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _entry(entry: Any, where: str) -> tuple[str, ...] | None:
    """One dim's axes. jax's P.UNCONSTRAINED counts as OPEN; we know it by its name alone."""
    if entry is OPEN or repr(entry) == "UNCONSTRAINED":
        return None
    if entry is None:
        return ()
    if isinstance(entry, str) and entry:
        return (entry,)
    if isinstance(entry, tuple | list) and all(isinstance(a, str) and a for a in entry):
        return tuple(entry)
    raise HintError(
        f"{where}: {entry!r} is no axis; write an axis name, a tuple of names, None for"
        " 'do not split', or OPEN for 'the planner decides'"
    )


def parse_spec(text: str) -> tuple[Any, ...]:
    """A spec from a command line: `data, None, model+seq, ?, ...` (`.` for None, `?` for OPEN)."""
    words = {"None": None, ".": None, "?": OPEN, "OPEN": OPEN, "...": ...}
    inside = re.sub(r"^(P|PartitionSpec)?\((.*)\)$", r"\2", text.strip())
    parts = [part.strip().strip("'\"") for part in inside.split(",") if part.strip()]
    return tuple(words[p] if p in words else tuple(p.split("+")) for p in parts)


def hints_for(graph: Graph, hints: Mapping[str, Any]) -> tuple[Hint, ...]:
    """The hints that `{glob: spec}` means for the arguments of a graph, in order of the mapping.

    A spec is a PartitionSpec, a tuple of entries, or text for `parse_spec`. Scalars of a group that
    a glob means as a whole are left alone. Raises HintError for a glob that matches no argument,
    and for a spec that does not fit an argument it matches.
    """
    return tuple(hint for glob, spec in hints.items() for hint in _for_glob(graph, glob, spec))


def _for_glob(graph: Graph, glob: Any, spec: Any) -> Iterator[Hint]:
    origin = f"hints[{glob!r}]"
    if not isinstance(glob, str):
        raise HintError(f"{origin}: {glob!r} is no glob; write the path of arguments as text")
    entries = parse_spec(spec) if isinstance(spec, str) else spec
    if not isinstance(entries, Iterable) or isinstance(entries, Mapping | Set):
        raise HintError(f"{origin}: {spec!r} is no spec; write a PartitionSpec or a tuple")
    entries = tuple(entries)
    arguments = _arguments(graph)
    matched = [arguments[k] for k in named(glob, [v.name for v in arguments])]
    if not matched:
        raise HintError(f"{origin} matches no argument; {nearest(graph, glob)}")
    for v in matched:
        if not v.shape and not match(glob, path_of(v.name)) and glob != v.name:
            continue
        where = f"{origin} on {v.name}, {v.type}"
        yield Hint(v.id, spec_dims(entries, len(v.shape), short=True, where=where), origin)


def _arguments(graph: Graph) -> list[Value]:
    return [graph.values[v] for v in graph.inputs]


def nearest(graph: Graph, glob: str) -> str:
    """What the user may have meant, for the message."""
    paths = [path_of(v.name) for v in _arguments(graph)]
    bare = re.sub(r"\*\*/|/\*\*|[*?]", "", glob)

    def likeness(path: str) -> float:
        last = difflib.SequenceMatcher(None, bare.rpartition("/")[2], path.rpartition("/")[2])
        return last.ratio() + difflib.SequenceMatcher(None, bare, path).ratio()

    near = sorted(paths, key=likeness, reverse=True)[:3]
    if not near:
        return "the function has no arguments"
    return f"the nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}"
