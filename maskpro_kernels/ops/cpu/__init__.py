"""The reference as machine code for the CPU."""

from __future__ import annotations

import platform

import torch

X86 = ("x86_64", "AMD64")
# Names of LLVM
BFLOAT16_FEATURES = ("avx512bf16", "amx-bf16", "avxneconvert")


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Return whether torch has fast products of a dtype on this CPU; with many tokens others take several times."""
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if short is None:
        return True
    if not torch.backends.mkldnn.is_available() or not getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported")():
        return False
    if short == "bf16" and platform.machine() in X86:
        # oneDNN takes float32 instead on other CPUs with AVX-512, and takes twice as long
        from .machine import features

        return any(features().get(name) for name in BFLOAT16_FEATURES)
    return True
