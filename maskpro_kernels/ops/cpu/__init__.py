"""The reference as machine code for the CPU."""

from __future__ import annotations

import torch


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Return whether torch has fast products of a dtype on this CPU; with many tokens others take several times."""
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    onednn = torch.backends.mkldnn.is_available()
    return short is None or (onednn and getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported")())
