"""PTX text into a kernel: basic blocks of instructions with their operands, registers, parameters, source lines.

Syntax after PTX ISA 4 (syntax), 5.1 (state spaces), 9.3 (predicated execution) and 11 (directives). A text holds one
kernel, as Triton writes it. Directives that would change what it does are refused where the machine does not know them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from machines.findings import Refused

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
    """The block that a branch goes to."""

    block: int


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
LABEL = re.compile(r"([A-Za-z_$%][\w$]*):(?!:)")
OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
ADDRESS = re.compile(r"([%\w$.]+)(?:\s*([+-])\s*(-?\w+))?")
INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
# what a kernel's head may say: its block, and what only the assembler heeds
ATTRIBUTE = re.compile(r"\.(\w+)\s*([\d,\s]*)")
BLOCK_SIZES = ("reqntid", "maxntid")
FOR_THE_ASSEMBLER = ("maxnreg", "minnctapersm")
# outside of the kernel
MODULE = re.compile(r"\s*\.(version|target|address_size|file)\b[^\n]*|\s*\.section\s+[.\w]+\s*\{.*?\}", re.S)


def parse(text: str) -> Kernel:
    """The kernel of a PTX text; raises ``Refused`` for what the machine does not know."""
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
    kernel.shared = -(-kernel.shared // 16) * 16
    return symbols | dict.fromkeys(dynamic, kernel.shared)


def _check_module(head: str, tail: str) -> None:
    for part in (head, tail):
        rest = MODULE.sub("", SHARED.sub("", _plain(part)))
        rest = re.sub(r"\.visible\s*$", "", rest).strip()
        if rest:
            raise Refused(f"outside of the kernel: {rest[:80]!r}")


class _Body:
    """Reads the lines of a kernel into instructions and labels, then cuts them into basic blocks."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int], files: dict[int, str]):
        self.kernel, self.symbols, self.files = kernel, symbols, files
        self.families: dict[str, type] = {}
        # operands of registers that belong to no scope, by their names
        self.known: dict[str, Register] = {}
        self.registers: dict[str, int] = {}
        # a scope in braces has registers and labels of its own
        self.scopes: list[dict[str, int]] = [{}]
        self.code: list[Instruction | str] = []
        self.where = ""
        self.labels: dict[str, int] = {}

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
                    self.scopes.append({})
                    pending = pending[1:].strip()
                elif pending[0] == "}":
                    self.scopes.pop()
                    if not self.scopes:
                        return at
                    pending = pending[1:].strip()
                elif label := LABEL.match(pending):
                    name = label[1] if len(self.scopes) == 1 else f"{label[1]} of scope {scopes}"
                    self.scopes[-1][f"{label[1]}:"] = name
                    self.code.append(name)
                    pending = pending[label.end() :].strip()
                elif ";" in pending:
                    statement, _, pending = pending.partition(";")
                    pending = pending.strip()
                    self._statement(statement.strip(), line)
                else:
                    break
                line = number
        raise Refused("the kernel's closing brace is missing")

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif stack := LOCAL.fullmatch(text):
            start = -(-self.kernel.local // int(stack[1])) * int(stack[1])
            self.symbols[stack[2]], self.kernel.local = start, start + int(stack[3])
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
        for name in names.split(","):
            family = re.fullmatch(r"\s*([%\w$]+)<\d+>\s*", name)
            if family:
                self.families[family[1]] = dtype
            else:
                self.scopes[-1][name.strip()] = self._new_register(name.strip(), dtype)

    def _new_register(self, name: str, dtype: type) -> int:
        self.kernel.names.append(name)
        self.kernel.dtypes.append(dtype)
        return len(self.kernel.names) - 1

    def _register(self, name: str) -> int | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        index = self.registers.get(name)
        if index is None:
            family = self.families.get(name.rstrip("0123456789"))
            if family is not None:
                index = self.registers[name] = self._new_register(name, family)
                self.known[name] = Register(index)
        return index

    def _instruction(self, text: str, line: int) -> None:
        guard, negated, rest = None, False, text
        if predicated := re.match(r"@\s*(!?)\s*([%\w$]+)\s+(.*)", text, re.S):
            negated, rest = predicated[1] == "!", predicated[3]
            guard = self._register(predicated[2])
            if guard is None:
                raise Refused(f"line {line}, {text}: no predicate {predicated[2]}")
        opcode, *tail = rest.split(None, 1)
        operands = [self._operand(token, text, line) for token in OPERANDS.findall(tail[0] if tail else "")]
        text = " ".join(text.split())
        self.code.append(Instruction(text, line, self.where, guard, negated, opcode.split("."), operands))

    def _operand(self, token: str, text: str, line: int):
        token = token.strip()
        if token in self.known:
            return self.known[token]
        if token[0] == "{":
            return Vector(tuple(self._operand(piece, text, line) for piece in token[1:-1].split(",")))
        if token[0] == "[":
            found = ADDRESS.fullmatch(token[1:-1].strip())
            if not found:
                raise Refused(f"line {line}, {text}: address {token}")
            offset = int(found[3], 0) if found[3] else 0
            return Address(self._operand(found[1], text, line), -offset if found[2] == "-" else offset)
        if "|" in token:
            first, second = token.split("|")
            return Pair(self._operand(first, text, line), self._operand(second, text, line))
        if token == "_":
            return Sink()
        if token[0] == "!":
            return Negated(self._operand(token[1:], text, line))
        if INTEGER.fullmatch(token):
            return Immediate(int(token.rstrip("U"), 0))
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", token):
            return Immediate(int(found[1] or found[2], 16), 32 if found[1] else 64)
        return self._name(token, text, line)

    def _name(self, token: str, text: str, line: int):
        index = self._register(token)
        if index is not None:
            return Register(index)
        if token[0] == "%":
            return Special(token)
        if token in self.symbols:
            return Immediate(self.symbols[token])
        if any(token == parameter.name for parameter in self.kernel.params):
            return Symbol(token)
        for scope in reversed(self.scopes):
            if f"{token}:" in scope:
                return Label(scope[f"{token}:"])
        # a label that comes later, of the kernel itself
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


def ends_block(ins: Instruction) -> bool:
    return ins.opcode[0] in ("bra", "ret", "exit", "trap") or ins.opcode[:2] in (["bar", "sync"], ["barrier", "sync"])
