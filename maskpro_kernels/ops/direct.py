"""Operations past torch's dispatcher, which takes longer than a small product."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .dispatch import compiler_available, interpreting, machine_code

try:
    _modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
    _transforms, _tracer = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
    _derivatives = forward_ad._current_level < 0
except AttributeError:
    # none of these is a promise of torch's: where one is gone, all goes through the dispatcher
    _derivatives = False

PLAIN, DTYPES = (Tensor, nn.Parameter), (torch.float32, torch.bfloat16, torch.float16)

_compiling, _grad_enabled, _autocast = torch.compiler.is_compiling, torch.is_grad_enabled, torch.is_autocast_enabled


def direct_nm_linear(
    x: Tensor, values: Tensor, bitmask: Tensor, scales: Tensor | None, bias: Tensor | None, n: int, m: int
) -> Tensor | None:
    """``nm_linear`` of x [..., K] on a CPU where nothing else is asked for; None where something is.

    That is a gradient, a graph, a mode, a transform, autocast, a tensor of another type than Tensor, or a look at
    arguments that do not fit.
    """
    # dynamo has to see this first, and all else in the order of what is most often the case
    if _compiling() or type(x) is not Tensor or not x.is_cpu or not _derivatives:
        return None
    if _grad_enabled() and (x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    if _modes() or _function_modes() or forward_ad._current_level >= 0 or _autocast("cpu"):
        return None
    if _transforms() is not None or _tracer() is not None:
        return None
    # what is computed by address has to be plain memory
    for part in (values, bitmask, scales, bias):
        if part is not None and (type(part) not in PLAIN or not part.is_cpu or not part.is_contiguous()):
            return None
    dtype = x.dtype
    if dtype not in DTYPES or (values if scales is None else scales).dtype != dtype or not x.is_contiguous():
        return None
    if x.is_neg() or not x.dim() or x.shape[-1] * n != values.shape[1] * m:
        return None
    if bias is not None and (bias.dtype != dtype or bias.shape != values.shape[:1]):
        return None
    if interpreting() or not compiler_available():
        return None
    return machine_code("packed.products").nm_linear(x, (values, bitmask, scales), bias, n, m)
