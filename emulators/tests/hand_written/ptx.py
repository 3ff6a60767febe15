"""Kernels written by hand for the PTX emulator, and single instructions on arrays of operands."""

from __future__ import annotations

import numpy as np

from gpu_emulators.ptx import Findings, GlobalMemory, Program

HEAD = """.version 8.8
.target sm_100a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    {parameters}
)
.reqntid {threads}
{{
    .reg .pred %p<40>;
    .reg .b16 %rs<40>;
    .reg .b32 %r<80>;
    .reg .b64 %rd<80>;
    .loc 1 1 0
    {loads}
    mov.u32 %r70, %tid.x;
    mov.u32 %r71, %ctaid.x;
    mad.lo.s32 %r72, %r71, {threads}, %r70;
    {body}
}}
.file 1 "written/by_hand.py"
"""
ALIGNMENT = 1 << 12
# by their names in PTX, after what they hold
FAMILIES = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}


def kernel(body: str, arrays: int = 1, threads: int = 32) -> str:
    """The text of a kernel: %rd0, %rd1 and so on are addresses of arrays, %r70 the thread, %r71 the CTA, %r72 both."""
    names = [f"kernel_param_{k}" for k in range(arrays)]
    parameters = ",\n    ".join(f".param .u64 .ptr .global .align 1 {name}" for name in names)
    loads = "\n    ".join(f"ld.param.b64 %rd{k}, [{name}];" for k, name in enumerate(names))
    return HEAD.format(parameters=parameters, threads=threads, loads=loads, body=body)


class Run:
    """A launch of a kernel on arrays, which it may write, and what was found."""

    def __init__(self, body: str, *arrays: np.ndarray, threads: int = 32, ctas: int = 1, shared: int = 0, **options):
        self.program = Program(kernel(body, len(arrays), threads))
        self.findings, memory = Findings(), GlobalMemory()
        unwritten = options.pop("unwritten", ())
        addresses = [ALIGNMENT]
        for k, array in enumerate(arrays):
            memory.register(addresses[-1], array, f"array {k}", initialised=k not in unwritten)
            addresses.append((addresses[-1] + array.nbytes) // ALIGNMENT * ALIGNMENT + ALIGNMENT)
        self.executed = self.program.launch((ctas, 1, 1), addresses[:-1], shared, memory, self.findings, **options)


def kinds(body: str, *arrays: np.ndarray, **options) -> set[str]:
    """What is found in a kernel."""
    return Run(body, *arrays, **options).findings.kinds


def compute(instruction: str, *operands: np.ndarray, out: type) -> np.ndarray:
    """An instruction on operands, which it names $a, $b, $c; its result is $d. bool is a predicate."""
    operands = np.broadcast_arrays(*operands)
    count = operands[0].size
    padded = [np.resize(operand.reshape(-1), -(-count // 32) * 32) for operand in operands]
    result = np.zeros(padded[0].size, out)
    lines = []
    for k, (letter, operand) in enumerate(zip("abc", padded, strict=False)):
        register = _load(lines, operand.dtype, k)
        instruction = instruction.replace(f"${letter}", register)
    size = result.dtype.itemsize
    target = "%p39" if out is bool else f"{FAMILIES[size]}39"
    lines.append(instruction.replace("$d", target))
    if out is bool:
        lines.append("selp.b16 %rs39, 1, 0, %p39;")
        target = "%rs39"
    where = len(operands)
    lines += [f"mad.wide.u32 %rd38, %r72, {size}, %rd{where};", f"st.global.b{size * 8} [%rd38], {target};", "ret;"]
    run = Run("\n    ".join(lines), *padded, result, ctas=padded[0].size // 32)
    assert not run.findings, run.findings
    return result[:count]


def _load(lines: list[str], dtype: np.dtype, k: int) -> str:
    """Load a thread's element of array ``k``; returns the register."""
    size, register = dtype.itemsize, f"{FAMILIES[dtype.itemsize]}{20 + k}"
    lines.append(f"mad.wide.u32 %rd{30 + k}, %r72, {size}, %rd{k};")
    lines.append(f"ld.global.b{size * 8} {register}, [%rd{30 + k}];")
    if dtype.kind == "b":
        lines.append(f"setp.ne.b16 %p{20 + k}, {register}, 0;")
        return f"%p{20 + k}"
    return register
