"""Products by compiled kernels, which an emulator executes, on chosen tiles, beside torch and float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from helpers.bits import assert_same_bits
from helpers.compiled import Matrix, by_both, unmoved
from helpers.packed_codes import CODES
from helpers.products import normal, within_budget
from maskpro_kernels import ops
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.pattern import bitmask_of, metadata_of
from maskpro_kernels.ops.triton import masked_gemm, packed_gemm, slopes, sparse_mma
from maskpro_kernels.ops.triton.tiles import ONE_PASS_TOKENS, Rows, Tiles, nonempty_parts
from maskpro_kernels.packed import quantized

CURVATURE = 0.7
PRODUCTS = ("masked_linear", "masked_linear_input_grad", "masked_linear_weight_grad", "straight_through")
# What follows a product of torch's, and of how many tokens that is: its tiles have none
STEP, TOKENS_BEFORE_STEP = "straight_through_step", 125


@dataclass(frozen=True)
class Product:
    """A product on tiles, of sizes that by default no tile divides.

    Attributes:
        kernel: of PRODUCTS, or STEP.
        tile: of the table.
        operand: dtype of x and its gradient, and of the weight where ``weight`` names no other.
        aligned: whether rows and groups are multiples of 16, as Triton compiles for, and more than one tile.
        one_hot: whether one operand holds a single one in each row, so that the product is exact.
        log_prob: whether the log-probability comes along.
        update: whether the logits step, rather than that their slope is written.
        spread: of the logits, see ``Matrix``.
        parts: of the dimension that is summed over, where programs share it.
    """

    kernel: str
    tile: Tiles
    n: int = 2
    m: int = 4
    operand: torch.dtype = torch.bfloat16
    weight: torch.dtype | None = None
    logits: torch.dtype = torch.float32
    kind: str = "drawn"
    aligned: bool = False
    one_hot: bool = False
    log_prob: bool = False
    update: bool = False
    spread: str = "open"
    parts: int = 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(tokens, rows, groups): more than one tile of each, and four of what the kernel loops over."""
        tile = self.tile
        across, tokens, rows = tile.k // self.m, tile.tokens, tile.out
        if self.kernel == "masked_linear":
            sizes = 2 * tokens - 3, rows + 5, 4 * across + 3
        elif self.kernel == "masked_linear_input_grad":
            # it takes rows in multiples of 16 alone
            sizes = 2 * tokens - 3, 4 * rows + 16, across + 3
        elif self.kernel == STEP:
            sizes = TOKENS_BEFORE_STEP, rows + 5, across + 3
        else:
            sizes = 4 * tokens - 3, rows + 5, across + 3
        if self.aligned:
            sizes = tuple(-(-size // 16) * 16 for size in sizes)
        return min(sizes[0], 128), *sizes[1:]

    @property
    def matrix(self) -> Matrix:
        _, rows, groups = self.sizes
        return Matrix(self.n, self.m, self.logits, rows, groups, spread=self.spread)

    def operands(self, columns: int, seed: int) -> Tensor:
        tokens = self.sizes[0]
        if self.one_hot:
            # each column once: a sum of two would be rounded
            order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
            return torch.eye(max(tokens, columns))[:tokens, :columns][:, order].to(self.operand)
        return normal(tokens, columns, seed=seed, dtype=self.operand)

    def assert_right(self, moved=unmoved) -> None:
        with pytest.MonkeyPatch.context() as patched:
            for module in (masked_gemm, slopes):
                patched.setattr(module, "tiles_for", lambda *_: self.tile)
            patched.setattr(masked_gemm, "parts_for", parts_at_most(self.parts))
            patched.setattr(slopes, "fused", lambda *_: self.kernel != STEP)
            # the reference's factors, so that slopes have its bits
            patched.setattr(slopes, "curvature_factors", reference.curvature_factors)
            # on a B200 tiles of many tokens take given masks alone, and draw where a test is about them
            patched.setattr(masked_gemm, "one_pass_tokens", lambda *_: ONE_PASS_TOKENS)
            CHECKS[self.kernel](self, moved)


def parts_at_most(parts: int):
    """``parts_for`` that splits each sum, whatever its size."""
    return lambda tile, blocks, steps, *_: nonempty_parts(steps, parts)


def masked(of: Product, weight: Tensor) -> Tensor:
    """The weight under the reference's mask."""
    matrix = of.matrix
    return reference.masked_weight(weight, matrix.source(of.kind))


def assert_product(of: Product, found: Tensor, by_torch: Tensor, exact: Tensor) -> None:
    """Exact of one-hot operands, else within the budget."""
    if of.one_hot:
        assert_same_bits(found + 0.0, by_torch + 0.0)
    within_budget(found, by_torch, exact)


def linear(of: Product, moved) -> None:
    _, rows, groups = of.sizes
    k, dtype = groups * of.m, of.weight or of.operand
    x, weight = of.operands(k, seed=1), normal(rows, k, seed=2, dtype=dtype)
    bias = None if of.one_hot else normal(rows, seed=3, dtype=dtype)
    source = of.matrix.source(of.kind)
    source = source._replace(tensor=moved(source.tensor))
    here = [None if tensor is None else moved(tensor) for tensor in (x, weight, bias)]
    (found, *total), (by_torch, *expected) = by_both(lambda: ops.masked_linear(*here, of.log_prob, source))
    exact = x.double() @ masked(of, weight.to(of.operand)).double().t()
    assert_product(of, found, by_torch, exact if bias is None else exact + bias.double())
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


def input_grad(of: Product, moved) -> None:
    _, rows, groups = of.sizes
    weight = normal(rows, groups * of.m, seed=2, dtype=of.weight or of.operand)
    grad, source = of.operands(rows, seed=4), of.matrix.source(of.kind)
    source = source._replace(tensor=moved(source.tensor))
    here = moved(grad), moved(weight)
    (found,), (by_torch,) = by_both(lambda: [ops.masked_linear_input_grad(*here, source)])
    assert_product(of, found, by_torch, grad.double() @ masked(of, weight.to(of.operand)).double())


def weight_grad(of: Product, moved) -> None:
    tokens, rows, groups = of.sizes
    grad, x = of.operands(rows, seed=4), normal(tokens, groups * of.m, seed=1, dtype=of.operand)
    source = of.matrix.source(of.kind)
    source = source._replace(tensor=moved(source.tensor))
    here = moved(grad), moved(x)
    (found,), (by_torch,) = by_both(lambda: [ops.masked_linear_weight_grad(*here, source)])
    assert_product(of, found, by_torch, masked(of, grad.double().t() @ x.double()))


def slope(of: Product, moved) -> None:
    """The slope and the gradient of the weight, or the step of the logits: bit for bit of one-hot operands."""
    tokens, rows, groups = of.sizes
    k = groups * of.m
    grad, x = of.operands(rows, seed=4), normal(tokens, k, seed=1, dtype=of.operand)
    weight, matrix = normal(rows, k, seed=2, dtype=of.weight or of.operand), of.matrix
    here = [moved(tensor) for tensor in (grad, x, weight)]

    def call():
        of_weight = moved(torch.zeros(rows, k))
        if not of.update:
            source = matrix.source(of.kind)
            source = source._replace(tensor=moved(source.tensor))
            return ops.straight_through_grad(*here, CURVATURE, source, of_weight), of_weight
        logits = moved(matrix.logits.clone())
        step = torch.tensor(0.4), 2.0, matrix.source(logits=logits)
        return logits, of_weight, ops.straight_through_update_(*here, CURVATURE, *step, of_weight)

    found, expected = by_both(call)
    if of.one_hot:
        assert_same_bits([part + 0.0 for part in found[:2]], [part + 0.0 for part in expected[:2]])
    within_budget(found[1], expected[1], grad.double().t() @ x.double())
    for one, other in zip(found, expected, strict=True):
        if one.dim() == 0 or not of.update:
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))


CHECKS = dict(zip((*PRODUCTS, STEP), (linear, input_grad, weight_grad, slope, slope), strict=True))


@dataclass(frozen=True)
class PackedProduct:
    """A product with a packed weight: of one token on Rows, of several on Tiles.

    Attributes:
        k: columns of the weight; by default of a size that no block of chunks divides, with ``aligned`` of two blocks.
    """

    config: Rows | Tiles
    n: int = 2
    m: int = 4
    operand: torch.dtype = torch.bfloat16
    values: str = "keep"
    aligned: bool = False
    one_hot: bool = False
    parts: int = 1
    k: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(tokens, rows, chunks)."""
        tokens, rows, chunks = self._sizes_of_blocks
        if self.k is not None:
            chunks = self.k // packed_gemm.chunk_length(self.n, self.m)
        return tokens, rows, chunks

    @property
    def _sizes_of_blocks(self) -> tuple[int, int, int]:
        config = self.config
        if isinstance(config, Rows):
            if not self.aligned:
                return 1, 2 * config.rows + 1, config.block + 5
            # two steps of a thread
            return 1, 16, 2 * config.block * (4 if self.values == "int4" else 1)
        chunks = config.k // packed_gemm.chunk_length(self.n, self.m)
        if self.aligned:
            return config.tokens, -(-config.out // 16) * 16, -(-2 * chunks // 16) * 16
        return config.tokens - 3, config.out + 5, 2 * chunks + 3

    def assert_right(self, moved=unmoved) -> None:
        tokens, rows, chunks = self.sizes
        k = chunks * packed_gemm.chunk_length(self.n, self.m)
        matrix = Matrix(self.n, self.m, rows=rows, groups=k // self.m, spread="open")
        bitmask = bitmask_of(matrix.codes, self.m)
        values, scales = normal(rows, k // self.m * self.n, seed=7, dtype=self.operand), None
        if self.values != "keep":
            values, scales = quantized(values, 128 if self.values == "int8" else 64, self.values)
        x = normal(tokens, k, seed=1, dtype=self.operand)
        if self.one_hot:
            x = torch.eye(k)[(torch.arange(tokens) * 37 + 7) % k].to(self.operand)
        bias = None if self.one_hot else normal(rows, seed=3, dtype=self.operand)
        with pytest.MonkeyPatch.context() as patched:
            for name in ("tiles_for", "rows_for"):
                patched.setattr(packed_gemm, name, lambda *_: self.config)
            patched.setattr(masked_gemm, "parts_for", parts_at_most(self.parts))
            operands = moved(x), values, bitmask, scales, None if bias is None else moved(bias), self.n, self.m
            (found,), (by_torch,) = by_both(lambda: [ops.nm_linear(*operands)])
        dense = reference.unpack_nm(
            values if scales is None else reference.dequantized(values, scales, self.operand),
            bitmask,
            n=self.n,
            m=self.m,
        )
        exact = x.double() @ dense.double().t()
        assert_product(self, found, by_torch, exact if bias is None else exact + bias.double())


@dataclass(frozen=True)
class SparseProduct:
    """A product with a 2:4 weight by ``mma.sp``, of whole numbers: sums are exact, and results are rounded once.

    Each of the eight groups of an instruction has each of the six codes.
    """

    tile: Tiles
    tokens: int
    rows: int
    k: int
    operand: torch.dtype = torch.bfloat16
    parts: int = 1
    biased: bool = True
    whole_numbers: bool = True

    def assert_right(self, moved=unmoved) -> None:
        group = torch.arange(self.k // 4)
        bitmask = bitmask_of(CODES[(torch.arange(self.rows)[:, None] + group + group // 8) % 6], 4)
        sizes = (self.rows, self.k // 2), (self.tokens, self.k), (self.rows,)
        values, x, bias = (normal(*size, seed=seed) for seed, size in enumerate(sizes, 7))
        if self.whole_numbers:
            values, x, bias = (4 * values).round(), (4 * x).round(), (16 * bias).round()
        values, x, bias = (tensor.to(self.operand) for tensor in (values, x, bias))
        operands = moved(x), values, metadata_of(bitmask), None, moved(bias) if self.biased else None, 2, 4
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sparse_mma, "tiles_for", lambda *_: self.tile)
            patched.setattr(masked_gemm, "parts_for", parts_at_most(self.parts))
            (found,), (by_torch,) = by_both(lambda: [ops.nm_linear(*operands)])
        exact = x.double() @ reference.unpack_nm(values, bitmask, n=2, m=4).double().t()
        exact = exact + bias.double() if self.biased else exact
        if self.whole_numbers:
            assert_same_bits(found + 0.0, exact.to(self.operand) + 0.0)
        else:
            within_budget(found, by_torch, exact)
