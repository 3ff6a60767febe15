"""The operations as torch custom ops, and the one rule of dispatch.

CUDA tensors go to the kernels; CPU tensors go to the kernels under Triton's interpreter
(``TRITON_INTERPRET=1``), else to the reference: compiled by torch.compile where a C++ compiler is
there, else eager. All routes give the same bits. Arguments are checked in ``functional``, not here:
matrices are contiguous and two-dimensional, seed and step 0-dim int64 tensors on the same device.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from . import compiled, reference
from .kernels.launch import INTERPRETED
from .pattern import code_dtype


def interpreting() -> bool:
    """Whether CPU tensors go to the kernels through Triton's interpreter."""
    return INTERPRETED


@functools.cache
def compiler_available() -> bool:
    """Whether torch.compile finds a C++ compiler on this machine."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception:  # torch raises types of its own that differ between releases
        return False
    return True


@functools.cache
def _kernels():
    return importlib.import_module("maskpro_kernels.kernels.sampling")


def _reference(name: str, args: tuple, scalars: tuple = (), **constants: int):
    """Run the reference, compiled where possible; ``scalars`` become 0-dim tensors so that no value is compiled in."""
    tensors = [torch.tensor(s, dtype=torch.float32 if isinstance(s, float) else torch.int64) for s in scalars]
    module = compiled if compiler_available() else reference
    return getattr(module, name)(*args, *tensors, **constants)


def _uses_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda or (tensor.device.type == "cpu" and interpreting())


@torch.library.custom_op("maskpro::sample_mask", mutates_args=())
def sample_mask(
    logits: Tensor,
    n: int,
    m: int,
    inv_temperature: float,
    seed: Tensor,
    step: Tensor,
    layer: int,
    draw: int,
    group_offset: int,
    group_row_stride: int,
) -> Tensor:
    """Group codes [rows, K / M] of a draw from logits [rows, K]."""
    counter = (layer, draw, group_offset, group_row_stride)
    if _uses_kernels(logits):
        return _kernels().sample_mask(logits, n, m, inv_temperature, seed, step, *counter)
    return _reference("sample_mask", (logits, seed, step), (inv_temperature, *counter), n=n, m=m)


@sample_mask.register_fake
def _(logits, n, m, *_):
    return logits.new_empty((logits.shape[0], logits.shape[1] // m), dtype=code_dtype(m))


@torch.library.custom_op("maskpro::sample_masked_weight", mutates_args=())
def sample_masked_weight(
    weight: Tensor,
    logits: Tensor,
    n: int,
    m: int,
    inv_temperature: float,
    seed: Tensor,
    step: Tensor,
    layer: int,
    draw: int,
    group_offset: int,
    group_row_stride: int,
) -> Tensor:
    """The weight [rows, K] under the mask that ``sample_mask`` draws, exact zeros elsewhere."""
    counter = (layer, draw, group_offset, group_row_stride)
    if _uses_kernels(logits):
        return _kernels().sample_masked_weight(weight, logits, n, m, inv_temperature, seed, step, *counter)
    return _reference("sample_masked_weight", (weight, logits, seed, step), (inv_temperature, *counter), n=n, m=m)


@sample_masked_weight.register_fake
def _(weight, *_):
    return torch.empty_like(weight)


def _sample_masked_weight_context(ctx, inputs, output):
    _, logits, n, m, inv_temperature, seed, step, *counter = inputs
    ctx.save_for_backward(logits, seed, step)
    ctx.constants = (n, m, inv_temperature, counter)


def _sample_masked_weight_backward(ctx, grad):
    logits, seed, step = ctx.saved_tensors
    n, m, inv_temperature, counter = ctx.constants
    # the mask is drawn again: masking is linear in the weight
    masked = sample_masked_weight(grad.contiguous(), logits, n, m, inv_temperature, seed, step, *counter)
    return masked, *[None] * 10


sample_masked_weight.register_autograd(_sample_masked_weight_backward, setup_context=_sample_masked_weight_context)


@torch.library.custom_op("maskpro::top_n_mask", mutates_args=())
def top_n_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Group codes [rows, K / M] of the N largest scores [rows, K], ties to the lower index."""
    if _uses_kernels(scores):
        return _kernels().top_n_mask(scores, n, m)
    return _reference("top_n_mask", (scores,), n=n, m=m)


@top_n_mask.register_fake
def _(scores, n, m):
    return scores.new_empty((scores.shape[0], scores.shape[1] // m), dtype=code_dtype(m))


@torch.library.custom_op("maskpro::top_n_masked_weight", mutates_args=())
def top_n_masked_weight(weight: Tensor, scores: Tensor, n: int, m: int) -> Tensor:
    """The weight [rows, K] where its score is among the N largest of its group, exact zeros elsewhere."""
    if _uses_kernels(weight):
        return _kernels().top_n_masked_weight(weight, scores, n, m)
    return _reference("top_n_masked_weight", (weight, scores), n=n, m=m)


@top_n_masked_weight.register_fake
def _(weight, scores, n, m):
    return torch.empty_like(weight)


def _top_n_masked_weight_context(ctx, inputs, output):
    _, scores, ctx.n, ctx.m = inputs
    ctx.save_for_backward(scores)


def _top_n_masked_weight_backward(ctx, grad):
    (scores,) = ctx.saved_tensors
    return top_n_masked_weight(grad.contiguous(), scores, ctx.n, ctx.m), None, None, None


top_n_masked_weight.register_autograd(_top_n_masked_weight_backward, setup_context=_top_n_masked_weight_context)


@torch.library.custom_op("maskpro::mask_score", mutates_args=())
def mask_score(logits: Tensor, codes: Tensor, grad: Tensor, n: int, m: int) -> Tensor:
    """grad [rows, K / M] times the gradient of log p(S) in logits, float32 [rows, K]."""
    if _uses_kernels(logits):
        return _kernels().mask_score(logits, codes, grad, n, m)
    if n > reference.EXACT_SCORE_MAX_N:
        # the quadrature's nodes would be unrolled into a graph that takes minutes to compile
        return reference.mask_score(logits, codes, grad, n=n, m=m)
    return _reference("mask_score", (logits, codes, grad), n=n, m=m)


@mask_score.register_fake
def _(logits, *_):
    return torch.empty_like(logits, dtype=torch.float32)


@torch.library.custom_op("maskpro::mask_log_prob", mutates_args=())
def mask_log_prob(logits: Tensor, codes: Tensor, n: int, m: int) -> Tensor:
    """log p(S) of the masks with those codes, float32 [rows, K / M]."""
    if _uses_kernels(logits):
        return _kernels().mask_log_prob(logits, codes, n, m)
    if n > reference.EXACT_SCORE_MAX_N:
        return reference.mask_log_prob(logits, codes, n=n, m=m)
    return _reference("mask_log_prob", (logits, codes), n=n, m=m)


@mask_log_prob.register_fake
def _(logits, codes, n, m):
    return torch.empty_like(codes, dtype=torch.float32)


def _mask_log_prob_context(ctx, inputs, output):
    logits, codes, ctx.n, ctx.m = inputs
    ctx.save_for_backward(logits, codes)


def _mask_log_prob_backward(ctx, grad):
    logits, codes = ctx.saved_tensors
    return mask_score(logits, codes, grad.contiguous(), ctx.n, ctx.m).to(logits.dtype), None, None, None


mask_log_prob.register_autograd(_mask_log_prob_backward, setup_context=_mask_log_prob_context)


@torch.library.custom_op("maskpro::score_update_", mutates_args=("logits",))
def score_update_(
    logits: Tensor,
    coef: Tensor,
    n: int,
    m: int,
    inv_temperature: float,
    seed: Tensor,
    step: Tensor,
    layer: int,
    draws: Tensor,
    group_offset: int,
    group_row_stride: int,
) -> None:
    """logits [rows, K] -= sum over k of coef[k] * score(mask of draw draws[k]); coef float32, draws int64 [draws]."""
    if _uses_kernels(logits):
        _kernels().score_update_(
            logits, coef, n, m, inv_temperature, seed, step, layer, draws, group_offset, group_row_stride
        )
    else:
        scalars = (inv_temperature, layer, group_offset, group_row_stride)
        _reference("score_update_", (logits, coef, seed, step, draws), scalars, n=n, m=m)


@score_update_.register_fake
def _(logits, *_):
    return None
