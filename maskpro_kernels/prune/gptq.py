"""GPTQ under a mask: int4 values and scales with which the outputs of layers change least.

For the inputs X of a layer, H = X^T X, a row w of its masked weight and a rounded row v, the squared error of the
outputs is E(v) = (w - v) H (w - v)^T. Three steps lower it, for each row alone:

1. GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded from left to right, and the columns to the right
   compensate, see ``column_by_column``. A dropped column passes its share on. The scale of a block of values is chosen
   at its first column, by the error of each value weighted by 1 / [F^-1]_ii.
2. With fixed integers, E is quadratic in the scales of the row. Its minimum solves one equation a scale.
3. With fixed scales, each integer in turn gets its best value, given all others.

Steps 2 and 3 alternate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..functional.masks import expand_mask
from ..ops.pattern import NMPattern, bitmask_of
from ..packed import INT4, PackedNM, least_squares_scales, nearest_integers, packed_int4
from .calibration import Moments, calls_of, layer_by_layer
from .refit import DAMPING, PIECE
from .sparsegpt import BLOCK, WeightsOfBlock, column_by_column, inverse_factor

# Rounds of scales and integers; further ones change little
ROUNDS = 3


@torch.no_grad()
def gptq(model: nn.Module, layers: Mapping[str, nn.Module], codes: Mapping[str, Tensor],
         patterns: Mapping[str, NMPattern], calibration: Iterable, group: int,
         progress: Callable[[int, int], None] | None = None) -> dict[str, PackedNM]:  # fmt: skip
    """Round the kept values of all layers to int4; the inputs of each come from the rounded layers before.

    Experts without a token are left out, with a warning. Sums are float32. In memory are one block's inputs, one
    Gram matrix, and the result.

    Args:
        model: the model of ``layers``, which does not change.
        layers: modules with a dense weight, by name; codes [out, K / M] and patterns are those of their masks.
        calibration: batches for the model, each a tensor, a tuple or a mapping.
        group: kept values of a row that share a scale.
        progress: called with (layers done, layers in all) before the first layer and after each.

    Raises:
        TypeError, ValueError: ``calibration`` is not as above, there is no batch, another layer gets no input, or
            inputs are not finite.
    """
    masks = WeightsOfBlock(layers, codes, patterns)
    rounded = {}

    def visit(names: Sequence[str], moments: Moments) -> Iterator[None]:
        gram = moments.gram
        upper = inverse_factor(gram)
        # without any input each error counts the same
        gram.diagonal().add_(DAMPING * gram.diagonal().mean() or 1.0)
        for name in names:
            weight = layers[name].weight.detach()
            pattern = patterns[name]
            kept = expand_mask(codes[name], pattern)
            rows = max(PIECE // weight.shape[1], 1)
            pieces = [
                _round(piece.float(), kept_piece, pattern, gram, upper, group, weight.dtype)
                for piece, kept_piece in zip(weight.split(rows), kept.split(rows), strict=True)
            ]
            integers, scales, masks.weights[name] = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
            values = packed_int4(integers[kept].view(len(kept), -1).to(torch.int8))
            rounded[name] = PackedNM(values, bitmask_of(codes[name], pattern.m), pattern, scales.to(weight.dtype))
            masks.weights[name] = masks.weights[name].to(weight.dtype)
            yield

    layer_by_layer(model, layers, calls_of(calibration), masks, visit, "are rounded without inputs", progress)
    return rounded


def _round(weight: Tensor, kept: Tensor, pattern: NMPattern, gram: Tensor, upper: Tensor, group: int,
           dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(integers, 0 where dropped; scales [rows, blocks]; their product) of rows of a weight; all float32.

    Args:
        weight: float32 [rows, K], on ``kept``, bool [rows, K].
        gram, upper: H and the factor of its inverse, see ``inverse_factor``.
        dtype: whose numbers the scales are.
    """
    rows, k = weight.shape
    n = pattern.n
    m = pattern.m
    weight = torch.where(kept, weight, 0.0)
    count = k // m * n
    columns = kept.nonzero()[:, 1].view(rows, count)
    # block of each column; of a dropped one, that of the kept one before
    block = (kept.cumsum(1) - 1).clamp_(min=0) // group
    blocks = -(-count // group)
    # columns in which a block has values in some row
    spans = []
    for index in range(blocks):
        begin = index * group // n * m
        end = min(-(-(index + 1) * group // n) * m, k)
        spans.append(slice(begin, end))
    begins = {span.start: index for index, span in enumerate(spans)}
    scales = weight.new_zeros(rows, blocks)
    worth = upper.diagonal().pow(-2)

    def nearest(value: Tensor, scale: Tensor) -> Tensor:
        return nearest_integers(value.unsqueeze(-1), scale, INT4).squeeze(-1).float()

    def choose(i: int, w: Tensor) -> Tensor:
        if i in begins:
            block_columns = columns[:, begins[i] * group : (begins[i] + 1) * group]
            scales[:, begins[i]] = least_squares_scales(w.gather(1, block_columns), dtype, worth[block_columns]).float()
        scale = scales.gather(1, block[:, i : i + 1]).squeeze(1)
        return torch.where(kept[:, i], nearest(w[:, i], scale) * scale, 0.0)

    product = column_by_column(weight.clone(), upper, choose)
    integers = torch.where(kept, nearest(product, scales.gather(1, block)), 0.0)
    target = weight @ gram
    for rounds_done in range(ROUNDS + 1):
        fitted = _fit_scales(target, integers, block, spans, gram).to(dtype).float()
        scales = torch.where(fitted.isfinite(), fitted, scales)
        if rounds_done < ROUNDS:
            integers = _descend(weight, integers, scales.gather(1, block), kept, gram, nearest)
    return integers, scales, integers * scales.gather(1, block)


def _fit_scales(target: Tensor, integers: Tensor, block: Tensor, spans: Sequence[slice], gram: Tensor) -> Tensor:
    """Scales [rows, blocks] with the least E, which solve sum_b (q_a H q_b) s_b = q_a H w for each block a of a row.

    ``target``: w H [rows, K]. ``block``: the block of each column.
    """
    products = []
    for index, span in enumerate(spans):
        part = torch.where(block[:, span] == index, integers[:, span], 0.0)
        products.append(_by_block(part @ gram[span] * integers, block, len(spans)))
    matrix = torch.stack(products, 1)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    # a block of zeros has an equation too
    diagonal += 1e-4 * diagonal.mean(1, keepdim=True) + (diagonal == 0)
    return torch.linalg.solve(matrix, _by_block(target * integers, block, len(spans)))


def _by_block(values: Tensor, block: Tensor, blocks: int) -> Tensor:
    """Sums [rows, blocks] of values [rows, K]."""
    return values.new_zeros(len(values), blocks).scatter_add_(1, block, values)


def _descend(weight: Tensor, integers: Tensor, scale: Tensor, kept: Tensor, gram: Tensor,
             nearest: Callable[[Tensor, Tensor], Tensor]) -> Tensor:  # fmt: skip
    """Set each integer in turn to its best value given all others: that of v_i + [(w - v) H]_i / H_ii.

    ``scale`` [rows, K] is that of each column. Columns beyond a block are updated together, as in ``column_by_column``.
    """
    product = integers * scale
    k = weight.shape[1]
    rest = (weight - product) @ gram
    for begin in range(0, k, BLOCK):
        end = min(begin + BLOCK, k)
        moved = torch.zeros_like(product[:, begin:end])
        for i in range(begin, end):
            value = nearest(product[:, i] + rest[:, i] / gram[i, i], scale[:, i]) * scale[:, i]
            value = torch.where(kept[:, i], value, 0.0)
            moved[:, i - begin] = value - product[:, i]
            product[:, i] = value
            rest[:, i:end].addr_(moved[:, i - begin], gram[i, i:end], alpha=-1)
        rest[:, end:] -= moved @ gram[begin:end, end:]
    return torch.where(kept, nearest(product, scale), 0.0)
