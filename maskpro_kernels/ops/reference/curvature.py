"""The second derivative of a loss in the weights of a layer, by K-FAC's factors of outputs and inputs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

# A row has a gradient if its sum of squares is above this fraction of the mean: the query of a first token has none but
# rounding errors
LEAST_SQUARE = 1e-10

# Columns of x copied at a time: a copy of all of x may be as large as the weight
COLUMNS = 4096

_norms = partial(torch.linalg.vector_norm, dtype=torch.float32)


def _squares(x: Tensor) -> Tensor:
    """Squares of a matrix, float32: on a CPU torch's norms of columns take ten times as long."""
    return x.square() if x.dtype == torch.float32 else x.float().square_()


def gradient_squares(grad: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of squares of each column, float32; mask of the rows that have a gradient) of grad [tokens, rows]."""
    if grad.is_cpu:
        squares = _squares(grad)
        of_columns = squares.sum(0)
        of_rows = squares.sum(1)
    else:
        of_columns = _norms(grad, dim=0).square()
        of_rows = _norms(grad, dim=1).square()
    # a row that is not finite has a gradient
    least = LEAST_SQUARE * of_rows.nan_to_num(0.0, 0.0).mean()
    return of_columns, ~(of_rows <= least)


def token_squares(grad: Tensor, tokens: Tensor | None) -> Tensor:
    """Sum over rows of (T * grad)^2 [rows], followed by R [1]; operands as for ``curvature_factors``."""
    squares, used = gradient_squares(grad)
    count = used.sum(dtype=torch.float32)
    tokens = count if tokens is None else tokens.to(grad.device, non_blocking=not grad.is_cpu)
    return torch.cat([tokens.square() * squares, count[None]])


def curvature_factors(
    grad: Tensor, x: Tensor, curvature: float, tokens: Tensor | None, row_squares: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Factors [rows] and [K]; their outer product is F, the second derivative of the loss in the masked weight.

    F = curvature * T / R * (sum of grad^2) (sum of x^2) over the R rows of grad [tokens, rows] and x [tokens, K] that
    have a gradient. For a loss that is a mean over T tokens, F is the Fisher information if tokens, rows and columns
    are independent (K-FAC; Martens and Grosse 2015, arXiv 1503.05671). T is ``tokens``, 0-dim float32; None: R.
    ``row_squares`` float32 [rows] replaces T^2 / R * (sum of grad^2), if another gradient gives the curvature.
    """
    of_outputs, used = gradient_squares(grad)
    if row_squares is not None:
        # a divergence has no gradient at its minimum, but a curvature
        used = used | ~used.any()
    count = used.sum(dtype=torch.float32).clamp(min=1)
    tokens = count if tokens is None else tokens
    first = tokens / count * of_outputs if row_squares is None else row_squares / tokens
    unused_rows = (~used).nonzero().flatten()
    # few rows: cheaper than a masked copy of x
    pieces = [_squares(piece).index_fill_(0, unused_rows, 0.0).sum(0) for piece in x.split(COLUMNS, 1)]
    return curvature * first, torch.cat(pieces)
