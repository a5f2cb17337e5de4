"""What stands in the text of a compiled program?  Computations, instructions, and source lines.

XLA prints a scheduled module as one computation after the other, each a list of instructions in the
order in which they run (https://openxla.org/xla/hlo_text_format is what of it is documented).

>>> m = read('''HloModule m
...
... ENTRY %main (x: f32[8,4]) -> f32[8,16] {
...   %x = f32[8,4]{1,0} parameter(0)
...   ROOT %g = f32[8,16]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={1}
... }
... ''')
>>> m.entry.instructions[1].opcode, m.entry.instructions[1].operands
('all-gather', ('x',))
>>> nbytes(m.entry.instructions[1].type)
512
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

# Bits of an element, by HLO's name of its type; what is not listed (token, opaque) takes no memory.
_BITS = {
    "pred": 8, "s2": 2, "s4": 4, "s8": 8, "s16": 16, "s32": 32, "s64": 64,
    "u2": 2, "u4": 4, "u8": 8, "u16": 16, "u32": 32, "u64": 64, "f4e2m1fn": 4,
    "f8e3m4": 8, "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2": 8,
    "f8e5m2fnuz": 8, "f8e8m0fnu": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64,
    "c128": 128,
}  # fmt: skip

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<= ]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^  (ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations"
    r"|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line. operands: names of instructions of the same computation; attributes: as printed."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str

    def attribute(self, key: str) -> str | None:
        """The text of an attribute, up to its end; None where it has none.

        >>> Instruction("g", "f32[4]", "all-gather", ("x",), "dims={1}, id=3", "").attribute("id")
        '3'
        """
        found = re.search(rf"(?:^|[ ,]){re.escape(key)}=", self.attributes)
        return _value(self.attributes, found.end()) if found else None

    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of the computations that it runs, by the attribute that names them."""
        return {
            m[1]: tuple(re.findall(r"[\w.\-]+", m[2]))
            for m in _CALLED.finditer(self.attributes.partition("metadata=")[0])
        }

    @property
    def cycles(self) -> int | None:
        """XLA:TPU's own estimate of how many cycles it takes, where it makes one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from: `jit(step)/while/body/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def frame(self) -> int:
        """The number of its stack frame; 0 for none."""
        found = re.search(r"stack_frame_id=(\d+)", self.attributes)
        return int(found[1]) if found else 0


@dataclass(frozen=True, slots=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]
    by_name: Mapping[str, Instruction] = field(repr=False)

    @property
    def root(self) -> Instruction:
        """What it gives back."""
        return self.instructions[-1]


@dataclass(frozen=True, slots=True)
class Frame:
    """A line of a Python file."""

    file: str
    line: int
    function: str


@dataclass(frozen=True, slots=True)
class Module:
    """A compiled program. frames: per stack frame id the lines, from the innermost outwards."""

    name: str
    computations: Mapping[str, Computation]
    entry: Computation
    frames: Mapping[int, tuple[Frame, ...]]
    partitions: int

    def walk(self, name: str) -> Iterator[Instruction]:
        """All instructions of a computation and, after each, of those that it calls."""
        for i in self.computations[name].instructions:
            yield i
            for names in i.called().values():
                for called in names:
                    yield from self.walk(called)


def read(text: str) -> Module:
    """The module that XLA prints so; raises ValueError where no computation is found."""
    computations: dict[str, Computation] = {}
    entry = ""
    head = ""
    lines: list[str] = []
    tables: dict[str, list[str]] = {}
    table: list[str] | None = None
    for line in text.splitlines():
        if head:
            if line.startswith("}"):
                computations[head] = _computation(head, lines)
                head, lines = "", []
            else:
                lines.append(line)
            continue
        found = _HEAD.match(line)
        if found:
            head, table = found[2], None
            entry = head if found[1] else entry
        elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, [])
        elif table is not None and line:
            table.append(line)
    if not entry:
        raise ValueError("this text has no ENTRY computation: it is no compiled program of XLA's")
    first = text.partition("\n")[0]
    name = re.match(r"HloModule ([^,\s]+)", first)
    parts = re.search(r"num_partitions=(\d+)", first)
    return Module(
        name[1] if name else "",
        computations,
        computations[entry],
        _frames(tables),
        int(parts[1]) if parts else 1,
    )


def _computation(name: str, lines: list[str]) -> Computation:
    found = [i for i in map(_instruction, lines) if i is not None]
    rooted = [k for k, line in enumerate(lines) if line.startswith("  ROOT ")]
    if rooted and rooted[0] != len(lines) - 1:  # a scheduled root stands where it runs
        root = _instruction(lines[rooted[0]])
        found = (
            [i for i in found if root is None or i.name != root.name] + [root] if root else found
        )
    return Computation(name, tuple(found), {i.name: i for i in found})


def _instruction(line: str) -> Instruction | None:
    start = _NAME.match(line)
    if start is None:
        return None
    at = start.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    opcode, inside = line[end:opening].strip(), line[opening + 1 : closing]
    names = () if opcode in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", inside))
    literal = inside if not names else ""
    return Instruction(
        start[2], line[at:end], opcode, names, line[closing + 1 :].lstrip(", "), literal
    )


def _closing(text: str, opening: int) -> int:
    """Where the bracket closes that opens there; brackets in quotes do not count."""
    depth = 0
    for found in _BRACKET.finditer(text, opening):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    return len(text)


_BRACKET = re.compile(r'[()\[\]{}]|"[^"]*"')


def _value(text: str, at: int) -> str:
    """From there to the comma or the end that closes an attribute."""
    depth = 0
    for found in _END.finditer(text, at):
        if found[0] == "," and depth == 0:
            return text[at : found.start()]
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(found[0], 0)
    return text[at:]


_END = re.compile(r'[()\[\]{},]|"[^"]*"')


def _frames(tables: Mapping[str, list[str]]) -> dict[int, tuple[Frame, ...]]:
    """Per stack frame id its lines of Python, from the tables at the head of the text."""
    names = _quoted(tables.get("FileNames", []))
    functions = _quoted(tables.get("FunctionNames", []))
    places: dict[int, Frame] = {}
    for line in tables.get("FileLocations", []):
        n = _numbers(line)
        places[n[""]] = Frame(
            names.get(n.get("file_name_id", 0), "?"),
            n.get("line", 0),
            functions.get(n.get("function_name_id", 0), ""),
        )
    links = {}
    for line in tables.get("StackFrames", []):
        n = _numbers(line)
        links[n[""]] = (n.get("file_location_id", 0), n.get("parent_frame_id", 0))
    out: dict[int, tuple[Frame, ...]] = {}
    for number in links:
        found: list[Frame] = []
        at = number
        while at in links and len(found) < len(links):
            place, parent = links[at]
            if place in places:
                found.append(places[place])
            at = parent - 1  # printed one too high: 1 for none
        out[number] = tuple(found)
    return out


def _quoted(lines: list[str]) -> dict[int, str]:
    found = (re.match(r'(\d+) "(.*)"$', line) for line in lines)
    return {int(m[1]): m[2] for m in found if m}


def _numbers(line: str) -> dict[str, int]:
    """`7 {line=3 column=2}` -> {"": 7, "line": 3, "column": 2}."""
    number, _, rest = line.partition(" ")
    return {"": int(number), **{k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", rest)}}


def arrays(type: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(element type, shape) of every array in a type; a tuple has several.

    >>> arrays("(f32[2,3]{1,0:T(8,128)}, s32[])")
    (('f32', (2, 3)), ('s32', ()))
    """
    return tuple(
        (kind, tuple(int(d.strip("<= ")) for d in dims.split(",") if d.strip("<= ")))
        for kind, dims in _ARRAY.findall(type)
        if kind in _BITS
    )


@lru_cache(maxsize=1 << 12)
def nbytes(type: str) -> int:
    """Bytes of all arrays in a type, without the padding of tiles."""
    return sum(math.ceil(_BITS[kind] * math.prod(shape) / 8) for kind, shape in arrays(type))
