"""Weights under a mask, and unpacked ones, in the operations that ONNX has: for ``torch.onnx.export``.

No ONNX runtime knows the operations of this package. Where constants are folded, these come to the dense weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def in_onnx_export() -> bool:
    """Whether ``torch.onnx.export`` is looking on."""
    # the first of the two alone is quick, and imports nothing
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def refuse_in_onnx_export() -> None:
    """Raise ValueError in the fake of an operation that ``torch.onnx.export`` has come to."""
    if in_onnx_export():
        raise ValueError(
            "model: expected masks that ONNX can hold, those of the N largest logits in eval mode, got others: call "
            "eval(), or export the dense model that finalize gives"
        )


def top_n_weight(weight: Tensor, logits: Tensor, n: int, m: int) -> Tensor:
    """The weight [out, K] under the N largest logits [out, K] of every group."""
    # ties go to the lower index in ONNX's TopK
    largest = logits.unflatten(-1, (-1, m)).topk(n, dim=-1).indices
    kept = largest.unsqueeze(-2) == torch.arange(m, device=weight.device).unsqueeze(-1)
    return torch.where(kept.any(-1).flatten(-2), weight, 0.0)


def unpacked_weight(values: Tensor, bitmask: Tensor, n: int, m: int) -> Tensor:
    """The weight [out, K] of its values [out, K N / M] and bitmask [out, ceil(K / 8)]."""
    k = values.shape[1] // n * m
    powers = 2 ** torch.arange(8, device=bitmask.device, dtype=torch.int32)
    # ONNX shifts unsigned integers alone
    bits = torch.remainder(torch.div(bitmask.to(torch.int32).unsqueeze(-1), powers, rounding_mode="floor"), 2)
    kept = bits.flatten(-2)[:, :k].unflatten(-1, (-1, m))
    place = (kept.to(torch.int64).cumsum(-1) - 1).clamp(min=0)
    return torch.where(kept != 0, values.unflatten(-1, (-1, n)).gather(2, place), 0.0).flatten(-2)
