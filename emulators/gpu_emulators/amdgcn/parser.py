"""AMDGCN assembly text into a kernel: basic blocks of instructions, its descriptor, its arguments, source lines.

Syntax after LLVM's "User Guide for AMDGPU Backend" (Assembler, Code Object V5 Metadata, .amdhsa_kernel) and "Syntax of
AMDGPU Instruction Operands" and "... Modifiers". A text holds one kernel, as Triton writes it. What a descriptor asks
for beyond what the emulator gives is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..findings import Refused

WAVE = 64
# Scalar registers with names, by their numbers in instructions: CDNA3 ISA, Scalar ALU Operands
VCC, M0, EXEC = 106, 124, 126
NAMED = {
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
    "m0": (M0, 1),
}
SCALARS = 128
# Accumulation registers follow those for vectors
ACCUMULATORS = 256
VECTORS = 512


@dataclass(frozen=True)
class Vector:
    """``count`` vector registers from ``index`` on: one value for each lane."""

    index: int
    count: int = 1


@dataclass(frozen=True)
class Scalar:
    """``count`` scalar registers from ``index`` on: one value for each wave."""

    index: int
    count: int = 1


@dataclass(frozen=True)
class Literal:
    """A constant, an integer or a float."""

    value: int | float


@dataclass(frozen=True)
class Modified:
    """A source that is negated, without its sign, or extended by its sign."""

    operand: Vector | Scalar | Literal
    negated: bool = False
    absolute: bool = False
    extended: bool = False


@dataclass(frozen=True)
class Label:
    """The block that a branch goes to."""

    block: int | str


@dataclass(frozen=True)
class Word:
    """An operand that is neither a register nor a number: ``off``, a counter of s_waitcnt with its number."""

    name: str
    value: int | None = None


@dataclass
class Instruction:
    """``opcode`` without its encoding (e32, e64, sdwa, dpp, or none), and what stands behind the operands."""

    text: str
    line: int
    where: str
    opcode: str
    encoding: str
    operands: list
    modifiers: dict[str, int | str | tuple[int, ...]]


@dataclass(frozen=True)
class Argument:
    """Where an argument lies among the bytes that a kernel is given."""

    offset: int
    size: int
    kind: str


@dataclass
class Kernel:
    """``entry`` is the block that a wave begins with; ``shared`` are the bytes of LDS that it declares.

    Those of ``arguments`` that are hidden say how the kernel was launched.
    """

    name: str
    target: str
    arguments: list[Argument]
    descriptor: dict[str, int]
    threads: int
    blocks: list[list[Instruction]] = field(default_factory=list)
    entry: int = 0

    @property
    def shared(self) -> int:
        return self.descriptor["group_segment_fixed_size"]

    @property
    def argument_bytes(self) -> int:
        return self.descriptor["kernarg_size"]

    def instructions(self):
        return (ins for block in self.blocks for ins in block)


TARGET = re.compile(r'^\s*\.amdgcn_target\s+"[^"]*?-(gfx\w+)[^"]*"', re.M)
DESCRIPTOR = re.compile(r"^\s*\.amdhsa_kernel\s+(\S+)\n(.*?)^\s*\.end_amdhsa_kernel", re.M | re.S)
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', re.M)
LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
LABEL = re.compile(r"([\w.$]+):$")
TOKEN = re.compile(
    r"""\s*(?:
        (?P<modifier>[a-z]\w*:(?:\[[^\]]*\]|[\w.-]+))
      | (?P<call>-?(?:sext|abs|neg)\([^)]*\) | -?\|[^|]*\|)
      | (?P<count>\w+\(\d+\))
      | (?P<plain>-?[\w.]+(?:\[[^\]]*\])?)
    )(?P<end>\s*,|\s+|$)""",
    re.X,
)
REGISTER = re.compile(r"([vsa])(?:(\d+)|\[(\d+):(\d+)\])")
# Kinds of arguments: User Guide for AMDGPU Backend, Code Object V5 Metadata
EXPLICIT = ("by_value", "global_buffer")
HIDDEN = re.compile(r"hidden_(?:(?:block_count|group_size|remainder|global_offset)_[xyz]|grid_dims|dynamic_lds_size)")
ENCODINGS = ("e32", "e64", "sdwa", "dpp")
FLAGS = {"offen", "sc0", "sc1", "nt", "row_mirror", "row_half_mirror"}
# Entries of a descriptor by the one value that is modelled: LLVM, User Guide for AMDGPU Backend, .amdhsa_kernel.
# Floats of all sizes round to the nearest and keep subnormal numbers; minima and maxima heed IEEE's rules.
MODELLED = {
    "private_segment_fixed_size": 0,
    "uses_dynamic_stack": 0,
    "enable_private_segment": 0,
    "user_sgpr_dispatch_ptr": 0,
    "user_sgpr_queue_ptr": 0,
    "user_sgpr_kernarg_segment_ptr": 1,
    "user_sgpr_dispatch_id": 0,
    "user_sgpr_private_segment_size": 0,
    "user_sgpr_kernarg_preload_offset": 0,
    "system_sgpr_workgroup_info": 0,
    "system_vgpr_workitem_id": 0,
    "float_round_mode_32": 0,
    "float_round_mode_16_64": 0,
    "float_denorm_mode_32": 3,
    "float_denorm_mode_16_64": 3,
    "dx10_clamp": 1,
    "ieee_mode": 1,
    "fp16_overflow": 0,
    "tg_split": 0,
}
READ = {
    "group_segment_fixed_size",
    "kernarg_size",
    "user_sgpr_count",
    "user_sgpr_kernarg_preload_length",
    "system_sgpr_workgroup_id_x",
    "system_sgpr_workgroup_id_y",
    "system_sgpr_workgroup_id_z",
}
# What only says how many registers a wave gets, or which exceptions are told
ALLOCATION = re.compile(r"next_free_[vs]gpr|accum_offset|reserve_\w+|exception_\w+")


def parse(text: str) -> Kernel:
    """The kernel of an assembly text; raises ``Refused`` for what the emulator does not know."""
    descriptors = list(DESCRIPTOR.finditer(text))
    if len(descriptors) != 1:
        raise Refused(f"a text with one kernel is expected, this one has {len(descriptors)}")
    name, target = descriptors[0][1], TARGET.search(text)
    described = _descriptor(descriptors[0][2])
    arguments, threads = _metadata(text, name)
    kernel = Kernel(name, target[1] if target else "", arguments, described, threads)
    files = {int(found[1]): (found[3] or found[2]).rsplit("/", 1)[-1] for found in FILE.finditer(text)}
    _Body(kernel, files).read(text)
    return kernel


def _descriptor(text: str) -> dict[str, int]:
    found = {}
    for line in text.splitlines():
        entry = re.fullmatch(r"\s*\.amdhsa_(\w+)\s+(\d+)\s*", line)
        if not entry:
            raise Refused(f"{line.strip()} in the kernel's descriptor")
        key, value = entry[1], int(entry[2])
        if MODELLED.get(key, value) != value:
            raise Refused(f".amdhsa_{key} {value}: {MODELLED[key]} is expected")
        if key not in MODELLED and key not in READ and not ALLOCATION.fullmatch(key):
            raise Refused(f".amdhsa_{key}")
        found[key] = value
    if missing := sorted((MODELLED.keys() | READ) - found.keys()):
        raise Refused(f"the kernel's descriptor has no {', '.join(missing)}")
    return found


def _metadata(text: str, name: str) -> tuple[list[Argument], int]:
    """(arguments, threads of a workgroup) by the metadata: User Guide for AMDGPU Backend, Code Object V5 Metadata."""
    _, _, notes = text.partition(".amdgpu_metadata")
    listed = re.search(r"^    \.args:\s*\n((?:      .*\n)*)", notes, re.M)
    entries = re.split(r"^      - ", listed[1], flags=re.M)[1:] if listed else []
    arguments = []
    for entry in entries:
        values = dict(re.findall(r"^\s*\.(\w+):\s+(\S+)\s*$", entry, re.M))
        kind = values["value_kind"]
        if kind not in EXPLICIT and not HIDDEN.fullmatch(kind):
            raise Refused(f"an argument {kind}")
        arguments.append(Argument(int(values["offset"]), int(values["size"]), kind))
    facts = dict(re.findall(r"^    \.(\w+):\s+(\S+)\s*$", notes, re.M))
    threads, wave = (int(facts.get(fact, 0)) for fact in ("max_flat_workgroup_size", "wavefront_size"))
    if facts.get("name") != name or wave != WAVE or not threads or threads % WAVE:
        raise Refused(f"{name}: metadata with waves of {WAVE} lanes and whole waves in a workgroup are expected")
    return arguments, threads


class _Body:
    """Reads the lines of a kernel into instructions and labels, then cuts them into basic blocks."""

    def __init__(self, kernel: Kernel, files: dict[int, str]):
        self.kernel, self.files, self.where = kernel, files, ""
        self.code: list[Instruction | str] = []
        # waves whose first arguments are in registers begin behind the code that loads these, at an address of its own
        self.preloaded = bool(kernel.descriptor["user_sgpr_kernarg_preload_length"])
        self.entry: int | None = None

    def read(self, text: str) -> None:
        lines = text.splitlines()
        start = next((number for number, line in enumerate(lines) if line.startswith(f"{self.kernel.name}:")), None)
        if start is None:
            raise Refused(f"the text has no {self.kernel.name}")
        for number, raw in enumerate(lines[start + 1 :], start + 2):
            stripped = raw.split(";", 1)[0].strip()
            if stripped.startswith((".section", ".Lfunc_end")):
                break
            if stripped and not self._directive(stripped):
                self._instruction(stripped, number)
        self._split_into_blocks()

    def _directive(self, text: str) -> bool:
        if location := LOCATION.match(text):
            self.where = f"{self.files.get(int(location[1]), location[1])}:{location[2]}"
        elif label := LABEL.match(text):
            self.code.append(label[1])
        elif text.split() == [".p2align", "8"] and self.preloaded and self.entry is None:
            self.entry = len(self.code)
        elif re.match(r"\.(file|cfi_\w+|p2align)\b", text) is None:
            if text[0] == ".":
                raise Refused(f"directive {text}")
            return False
        return True

    def _instruction(self, text: str, line: int) -> None:
        opcode, _, rest = text.partition(" ")
        base, _, encoding = opcode.rpartition("_")
        if encoding not in ENCODINGS:
            base, encoding = opcode, ""
        ins = Instruction(" ".join(text.split()), line, self.where, base, encoding, [], {})
        at, rest = 0, rest.strip()
        while at < len(rest):
            token = TOKEN.match(rest, at)
            if not token:
                raise Refused(f"line {line}, {ins.text}: {rest[at:]!r}")
            self._token(token, ins)
            at = token.end()
        self.code.append(ins)

    def _token(self, token: re.Match, ins: Instruction) -> None:
        if token["modifier"]:
            name, _, value = token["modifier"].partition(":")
            if name in ins.modifiers:
                raise Refused(f"line {ins.line}, {ins.text}: {name} stands there twice")
            ins.modifiers[name] = _modifier(value)
        elif token["count"]:
            name, value = token["count"].rstrip(")").split("(")
            ins.operands.append(Word(name, int(value)))
        elif token["plain"] in FLAGS:
            ins.modifiers[token["plain"]] = 1
        else:
            ins.operands.append(_operand((token["call"] or token["plain"]).strip(), ins))

    def _split_into_blocks(self) -> None:
        """A block ends at a label that something branches to, at a branch, an end and a barrier."""
        targets = {operand.block for ins in self._instructions() for operand in ins.operands if _is_label(operand)}
        blocks: list[list[Instruction]] = [[]]
        starts: dict[str | int, int] = {}
        for at, item in enumerate(self.code):
            if (item in targets if isinstance(item, str) else at == self.entry) and blocks[-1]:
                blocks.append([])
            if at == self.entry:
                self.kernel.entry = len(blocks) - 1
            if isinstance(item, str):
                starts[item] = len(blocks) - 1
                continue
            blocks[-1].append(item)
            if ends_block(item):
                blocks.append([])
        if not blocks[-1]:
            blocks.pop()
        if self.preloaded and not self.kernel.entry:
            raise Refused("arguments in registers, and no code at an address of its own behind that which loads them")
        for ins in self._instructions():
            for operand in ins.operands:
                if _is_label(operand) and operand.block not in starts:
                    raise Refused(f"line {ins.line}, {ins.text}: nothing is named {operand.block}")
            ins.operands = [Label(starts[o.block]) if _is_label(o) else o for o in ins.operands]
        self.kernel.blocks = blocks

    def _instructions(self):
        return (item for item in self.code if isinstance(item, Instruction))


def vector_name(index: int) -> str:
    return f"v{index}" if index < ACCUMULATORS else f"a{index - ACCUMULATORS}"


def scalar_name(index: int) -> str:
    names = {first: name for name, (first, count) in NAMED.items() if count == 1}
    return names.get(index, f"s{index}")


def _is_label(operand) -> bool:
    return isinstance(operand, Label)


def ends_block(ins: Instruction) -> bool:
    return ins.opcode in ("s_branch", "s_endpgm", "s_barrier") or ins.opcode.startswith("s_cbranch_")


def _modifier(value: str) -> int | str | tuple[int, ...]:
    if value[0] == "[":
        return tuple(int(piece, 0) for piece in value[1:-1].split(","))
    return int(value, 0) if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", value) else value


def _operand(text: str, ins: Instruction):
    if wrapped := re.fullmatch(r"(-?)(?:\|(.*)\||(sext|abs|neg)\((.*)\))", text):
        minus, between, name, inside = wrapped.groups()
        absolute = between is not None or name == "abs"
        return Modified(_operand(between or inside, ins), minus == "-" or name == "neg", absolute, name == "sext")
    if text in NAMED:
        return Scalar(*NAMED[text])
    if register := REGISTER.fullmatch(text):
        first = int(register[2] or register[3])
        count = int(register[4]) - first + 1 if register[4] else 1
        if register[1] == "s":
            return Scalar(first, count)
        return Vector(first + (ACCUMULATORS if register[1] == "a" else 0), count)
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text):
        return Literal(int(text, 0))
    if re.fullmatch(r"-?\d+\.\d+(e[+-]?\d+)?", text):
        return Literal(float(text))
    if text[0] == "-":
        return Modified(_operand(text[1:], ins), negated=True)
    if text == "off":
        return Word(text)
    if text[0] == ".":
        return Label(text)
    raise Refused(f"line {ins.line}, {ins.text}: operand {text}")
