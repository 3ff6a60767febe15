"""Refits of one layer: kept values, or one factor a row, that reconstruct the outputs of the dense weight.

For inputs X of a layer, H = X^T X, a row w of its dense weight and a row v with zeros where the mask drops, the squared
error of the outputs is E(v) = (w - v) H (w - v)^T. Over the kept set S it is least where H_SS v_S = (H w^T)_S.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Elements of the weight that are worked on at a time; rows do not depend on each other
PIECE = 1 << 24
# On the layers of a language model the error is within 1% of its least after 10 to 15
ITERATIONS = 30
# A row is done where an iteration lowers its error by less than this part of it
LEAST_FALL = 1e-3

# (dense weight [out, K], 1.0 where kept and 0.0 where dropped, Gram matrix [K, K]) -> refitted weight [out, K], whose
# dropped values have no part in the error; all float32
Fit = Callable[[Tensor, Tensor, Tensor], Tensor]


def check_damping(damping: float) -> None:
    """Raise TypeError or ValueError unless ``damping`` is a share that leaves a Gram matrix positive definite."""
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        raise TypeError(f"damping: expected a float, got {type(damping).__name__}")
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping: expected a finite float above 0, got {damping}")


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """d H d^T of every row d of ``difference`` [out, K]: float32 [out]."""
    return ((difference @ gram) * difference).sum(1)


def fit_weights(dense: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """The kept values of least error, by ``conjugate_gradients`` from those of the dense weight; the others stay."""
    fitted, _ = conjugate_gradients(dense, dense * kept, kept, gram)
    return torch.where(kept > 0, fitted, dense)


def fit_scales(dense: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """The dense weight with each row times its factor of least error, c = m H w^T / m H m^T.

    m is the row with zeros where dropped. The factor is one of the row's output, so dropped values get it too: learning
    may take them up again. Rows whose masked outputs are all zero keep the factor 1.
    """
    masked = dense * kept
    product = masked @ gram
    power = (product * masked).sum(1, keepdim=True)
    factor = (product * dense).sum(1, keepdim=True) / power
    return dense * torch.where(power > 0, factor, 1.0)


FITS: dict[str, Fit] = {"scales": fit_scales, "weights": fit_weights}


def conjugate_gradients(
    dense: Tensor,
    start: Tensor,
    kept: Tensor,
    gram: Tensor,
    iterations: int = ITERATIONS,
    least_fall: float = LEAST_FALL,
) -> tuple[Tensor, Tensor]:
    """Descend on E over the kept values of every row, by conjugate gradients with the diagonal of H as preconditioner.

    Hestenes and Stiefel 1952, with steps of each row's own, all rows in one product with H an iteration. An iteration
    with step a, preconditioned residual z and residual r lowers E by a (r z): so much is known without another product.

    Args:
        dense: w, float32 [out, K].
        start: zero where dropped, float32 [out, K].
        kept: 1.0 where kept and 0.0 where dropped, float32 [out, K].
        gram: H, symmetric positive definite float32 [K, K].
        iterations: at most.
        least_fall: a row ends where an iteration lowers its error by less than this part of it.

    Returns:
        (v, float32 [out, K]; (w - v) H, which is 0 where kept once E is at its least, float32 [out, K]).
    """
    fitted, preconditioner = start.clone(), kept / gram.diagonal()
    product = (dense - fitted) @ gram
    error = ((dense - fitted) * product).sum(1, keepdim=True)
    direction = product * preconditioner
    slope = (product * direction).sum(1, keepdim=True)
    going = slope > 0
    for _ in range(iterations):
        image = direction @ gram
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(going & (curvature > 0), slope / curvature, 0.0)
        fitted.addcmul_(direction, step)
        product.addcmul_(image, step, value=-1)
        fall = step * slope
        error -= fall
        going &= fall > least_fall * error
        if not going.any():
            break
        preconditioned = product * preconditioner
        before, slope = slope, (product * preconditioned).sum(1, keepdim=True)
        # of rows that are done neither changes any more
        direction.mul_(torch.where(going, slope / before, 0.0)).add_(preconditioned)
    return fitted, product


def refit_rows(weight: Tensor, kept: Tensor, gram: Tensor, fit: Fit) -> tuple[Tensor, Tensor]:
    """The weight refitted, rounded once; a row whose error would not fall stays as it is.

    Args:
        weight: dense, float32, bfloat16 or float16 [out, K].
        kept: bool [out, K].
        gram: symmetric positive definite float32 [K, K].
        fit: of ``FITS``.

    Returns:
        (weight [out, K] in its dtype; float32 [out, 2], the error of each row before and after).
    """
    rows = max(PIECE // weight.shape[1], 1)
    pieces = [_refit(w, k, gram, fit) for w, k in zip(weight.split(rows), kept.split(rows), strict=True)]
    return torch.cat([w for w, _ in pieces]), torch.cat([errors for _, errors in pieces])


def _refit(weight: Tensor, kept: Tensor, gram: Tensor, fit: Fit) -> tuple[Tensor, Tensor]:
    dense, mask = weight.float(), kept.float()
    fitted = fit(dense, mask, gram).to(weight.dtype)
    before = row_errors(dense - dense * mask, gram)
    after = row_errors(dense - fitted.float() * mask, gram)
    # false for what is not finite, too
    better = after < before
    errors = torch.stack([before, torch.where(better, after, before)], 1)
    return torch.where(better[:, None], fitted, weight), errors
