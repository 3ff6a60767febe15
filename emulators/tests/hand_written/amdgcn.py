"""Kernels written by hand for the AMDGCN emulator, and single instructions on arrays of operands."""

from __future__ import annotations

import numpy as np

from gpu_emulators.amdgcn import Program
from gpu_emulators.findings import Findings

HEAD = """\t.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
\t.text
kernel:
\t.file\t1 "written" "by_hand.py"
\t.loc\t1 1 0
{loads}
\ts_waitcnt lgkmcnt(0)
\ts_mul_i32 s3, s2, {threads}
\tv_add_u32_e32 v1, s3, v0
{body}
\ts_endpgm
\t.section\t.rodata,"a",@progbits
\t.amdhsa_kernel kernel
{descriptor}
\t.end_amdhsa_kernel
\t.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     0
    .args:
{arguments}
    .group_segment_fixed_size: {lds}
    .max_flat_workgroup_size: {threads}
    .name:           kernel
    .wavefront_size: 64
...
\t.end_amdgpu_metadata
"""
DESCRIPTOR = {
    "group_segment_fixed_size": 0,
    "private_segment_fixed_size": 0,
    "kernarg_size": 0,
    "user_sgpr_count": 2,
    "user_sgpr_dispatch_ptr": 0,
    "user_sgpr_queue_ptr": 0,
    "user_sgpr_kernarg_segment_ptr": 1,
    "user_sgpr_dispatch_id": 0,
    "user_sgpr_kernarg_preload_length": 0,
    "user_sgpr_kernarg_preload_offset": 0,
    "user_sgpr_private_segment_size": 0,
    "uses_dynamic_stack": 0,
    "enable_private_segment": 0,
    "system_sgpr_workgroup_id_x": 1,
    "system_sgpr_workgroup_id_y": 0,
    "system_sgpr_workgroup_id_z": 0,
    "system_sgpr_workgroup_info": 0,
    "system_vgpr_workitem_id": 0,
    "next_free_vgpr": 128,
    "float_round_mode_32": 0,
    "float_round_mode_16_64": 0,
    "float_denorm_mode_32": 3,
    "float_denorm_mode_16_64": 3,
    "dx10_clamp": 1,
    "ieee_mode": 1,
    "fp16_overflow": 0,
    "tg_split": 0,
}
ALIGNMENT = 1 << 12
# Where compute() has its operands: vector registers from this one on, two for each, and then the result
FIRST, RESULT = 10, 40
LOADS = {1: "ubyte", 2: "ushort", 4: "dword", 8: "dwordx2"}
STORES = {1: "byte", 2: "short", 4: "dword", 8: "dwordx2"}


def kernel(body: str, arrays: int = 1, threads: int = 64, lds: int = 0, **descriptor: int) -> str:
    """The text of a kernel.

    Addresses of arrays are in s[4:5], s[6:7] and so on, the workgroup in s2, the lane's number in the workgroup in v0,
    that in the grid in v1.
    """
    described = DESCRIPTOR | {"group_segment_fixed_size": lds, "kernarg_size": 8 * arrays} | descriptor
    arguments = [
        f"      - .address_space:  global\n        .offset:         {8 * k}\n        .size:           8\n"
        "        .value_kind:     global_buffer"
        for k in range(arrays)
    ]
    loads = [f"\ts_load_dwordx2 s[{4 + 2 * k}:{5 + 2 * k}], s[0:1], {8 * k:#x}" for k in range(arrays)]
    return HEAD.format(
        loads="\n".join(loads),
        body="\n".join(line if line.strip().endswith(":") else f"\t{line.strip()}" for line in body.splitlines()),
        threads=threads,
        lds=lds,
        descriptor="\n".join(f"\t\t.amdhsa_{name} {value}" for name, value in described.items()),
        arguments="\n".join(arguments),
    )


class Run:
    """A launch of a kernel on arrays, which it may write, and what was found; ``most`` threads at once."""

    def __init__(self, body: str, *arrays: np.ndarray, threads: int = 64, ctas: int = 1, lds: int = 0, **options):
        self.program = Program(kernel(body, len(arrays), threads, lds))
        self.findings, memory = Findings(), self.program.memory()
        unwritten = options.pop("unwritten", ())
        if most := options.pop("most", None):
            options["threads"] = most
        addresses = [ALIGNMENT]
        for k, array in enumerate(arrays):
            memory.register(addresses[-1], array, f"array {k}", initialised=k not in unwritten)
            addresses.append((addresses[-1] + array.nbytes) // ALIGNMENT * ALIGNMENT + ALIGNMENT)
        self.executed = self.program.launch((ctas, 1, 1), addresses[:-1], 0, memory, self.findings, **options)


def kinds(body: str, *arrays: np.ndarray, **options) -> set[str]:
    """What is found in a kernel."""
    return Run(body, *arrays, **options).findings.kinds


def register(index: int, size: int) -> str:
    return f"v[{index}:{index + 1}]" if size == 8 else f"v{index}"


def compute(instructions: str, *operands: np.ndarray, out: type = np.uint32) -> np.ndarray:
    """Instructions on operands, which they name $a, $b, $c; the result is $d.

    bool is a mask of lanes: an operand is put into s[50:51], s[52:53] and so on, and a result is read from $d.
    """
    operands = np.broadcast_arrays(*operands)
    count = operands[0].size
    padded = [np.resize(operand.reshape(-1), -(-count // 64) * 64) for operand in operands]
    result = np.zeros(padded[0].size, out)
    lines, tests = [], []
    for k, (letter, operand) in enumerate(zip("abc", padded, strict=False)):
        size, name = operand.dtype.itemsize, register(FIRST + 2 * k, operand.dtype.itemsize)
        lines.append(f"v_lshlrev_b32_e32 v2, {size.bit_length() - 1}, v1")
        lines.append(f"global_load_{LOADS[size]} {name}, v2, s[{4 + 2 * k}:{5 + 2 * k}]")
        if operand.dtype == bool:
            tests.append(f"v_cmp_ne_u32_e64 s[{50 + 2 * k}:{51 + 2 * k}], 0, {name}")
            name = f"s[{50 + 2 * k}:{51 + 2 * k}]"
        instructions = instructions.replace(f"${letter}", name)
    size = result.dtype.itemsize
    target = "s[60:61]" if out is bool else register(RESULT, size)
    lines += ["s_waitcnt vmcnt(0)", *tests, instructions.replace("$d", target)]
    if out is bool:
        lines.append(f"v_cndmask_b32_e64 v{RESULT}, 0, 1, s[60:61]")
    where = 4 + 2 * len(operands)
    lines.append(f"v_lshlrev_b32_e32 v2, {size.bit_length() - 1}, v1")
    lines.append(f"global_store_{STORES[size]} v2, {register(RESULT, size)}, s[{where}:{where + 1}]")
    run = Run("\n".join(lines), *padded, result, ctas=padded[0].size // 64)
    assert not run.findings, run.findings
    return result[:count]
