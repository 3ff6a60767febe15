"""PTX text into a kernel: basic blocks of instructions with their operands, registers, parameters, source lines.

Syntax after PTX ISA 4 (syntax), 5.1 (state spaces), 9.3 (predicated execution) and 11 (directives). A text holds one
kernel, as Triton writes it. Directives that would change what it does are refused where the emulator lacks them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from ..findings import Refused

# Where local memory begins: beyond all addresses of shared memory, so that neither takes those of the other
LOCAL_START = 1 << 24
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(frozen=True)
class Register:
    index: int


@dataclass(frozen=True)
class Special:
    """A register that the hardware fills, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant; ``bits`` is 32 or 64 where ``value`` holds the bits of a float, None for an integer."""

    value: int
    bits: int | None = None


@dataclass(frozen=True)
class Symbol:
    """The name of a parameter."""

    name: str


@dataclass(frozen=True)
class Label:
    """The block that a branch goes to; a name, until the blocks are cut."""

    block: int | str


@dataclass(frozen=True)
class Vector:
    operands: tuple


@dataclass(frozen=True)
class Address:
    base: Register | Immediate | Symbol
    offset: int = 0


@dataclass(frozen=True)
class Pair:
    """Two destinations, ``%p1|%p2``."""

    first: object
    second: object


@dataclass(frozen=True)
class Negated:
    """A predicate that is read negated, ``!%p1``."""

    register: Register


@dataclass(frozen=True)
class Sink:
    """A destination that nobody wants, ``_``."""


@dataclass
class Instruction:
    """``opcode`` is split at its dots; ``line`` counts from 1; ``where`` is the Python file and line it stems from."""

    text: str
    line: int
    where: str
    guard: int | None
    negated: bool
    opcode: list[str]
    operands: list


@dataclass(frozen=True)
class Parameter:
    """``kind`` is its type, as u64 or f32."""

    name: str
    kind: str

    @property
    def bits(self) -> int:
        return int(self.kind[1:])


@dataclass
class Kernel:
    """``dtypes`` and ``names`` are those of its registers.

    ``shared`` are bytes of shared memory that it declares, ``local`` those of each thread's own memory.
    """

    name: str
    target: str
    params: list[Parameter]
    threads: int
    blocks: list[list[Instruction]] = field(default_factory=list)
    dtypes: list[type] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    shared: int = 0
    local: int = 0

    def instructions(self):
        return (ins for block in self.blocks for ins in block)


ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*((?:\.\w+[\s\d,]*)*)\{", re.S)
PARAMETER = re.compile(r"\.param\s+\.([usfb]\d+)((?:\s+\.(?:ptr|global|align\s+\d+))*)\s+([\w$]+)")
SHARED = re.compile(r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\s*\[(\d*)\]\s*;")
LOCAL = re.compile(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\s*\[(\d+)\]")
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', re.M)
LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
# of a family such as %r<80>, from %r0 to %r79
NUMBERED = re.compile(r"([%\w$]*?)(0|[1-9]\d*)")
LABEL = re.compile(r"([A-Za-z_$%][\w$]*):(?!:)")
OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
ADDRESS = re.compile(r"([%\w$.]+)(?:\s*([+-])\s*(-?\w+))?")
# hexadecimal, octal, binary, decimal (PTX ISA 4.5.1, integer constants)
INTEGER = re.compile(r"(-?)(?:0[xX]([0-9a-fA-F]+)|0([0-7]+)|0[bB]([01]+)|(0|[1-9]\d*))U?")
BASES = (16, 8, 2, 10)
# what a kernel's head may say: its block, and what only the assembler heeds
ATTRIBUTE = re.compile(r"\.(\w+)\s*([\d,\s]*)")
BLOCK_SIZES = ("reqntid", "maxntid")
FOR_THE_ASSEMBLER = ("maxnreg", "minnctapersm")
# Outside of the kernel. A constant in global memory is let stand: a kernel that reads it is refused by its name.
MODULE = re.compile(
    r"\s*\.(version|target|address_size|file)\b[^\n]*|\s*\.section\s+[.\w]+\s*\{.*?\}"
    r"|\s*\.global\s+\.align\s+\d+\s+\.b8\s+[\w$]+\[\d+\]\s*=\s*\{[\d,\s]*\};",
    re.S,
)


def parse(text: str) -> Kernel:
    """The kernel of a PTX text; raises ``Refused`` for what the emulator does not know."""
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.S)
    entries = list(ENTRY.finditer(text))
    if len(entries) != 1:
        raise Refused(f"a text with one kernel is expected, this one has {len(entries)}")
    (entry,) = entries
    target = re.search(r"^\s*\.target\s+(\w+)", text, re.M)
    kernel = Kernel(entry[1], target[1] if target else "", _parameters(entry[2]), _threads(entry[3]))
    symbols = _shared_symbols(text[: entry.start()], kernel)
    body = _Body(kernel, symbols, {int(m[1]): (m[3] or m[2]).rsplit("/", 1)[-1] for m in FILE.finditer(text)})
    end = body.read(text[entry.end() :], text[: entry.end()].count("\n") + 1)
    _check_module(text[: entry.start()], text[entry.end() + end :])
    body.split_into_blocks()
    return kernel


def _parameters(text: str) -> list[Parameter]:
    parameters = []
    for piece in filter(None, (piece.strip() for piece in _plain(text).split(","))):
        found = PARAMETER.fullmatch(piece)
        if not found:
            raise Refused(f"parameter {piece!r}")
        parameters.append(Parameter(found[3], found[1]))
    return parameters


def _threads(attributes: str) -> int:
    threads = None
    for name, value in ATTRIBUTE.findall(attributes):
        if name in BLOCK_SIZES:
            sizes = [int(size) for size in value.split(",")]
            if any(size != 1 for size in sizes[1:]):
                raise Refused(f".{name} {value.strip()}: blocks of one dimension are expected")
            threads = sizes[0]
        elif name not in FOR_THE_ASSEMBLER:
            raise Refused(f".{name} {value.strip()} at the kernel's head")
    if threads is None or threads % 32:
        raise Refused(f".reqntid with a multiple of 32 threads is expected, {threads} came")
    return threads


def _plain(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def _shared_symbols(head: str, kernel: Kernel) -> dict[str, int]:
    """Offsets of what is declared in shared memory; what is sized at launch comes after the rest (PTX ISA 5.1.7)."""
    symbols, dynamic = {}, []
    for extern, align, name, size in SHARED.findall(head):
        if not size:
            dynamic.append(name)
            continue
        if extern:
            raise Refused(f".extern .shared {name} of a fixed size")
        start = -(-kernel.shared // int(align)) * int(align)
        symbols[name], kernel.shared = start, start + int(size)
    if dynamic:
        kernel.shared = -(-kernel.shared // 16) * 16
    return symbols | dict.fromkeys(dynamic, kernel.shared)


def _check_module(head: str, tail: str) -> None:
    for part in (head, tail):
        rest = MODULE.sub("", SHARED.sub("", _plain(part)))
        rest = re.sub(r"\.visible\s*$", "", rest).strip()
        if rest:
            raise Refused(f"outside of the kernel: {rest[:80]!r}")


@dataclass
class _Scope:
    """What is declared in braces: registers by name, families of them by their first part, and labels.

    ``names`` are those of the labels among all of the kernel's. ``branches`` are instructions to labels that may still
    come in the scope, or stand outside of it.
    """

    number: int
    registers: dict[str, Register] = field(default_factory=dict)
    families: dict[str, tuple[type, int]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    branches: list[Instruction] = field(default_factory=list)


class _Body:
    """Reads the lines of a kernel into instructions and labels, then cuts them into basic blocks."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int], files: dict[int, str]):
        self.kernel, self.symbols, self.files = kernel, symbols, files
        # from the kernel's own inwards
        self.scopes = [_Scope(0)]
        self.code: list[Instruction | str] = []
        self.where = ""

    def read(self, text: str, first: int) -> int:
        """Read up to the brace that closes the kernel; returns how many characters that is."""
        pending, line, at, scopes = "", first, 0, 0
        for number, raw in enumerate(text.splitlines(keepends=True), first):
            at += len(raw)
            stripped = raw.split("//", 1)[0].strip()
            if location := LOCATION.match(stripped):
                self.where = f"{self.files.get(int(location[1]), location[1])}:{location[2]}"
                continue
            line = line if pending else number
            pending = f"{pending} {stripped}".strip()
            while pending:
                if pending[0] == "{":
                    scopes += 1
                    self.scopes.append(_Scope(scopes))
                    pending = pending[1:].strip()
                elif pending[0] == "}":
                    self._close_scope()
                    if not self.scopes:
                        return at
                    pending = pending[1:].strip()
                elif label := LABEL.match(pending):
                    self._label(label[1], number)
                    pending = pending[label.end() :].strip()
                elif ";" in pending:
                    statement, _, pending = pending.partition(";")
                    pending = pending.strip()
                    self._statement(statement.strip(), line)
                else:
                    break
                line = number
        raise Refused("the kernel's closing brace is missing")

    def _label(self, name: str, line: int) -> None:
        scope = self.scopes[-1]
        if name in scope.names:
            raise Refused(f"line {line}: a second label {name}")
        # no name of a label has a blank in it
        scope.names[name] = f"{name} of scope {scope.number}"
        self.code.append(scope.names[name])

    def _close_scope(self) -> None:
        """Branches go to labels of the innermost scope around them that has the name, before or behind them."""
        closed = self.scopes.pop()
        for ins in closed.branches:
            names = [one.block if isinstance(one, Label) else None for one in ins.operands]
            ins.operands = [
                one if name is None else Label(closed.names.get(name, name))
                for one, name in zip(ins.operands, names, strict=True)
            ]
            if self.scopes and not closed.names.keys() >= set(names) - {None}:
                self.scopes[-1].branches.append(ins)

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif stack := LOCAL.fullmatch(text):
            start = -(-self.kernel.local // int(stack[1])) * int(stack[1])
            self.symbols[stack[2]], self.kernel.local = LOCAL_START + start, start + int(stack[3])
        elif text.startswith("."):
            if not re.match(r"\.pragma\b", text):
                raise Refused(f"line {line}: {text}")
        elif text:
            self._instruction(text, line)

    def _declare(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
        dtype = np.bool_ if kind == "pred" else UNSIGNED.get(int(kind[1:]))
        if dtype is None:
            raise Refused(f"{text}: registers of that type")
        scope = self.scopes[-1]
        for name in map(str.strip, names.split(",")):
            family = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            if family:
                scope.families[family[1]] = dtype, int(family[2])
            else:
                scope.registers[name] = self._new_register(name, dtype)

    def _new_register(self, name: str, dtype: type) -> Register:
        self.kernel.names.append(name)
        self.kernel.dtypes.append(dtype)
        return Register(len(self.kernel.names) - 1)

    def _register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope.registers:
                return scope.registers[name]
            found = NUMBERED.fullmatch(name)
            dtype, count = scope.families.get(found[1], (None, 0)) if found else (None, 0)
            if found and int(found[2]) < count:
                scope.registers[name] = self._new_register(name, dtype)
                return scope.registers[name]
        return None

    def _instruction(self, text: str, line: int) -> None:
        guard, negated, rest = None, False, text
        if predicated := re.match(r"@\s*(!?)\s*([%\w$]+)\s+(.*)", text, re.S):
            negated, rest = predicated[1] == "!", predicated[3]
            register = self._register(predicated[2])
            if register is None:
                raise Refused(f"line {line}, {text}: no predicate {predicated[2]}")
            guard = register.index
        opcode, *tail = rest.split(None, 1)
        operands = [self._operand(token, text, line) for token in OPERANDS.findall(tail[0] if tail else "")]
        text = " ".join(text.split())
        self.code.append(Instruction(text, line, self.where, guard, negated, opcode.split("."), operands))
        if any(isinstance(operand, Label) for operand in operands):
            self.scopes[-1].branches.append(self.code[-1])

    def _operand(self, token: str, text: str, line: int):
        token = token.strip()
        if token[0] == "%" and (register := self._register(token)):
            return register
        if token[0] == "{":
            return Vector(tuple(self._operand(piece, text, line) for piece in token[1:-1].split(",")))
        if token[0] == "[":
            found = ADDRESS.fullmatch(token[1:-1].strip())
            if not found:
                raise Refused(f"line {line}, {text}: address {token}")
            offset = integer(found[3]) if found[3] else 0
            if offset is None:
                raise Refused(f"line {line}, {text}: address {token}")
            return Address(self._operand(found[1], text, line), -offset if found[2] == "-" else offset)
        if "|" in token:
            first, second = token.split("|")
            return Pair(self._operand(first, text, line), self._operand(second, text, line))
        if token == "_":
            return Sink()
        if token[0] == "!":
            return Negated(self._operand(token[1:], text, line))
        if (value := integer(token)) is not None:
            return Immediate(value)
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", token):
            return Immediate(int(found[1] or found[2], 16), 32 if found[1] else 64)
        return self._name(token, text, line)

    def _name(self, token: str, text: str, line: int):
        register = self._register(token)
        if register is not None:
            return register
        if token[0] == "%":
            return Special(token)
        if token in self.symbols:
            return Immediate(self.symbols[token])
        if any(token == parameter.name for parameter in self.kernel.params):
            return Symbol(token)
        return Label(token)

    def split_into_blocks(self) -> None:
        """A block ends at a label that something branches to, at a branch, at an end and at a barrier."""
        branches = [ins for ins in self.code if isinstance(ins, Instruction) and ins.opcode[0] == "bra"]
        targets = {operand.block for ins in branches for operand in ins.operands if isinstance(operand, Label)}
        blocks: list[list[Instruction]] = [[]]
        starts = {}
        for item in self.code:
            if isinstance(item, str):
                if item in targets:
                    if blocks[-1]:
                        blocks.append([])
                    starts[item] = len(blocks) - 1
                continue
            blocks[-1].append(item)
            if ends_block(item):
                blocks.append([])
        if not blocks[-1]:
            blocks.pop()
        for ins in (ins for block in blocks for ins in block):
            for operand in ins.operands:
                if isinstance(operand, Label) and operand.block not in starts:
                    raise Refused(f"line {ins.line}, {ins.text}: nothing is named {operand.block}")
            ins.operands = [Label(starts[o.block]) if isinstance(o, Label) else o for o in ins.operands]
        self.kernel.blocks = blocks


def integer(token: str) -> int | None:
    """The value of an integer constant, None for any other text."""
    found = INTEGER.fullmatch(token)
    if not found:
        return None
    sign, *digits = found.groups()
    (value,) = (int(one, base) for one, base in zip(digits, BASES, strict=True) if one is not None)
    return -value if sign else value


def ends_block(ins: Instruction) -> bool:
    return ins.opcode[0] in ("bra", "ret", "exit", "trap") or ins.opcode[:2] in (["bar", "sync"], ["barrier", "sync"])
