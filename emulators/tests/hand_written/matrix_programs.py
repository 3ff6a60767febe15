"""Hand-written PTX around matrix instructions: each thread loads words, does something, stores words."""

from __future__ import annotations

import numpy as np

from gpu_emulators.ptx import Findings, GlobalMemory, Program

IN, OUT = 1 << 20, 1 << 24

HEAD = """
.version 8.8
.target {target}
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry test(
    .param .u64 .ptr .global .align 1 test_param_0,
    .param .u64 .ptr .global .align 1 test_param_1
)
.reqntid {threads}
{{
    .reg .pred %p<99>;
    .reg .b32 %r<999>;
    .reg .b32 %in<999>;
    .reg .b32 %out<999>;
    .reg .b64 %rd<99>;
    ld.param.b64 %rd1, [test_param_0];
    ld.param.b64 %rd2, [test_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r3, %r2, {threads}, %r1;
    mul.wide.u32 %rd3, %r3, {in_bytes};
    add.s64 %rd1, %rd1, %rd3;
    mul.wide.u32 %rd4, %r3, {out_bytes};
    add.s64 %rd2, %rd2, %rd4;
    mov.b32 %r4, global_smem;
"""


def names(prefix: str, count: int, first: int = 0) -> str:
    """Registers in braces."""
    return "{" + ", ".join(f"%{prefix}{i}" for i in range(first, first + count)) + "}"


def text(body: str, inputs: int, outputs: int, threads: int = 32, target: str = "sm_90a") -> str:
    """A kernel that fills ``%in0`` on, runs ``body`` and stores ``%out0`` on.

    In the body %r1 is the thread, %r4 the beginning of shared memory; %r10, %p1 and %rd10 on are free.
    """
    head = HEAD.format(target=target, threads=threads, in_bytes=4 * inputs, out_bytes=4 * outputs)
    loads = [f"ld.global.b32 %in{i}, [%rd1+{4 * i}];" for i in range(inputs)]
    stores = [f"st.global.b32 [%rd2+{4 * i}], %out{i};" for i in range(outputs)]
    return "\n".join([head, *loads, body, *stores, "ret;", "}"])


def run(
    body: str, inputs: np.ndarray, outputs: int, shared_bytes: int = 0, ctas: int = 1, target: str = "sm_90a"
) -> tuple[np.ndarray, Findings]:
    """(uint32 [threads, outputs], findings) of a body whose threads load uint32 [threads, inputs]."""
    threads = len(inputs) // ctas
    program = Program(text(body, inputs.shape[1], outputs, threads, target))
    memory, findings = GlobalMemory(), Findings()
    given, result = np.ascontiguousarray(inputs, np.uint32), np.zeros((len(inputs), outputs), np.uint32)
    memory.register(IN, given, "in")
    memory.register(OUT, result, "out")
    program.launch((ctas, 1, 1), [IN, OUT], shared_bytes, memory, findings)
    return result, findings
