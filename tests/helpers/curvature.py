"""Curvatures by kernels and by the formula in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.products import normal
from maskpro_kernels import ops
from maskpro_kernels.ops.reference.curvature import LEAST_SQUARE

CURVATURE = 0.3


@dataclass(frozen=True)
class Curvature:
    """Operands of ``curvature_factors``.

    Attributes:
        given: "tokens", "row_squares", both, or neither: "".
        without: rows without a gradient: "none", "some", "all". There x is infinite.
        not_finite: value of an element of the gradient; 0: none.
    """

    tokens: int = 70
    rows: int = 37
    columns: int = 41
    dtype: torch.dtype = torch.bfloat16
    given: str = ""
    without: str = "some"
    not_finite: float = 0.0

    def operands(self) -> tuple[Tensor, Tensor, float, Tensor | None, Tensor | None]:
        grad = normal(self.tokens, self.rows, seed=1, dtype=self.dtype)
        x = normal(self.tokens, self.columns, seed=2, dtype=self.dtype)
        if self.without != "none":
            step = 3 if self.without == "some" else 1
            grad[::step] = 0.0
            # rounding errors
            grad[:: 2 * step] += 1e-7 if self.without == "some" else 0.0
            if "row_squares" not in self.given or self.without == "some":
                x[::step] = torch.inf
        if self.not_finite and self.tokens > 1 and self.rows:
            grad[1, self.rows // 2] = self.not_finite
        count = torch.tensor(5.0, device=grad.device) if "tokens" in self.given else None
        squares = normal(self.rows, seed=3).square() if "row_squares" in self.given else None
        return grad, x, CURVATURE, count, squares

    def exact(self) -> list[Tensor]:
        grad, x, curvature, count, row_squares = self.operands()
        squares = grad.double().square()
        of_rows = squares.sum(1)
        mean = of_rows[of_rows.isfinite()].sum() / max(len(grad), 1)
        used = ~(of_rows <= LEAST_SQUARE * mean)
        if row_squares is not None and not used.any():
            used = torch.ones_like(used)
        rows = used.sum().clamp(min=1)
        count = rows if count is None else count
        first = count / rows * squares.sum(0) if row_squares is None else row_squares.double() / count
        return [curvature * first, x[used].double().square().sum(0)]

    def assert_right(self, moved=lambda tensor: tensor) -> None:
        grad, x, curvature, count, squares = self.operands()
        squares = None if squares is None else moved(squares)
        found = ops.curvature_factors(moved(grad), moved(x), curvature, count, squares)
        for factor, exact in zip(found, self.exact(), strict=True):
            assert factor.dtype == torch.float32 and factor.is_contiguous()
            torch.testing.assert_close(factor, exact.float(), rtol=2e-6, atol=1e-30, equal_nan=True)
