"""Which graph does this text mean?  The other half of `passes.ir.text`, for tests and bug reports.

>>> g = parse_graph("graph f\\n  arg x  f32[8]\\n  %0 = neg x  f32[8]  i -> i\\n  out %0")
>>> g.ops[0].rule.factors[0].size
8
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast, get_args

from passes.ir.graph import Graph, Hint, Op, Region, RegionKind, Type, Value, ValueKind, short_dtype
from passes.ir.rule import Rule
from passes.ir.text import default_bits, sizes_by_letter

# Runs of anything but two blanks; a name in backticks may hold even those.
_COLUMN = re.compile(r"(?:`(?:[^`]|``)*`|\S|(?<=\S) (?=\S))+")
_WORD = re.compile(r"(?:`(?:[^`]|``)*`|\S)+")
_MARK = re.compile(r"(\{)([^{}]*)\}|(\w+)\(([^()]*)\)|(\w+)=(\S+)|(effects|fuses)")
_REGION = re.compile(r"(\w+) x(\S+) \{")
_TYPE = re.compile(r"(.+?)(?:/(\d+))?\[([\d,]*)\]")
_KINDS: dict[str, ValueKind] = {"arg": "argument", "const": "constant", "lit": "literal"}
_EMPTY: Mapping[str, Any] = MappingProxyType({})
_DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8",
    "uint16", "uint32", "uint64", "bool", "complex64", "complex128", "float8_e4m3fn",
    "float8_e5m2", "int4", "uint4",
)  # fmt: skip
_LONG = {short_dtype(name): name for name in _DTYPES}


class TextError(ValueError):
    """Text that is not a graph; the message names the line."""


def parse_graph(text: str) -> Graph:
    """The graph that the text describes; raises TextError with the line that cannot be read."""
    reader = _Reader()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            reader.read(line.strip())
        except (ValueError, KeyError, IndexError) as error:
            raise TextError(f"line {number}: {line.strip()!r}: {error}") from error
    if reader.open:
        raise TextError(f"region {reader.open[-1].kind!r} is never closed with '}}'")
    return reader.graph()


def parse_type(text: str) -> Type:
    """Read `f32[8,16]` or `key<fry>/64[]`."""
    found = _TYPE.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not a type; write one as f32[8,16]")
    dtype = _LONG.get(found[1], found[1])
    bits = int(found[2]) if found[2] else default_bits(dtype)
    if bits is None:
        raise ValueError(f"how many bits has one {dtype}? write {found[1]}/64[...] or the like")
    return Type(tuple(int(n) for n in found[3].split(",") if n), dtype, bits)


@dataclass(slots=True)
class _OpenRegion:
    id: int
    kind: str
    trips: float
    begin: int


@dataclass(slots=True)
class _Reader:
    """What has been read so far; `read` takes one line."""

    name: str = ""
    values: list[Value] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    regions: dict[int, Region] = field(default_factory=dict)
    open: list[_OpenRegion] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[tuple[int, str]] = field(default_factory=list)
    ties: list[tuple[str, str]] = field(default_factory=list)
    donated: list[int] = field(default_factory=list)
    hints: list[tuple[str, Hint]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read(self, line: str) -> None:
        """Take in one line."""
        columns = _COLUMN.findall(line)
        words = _WORD.findall(line)
        if len(words) > 1 and "=" in words[1:] and words[0] != "note":
            self.operation(columns)
        elif line == "}":
            self.close()
        elif _REGION.fullmatch(line):
            self.begin(line)
        else:
            word, _, rest = line.partition(" ")
            self.header(word, rest.strip(), _COLUMN.findall(rest.strip()))

    def header(self, word: str, rest: str, columns: list[str]) -> None:
        """One line that is neither an operation nor a region's border."""
        if word in ("graph", "note"):
            self.text(word, rest)
        elif word in _KINDS:
            self.value(word, columns)
        elif word == "hint":
            self.hint(columns)
        elif word == "tie":
            first, second = _WORD.findall(rest)
            self.ties.append((first, second))
        elif word == "out":
            self.outputs.append((self.operand(columns[0]), columns[1] if len(columns) > 1 else ""))
        else:
            raise ValueError(f"a line cannot begin with {word!r}")

    def text(self, word: str, rest: str) -> None:
        """The graph's name or a note."""
        if word == "note":
            self.notes.append(rest)
        else:
            self.name = rest

    def value(self, word: str, columns: list[str]) -> None:
        """An argument, a constant or a literal: name, type, `donated` or the literal's text."""
        printed, type_ = columns[0], parse_type(columns[1])
        extra = columns[2] if len(columns) > 2 else ""
        kind: ValueKind = (
            "argument" if word == "arg" else "constant" if word == "const" else "literal"
        )
        name = extra if kind == "literal" else "" if printed.startswith("%") else _unquoted(printed)
        v = self.define(printed, type_, kind, name)
        if kind == "argument":
            self.inputs.append(v)
        if extra == "donated" and kind != "literal":
            self.donated.append(v)

    def define(self, printed: str, type_: Type, kind: ValueKind, name: str) -> int:
        """A new value under its printed name."""
        if printed in self.ids:
            raise ValueError(f"{printed} is defined twice")
        self.values.append(Value(len(self.values), type_, kind, name))
        self.ids[printed] = len(self.values) - 1
        return len(self.values) - 1

    def hint(self, columns: list[str]) -> None:
        """`x  [data, ., ?]  train.py:7  priority=1 soft`; the value may be defined further down."""
        dims = tuple(
            None if d == "?" else () if d == "." else tuple(d.split("+"))
            for d in (part.strip() for part in columns[1].strip("[]").split(","))
            if d
        )
        marks = columns[3].split() if len(columns) > 3 else []
        priority = next((int(m[9:]) for m in marks if m.startswith("priority=")), 0)
        origin = columns[2] if len(columns) > 2 and columns[2] != "-" else ""
        self.hints.append((columns[0], Hint(-1, dims, origin, priority, "soft" not in marks)))

    def begin(self, line: str) -> None:
        """A region's first line."""
        found = _REGION.fullmatch(line)
        assert found
        if found[1] not in get_args(RegionKind):
            raise ValueError(
                f"{found[1]!r} is no kind of region: {', '.join(get_args(RegionKind))}"
            )
        id_ = 1 + len(self.regions) + len(self.open)
        self.open.append(_OpenRegion(id_, found[1], float(found[2]), len(self.ops)))

    def close(self) -> None:
        """A region's last line."""
        if not self.open:
            raise ValueError("'}' closes no region")
        r = self.open.pop()
        parent = self.open[-1].id if self.open else 0
        kind = cast(RegionKind, r.kind)
        self.regions[r.id] = Region(r.id, parent, kind, r.trips, r.begin, len(self.ops))

    def operation(self, columns: list[str]) -> None:
        """`h = dot_general x w  f32[8,16]  b k, k n -> b n  add(k)  train.py:14`."""
        words = _WORD.findall(columns[0])
        at = words.index("=")
        left, name, right = words[:at], words[at + 1], words[at + 2 :]
        inputs = tuple(self.operand(word) for word in right)
        types = [] if columns[1] == "-" else [parse_type(t) for t in columns[1].split(" ")]
        results = [] if left == ["_"] and not types else left
        if len(results) != len(types):
            raise ValueError(f"{len(results)} results but {len(types)} types")
        marks, source = _marks_and_source(columns[3:])
        shapes = [self.values[v].shape for v in inputs], [t.shape for t in types]
        rule = _rule(columns[2], marks, *shapes)
        outputs = tuple(self.define(n, t, "result", "" if n.startswith("%") else _unquoted(n))
                        for n, t in zip(results, types, strict=True))  # fmt: skip
        region = self.open[-1].id if self.open else 0
        effects = "effects" in marks
        self.ops.append(
            Op(len(self.ops), name, inputs, outputs, rule, _EMPTY, source, (), region, effects)
        )

    def operand(self, word: str) -> int:
        """A value by its printed name, or a literal written in place: `2.0:f32[]`."""
        if word not in self.ids:
            text, colon, type_ = word.rpartition(":")
            if not colon or word.startswith("`"):
                raise ValueError(f"{word} is used before it is defined")
            self.define(word, parse_type(type_), "literal", text)
        return self.ids[word]

    def graph(self) -> Graph:
        """The graph, once all lines are read."""
        missing = [w for pair in self.ties for w in pair if w not in self.ids]
        missing += [w for w, _ in self.hints if w not in self.ids]
        if missing:
            raise TextError(f"no value is named {missing[0]}")
        top = Region(0, 0, "top", 1.0, 0, len(self.ops))
        names = tuple(name for _, name in self.outputs)
        return Graph(
            self.name,
            tuple(self.values),
            tuple(self.ops),
            (top, *(self.regions[i] for i in sorted(self.regions))),
            tuple(self.inputs),
            tuple(v for v, _ in self.outputs),
            names if any(names) else (),
            tuple((self.ids[a], self.ids[b]) for a, b in self.ties),
            frozenset(self.donated),
            tuple(Hint(self.ids[w], h.dims, h.origin, h.priority, h.hard) for w, h in self.hints),
            tuple(self.notes),
        )


def _unquoted(name: str) -> str:
    return name[1:-1].replace("``", "`") if name.startswith("`") else name


def _marks_and_source(columns: list[str]) -> tuple[dict[str, str], str]:
    """The marks by their word (`add` -> "k", `{` -> "h=4 d=8"), and the source that follows."""
    if not columns:
        return {}, ""
    if " ".join(m[0] for m in _MARK.finditer(columns[0])) != columns[0]:
        return {}, " ".join(columns)
    groups = (m.groups() for m in _MARK.finditer(columns[0]))
    marks = {brace or word or key or flag: sizes or inside or value or ""
             for brace, sizes, word, inside, key, value, flag in groups}  # fmt: skip
    return marks, " ".join(columns[1:])


_NOT_REDUCTIONS = {"{", "halo", "whole", "linear", "from", "flops", "moved", "fuses", "effects"}


def _rule(
    text: str,
    marks: Mapping[str, str],
    operands: list[tuple[int, ...]],
    results: list[tuple[int, ...]],
) -> Rule:
    flops, fuses = float(marks.get("flops", 0.0)), "fuses" in marks
    moved = float(marks["moved"]) if "moved" in marks else None
    if text == "whole":
        return replace(Rule.whole(operands, results), flops=flops, fuses=fuses, moved=moved)
    sizes = _sizes(text, [*operands, *results])
    for part in marks.get("{", "").split():
        letter, _, size = part.partition("=")
        sizes[letter] = int(size)
    reduce = {
        letter: "" if word == "reduction" else word
        for word, letters in marks.items()
        if word not in _NOT_REDUCTIONS
        for letter in letters.split()
    }
    halo = {p.split(":")[0]: int(p.split(":")[1]) for p in marks.get("halo", "").split()}
    groups = marks.get("linear", "").split(",")
    return Rule.parse(
        text, sizes, reduce=reduce, halo=halo, whole=marks.get("whole", "").split(),
        linear=tuple(tuple(int(i) for i in group.split()) for group in groups if group),
        flops=flops, fuses=fuses, moved=moved, source=marks.get("from", "hand"),
    )  # fmt: skip


def _sizes(text: str, shapes: list[tuple[int, ...]]) -> dict[str, int]:
    """Lengths of the letters that are a dim of their own."""
    letters = dict.fromkeys(re.findall(r"[^\s(),]+", text), 1)
    return sizes_by_letter(Rule.parse(text, letters), shapes)
