"""Triton's interpreter, mended where it differs from hardware in what the kernels do."""

from __future__ import annotations

import numpy as np


def widen_bfloat16_exactly() -> None:
    """Casts of bfloat16 to float32 keep every value, as they do on all hardware.

    As Triton ships the interpreter (3.6 to 3.9), its cast takes subnormal numbers for zeros or for others.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    shipped = interpreter._convert_float

    def convert(values, before, after, rounding):
        if before == tl.bfloat16 and after == tl.float32:
            return values.view(np.uint16).astype(np.uint32) << 16
        return shipped(values, before, after, rounding)

    interpreter._convert_float = convert
