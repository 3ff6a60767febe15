"""A dense product with one token from the code generator of packed ones: its time without zeros left out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from llvmlite import ir
from torch import Tensor

from maskpro_kernels.ops.cpu import machine
from maskpro_kernels.ops.cpu.packed_gemm import RUN, Packed, rows
from maskpro_kernels.ops.cpu.packed_gemm.instructions import FLOAT, vector
from maskpro_kernels.ops.cpu.packed_gemm.products import available, threads
from maskpro_kernels.ops.cpu.packed_gemm.weight import Weight


class _Dense(Weight):
    """Runs of dense values, which are not expanded."""

    def load_direct(self, pointers: tuple, run: ir.Value, scale: ir.Value | None = None) -> list[ir.Value]:
        source = self.run_values(pointers, run)
        out = [self._loaded(self._after(source, lane), self.lanes, scale) for lane in range(0, RUN, self.lanes)]
        return [self.b.bitcast(x, vector(FLOAT, self.lanes)) for x in out] if self.form == "floats" else out

    def load_copied(self, pointers: tuple, run: ir.Value, scale: ir.Value | None = None) -> list[ir.Value]:
        # K is a multiple of RUN, so that there are none
        return self.load_direct(pointers, run, scale)

    def _after(self, pointer: ir.Value, values: int) -> ir.Value:
        return self.b.gep(pointer, [ir.Constant(ir.IntType(64), values)], source_etype=self.element)


class _DenseProduct(rows.FloatProduct):
    weight_class = _Dense


def dense_loop(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """``linear(x, weight)`` of a token [1, K] and a weight [rows, K] of that dtype, K a multiple of RUN.

    Raises:
        RuntimeError: if the CPU has no instructions that packed weights are multiplied with.
    """
    isa = available()
    if isa is None:
        raise RuntimeError("a dense loop: expected AVX-512, AVX2 or NEON, got a CPU without")
    # every value is kept
    kind = Packed(1, 1, dtype, dtype)
    # not kept on disk, where nothing would show that this file has changed
    loop = machine.loaded_loop(machine.object_code(_DenseProduct(kind, isa, 1, False).assembly()), 8)
    bfloat16 = rows.multiplies_bfloat16(kind, isa)

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        out_features, k = weight.shape
        operand = x if bfloat16 else x.float()
        if k % RUN:
            raise ValueError(f"weight: expected rows of a multiple of {RUN} values, got {k}")
        out = x.new_empty(1, out_features)
        addresses = weight.data_ptr(), 0, 0, operand.data_ptr(), 0, out.data_ptr()
        loop(out_features, threads(out_features * k), k, out_features, *addresses)
        return out

    return linear
