"""Ahead-of-time compilation of kernels on a machine without a GPU, and what the result costs.

``TRITON_INTERPRET`` must not be set where this runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from maskpro_kernels.kernels import sampling
from maskpro_kernels.kernels.launch import CONFIGURATIONS
from maskpro_kernels.reference import quadrature_grid

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
COUNTER = {
    "inv_temperature": "fp32",
    "seed": "*i64",
    "step": "*i64",
    "draws": "*i64",
}


@dataclass(frozen=True)
class Built:
    """What a compiled kernel costs: registers a thread, spilled registers, bytes of stack, and its assembly."""

    asm: dict
    registers: int
    spills: int
    stack: int


def build(
    kernel: str,
    target: str,
    n: int,
    m: int,
    logits: str = "fp32",
    weight: str = "bf16",
    **constants,
) -> Built:
    """Compile ``sampling.<kernel>_kernel`` as ``launch`` would for logits and weights of those dtypes."""
    function = getattr(sampling, f"{kernel}_kernel")
    nodes, step = quadrature_grid(n)
    code = "*u8" if m <= 8 else "*i32"
    types = (
        COUNTER
        | {parameter.name: parameter.annotation_type for parameter in function.params if parameter.annotation_type}
        | {
            "logits": f"*{logits}",
            "scores": f"*{logits}",
            "weight": f"*{weight}",
            "out": "*fp32" if kernel in ("mask_log_prob", "mask_score") else f"*{weight}",
            "codes": code,
            "grad": "*fp32",
            "coef": "*fp32",
        }
    )
    config = CONFIGURATIONS[kernel, m]
    known = {
        "N": n,
        "M": m,
        "BLOCK": config.block,
        "NODES": nodes,
        "STEP": step,
        "WHOLE": True,
        "SEVERAL": False,
    } | constants
    names = function.arg_names
    constexprs = {name: known[name] for name in names if name in known}
    signature = {name: "constexpr" if name in constexprs else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=aligned)
    options = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        return _amd(compiled.asm)
    return _nvidia(compiled.asm)


def _nvidia(asm) -> Built:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    fields = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    return Built(asm, int(fields["REG"]), int(fields["LOCAL"]), int(fields["STACK"]))


def _amd(asm) -> Built:
    text = asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    # scalar registers spill to lanes of vector registers, not to memory
    return Built(asm, field("vgpr_count"), field("vgpr_spill_count"), field("private_segment_fixed_size"))
