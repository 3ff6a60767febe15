"""The operations of a straight-through step, as torch custom ops: slopes, and the steps of logits and weights.

They run inside of backward, or behind it. Arguments are checked in ``functional``, see ``registry``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..counter import Counter, MaskSource
from .dispatch import kernels, run_reference, scalar, uses_kernels, without_autocast
from .namespace import NAMESPACE
from .registry import COUNTER, MASK, codes_under, flat, unflat


def column_squares(x: Tensor) -> Tensor:
    """Sum of squares of every column, float32."""
    if x.device.type == "cpu":
        # there the norm copies as well, and is ten times as slow
        return x.float().square().sum(0)
    return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()


def _factors(grad: Tensor, x: Tensor, curvature: float, grad_squares: Tensor | None) -> tuple[Tensor, Tensor]:
    """[rows] and [K], whose outer product is the second derivative of the loss in the masked weight."""
    return curvature * (column_squares(grad) if grad_squares is None else grad_squares), column_squares(x)


def _first_derivative(grad: Tensor, x: Tensor, weight_grad: Tensor | None) -> Tensor:
    """Of the loss in the masked weight [rows, K]; into ``weight_grad`` as well."""
    first = grad.t() @ x
    if weight_grad is not None:
        weight_grad.copy_(first)
    return first


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [tokens, rows].T @ x [tokens, K], float32; where no kernel runs it was rounded to the operands' dtype."""
    with without_autocast(grad):
        if uses_kernels(grad):
            return kernels("straight_through").weight_gradient(grad, x, None)
        return _first_derivative(grad, x, None).float()


@torch.library.custom_op(
    f"{NAMESPACE}::straight_through_grad",
    mutates_args=("weight_grad",),
    schema=f"(Tensor grad, Tensor x, Tensor weight, float curvature, Tensor(a!)? weight_grad, Tensor? grad_squares, "
    f"{MASK}) -> Tensor",
)
def _straight_through_grad(grad, x, weight, curvature, weight_grad, grad_squares, *mask):
    mask = unflat(*mask)
    with without_autocast(grad):
        factors = _factors(grad, x, curvature, grad_squares)
        if uses_kernels(grad):
            return kernels("straight_through").straight_through_grad(grad, x, weight, *factors, mask, weight_grad)
        slope_of = (weight, _first_derivative(grad, x, weight_grad), torch.outer(*factors), codes_under(mask))
        return run_reference("straight_through_grad", *slope_of, m=mask.m)


@_straight_through_grad.register_fake
def _(grad, x, weight, *_):
    return torch.empty_like(weight, dtype=torch.float32)


def straight_through_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    curvature: float,
    mask: MaskSource,
    weight_grad: Tensor | None = None,
    grad_squares: Tensor | None = None,
) -> Tensor:
    """Slope of a loss in the mask, less its mean over every group, float32 [rows, K]: ``reference.mask_slope``.

    G = grad [tokens, rows].T @ x [tokens, K]; F = curvature * (sum of grad^2 over tokens) (sum of x^2 over tokens),
    which for a loss that is a mean over the tokens is its Fisher information, with tokens, rows and columns taken
    as independent (K-FAC; Martens and Grosse 2015, arXiv 1503.05671). ``weight_grad`` float32 [rows, K] becomes G, of
    kept and dropped weights. ``grad_squares`` float32 [rows] takes the place of the sum of grad^2, where another
    gradient than this one tells the curvature.
    """
    return _straight_through_grad(grad, x, weight, curvature, weight_grad, grad_squares, *flat(mask.known))


def mask_slope(weight: Tensor, first: Tensor, second: Tensor, codes: Tensor, m: int) -> Tensor:
    """``straight_through_grad`` where both derivatives in the masked weight are known, each float32 [rows, K]."""
    return run_reference("straight_through_grad", weight, first, second, codes, m=m)


@torch.library.custom_op(
    f"{NAMESPACE}::straight_through_update_",
    mutates_args=("weight_grad", "source"),
    schema=f"(Tensor grad, Tensor x, Tensor weight, float curvature, Tensor rate, float max_update, "
    f"Tensor(a!)? weight_grad, Tensor? grad_squares, {MASK.replace('Tensor source', 'Tensor(b!) source')}) -> Tensor",
)
def _straight_through_update_(grad, x, weight, curvature, rate, max_update, weight_grad, grad_squares, *mask):
    mask = unflat(*mask)
    if mask.kind != "drawn":
        raise ValueError(f'kind: expected "drawn", whose source are logits, got {mask.kind!r}')
    with without_autocast(grad):
        factors = _factors(grad, x, curvature, grad_squares)
        if uses_kernels(grad):
            update_ = kernels("straight_through").straight_through_update_
            return update_(grad, x, weight, *factors, rate, max_update, mask, weight_grad)
        slope_of = (weight, _first_derivative(grad, x, weight_grad), torch.outer(*factors), codes_under(mask))
        step = (rate, mask.counter, scalar(max_update, weight))
        return run_reference("straight_through_update_", mask.tensor, *slope_of, *step, m=mask.m)


@_straight_through_update_.register_fake
def _(grad, *_):
    return grad.new_empty((), dtype=torch.float32)


def straight_through_update_(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    curvature: float,
    rate: Tensor,
    max_update: float,
    mask: MaskSource,
    weight_grad: Tensor | None = None,
    grad_squares: Tensor | None = None,
) -> Tensor:
    """``descend_`` by ``straight_through_grad``, which on a GPU never exists as a whole, of the drawn mask's logits."""
    more = weight_grad, grad_squares
    return _straight_through_update_(grad, x, weight, curvature, rate, max_update, *more, *flat(mask))


@torch.library.custom_op(
    f"{NAMESPACE}::descend_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, Tensor gradient, Tensor rate, float max_update, int m, {COUNTER}) -> Tensor",
)
def _descend_(logits, gradient, rate, max_update, m, *counter):
    counter = Counter(*counter)
    if uses_kernels(logits):
        return kernels("straight_through").descend_(logits, gradient, rate, max_update, m, counter)
    return run_reference("descend_", logits, gradient, rate, counter, scalar(max_update, logits), m=m)


@_descend_.register_fake
def _(logits, *_):
    return logits.new_empty((), dtype=torch.float32)


def descend_(logits: Tensor, gradient: Tensor, rate: Tensor, max_update: float, m: int, counter: Counter) -> Tensor:
    """logits [rows, K] -= rate * gradient within +-max_update; gives the mean square of the gradient, 0-dim float32."""
    return _descend_(logits, gradient, rate, max_update, m, *counter)


@torch.library.custom_op(f"{NAMESPACE}::adamw_", mutates_args=("weight", "master", "first", "second"))
def adamw_(
    weight: Tensor,
    master: Tensor,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    codes: Tensor,
    scalars: Tensor,
    m: int,
) -> None:
    """A step of AdamW in place, where the codes [rows, K / M] keep a weight.

    ``master``, the moments ``first`` and ``second`` and the gradient are float32 [rows, K]; ``weight`` is rounded from
    master. ``scalars`` are those of ``reference.adamw_scalars``.
    """
    if uses_kernels(master):
        kernels("adamw_and_swaps").adamw_(weight, master, first, second, gradient, codes, scalars, m)
    else:
        run_reference("adamw_", weight, master, first, second, gradient, codes, scalars, m=m)


@adamw_.register_fake
def _(*_):
    return None
