"""SparseGPT: masks and weights in one pass over the layers (Frantar and Alistarh 2023, arXiv 2301.00774).

With H = X^T X of a layer's inputs, the columns are processed from left to right. Let F be the part of H from column i
on. Dropping w_i costs w_i^2 / [F^-1]_ii, and the weights to the right compensate by -w_i / [F^-1]_ii [F^-1]_i. Row i of
the upper Cholesky factor U of H^-1 gives both: [F^-1]_i = U_ii U_i. The N:M mask of a group is chosen by this cost at
its first column, when its weights have compensated for the columns before. Columns beyond a block of 128 are updated
together, at the end of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..functional.masks import expand_mask, top_n_mask
from ..ops.pattern import NMPattern
from .calibration import LayerMasks, Moments, calls_of, layer_by_layer
from .reconstruction import Reconstruction
from .refit import DAMPING

BLOCK = 128


class WeightsOfBlock(LayerMasks):
    """New weights of the layers of one block, which may run again; those of earlier blocks are freed."""

    def enter_block(self, block: nn.Module) -> None:
        self.weights.clear()


def inverse_factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor U [K, K] of the inverse of a damped Gram matrix, U^T U = H^-1; ValueError if there is none.

    ``gram``: X^T X [K, K], float32 or float64. A column without input counts as orthogonal to all others, of norm 1.
    """
    gram = gram.clone()
    gram.diagonal().add_((gram.diagonal() == 0).to(gram.dtype))
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or not upper.diagonal().isfinite().all():
        raise ValueError("calibration: expected inputs whose Gram matrix can be inverted, got others")
    return upper


def column_by_column(w: Tensor, upper: Tensor, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Give each column of w [out, K] a new value, in place, from left to right; those to the right compensate.

    Args:
        upper: [K, K], see ``inverse_factor``.
        choose: gets the index of a column, and w, of which columns up to the end of the block have compensated for all
            before; returns the column's new value [out].
    """
    k = w.shape[1]
    for begin in range(0, k, BLOCK):
        end = min(begin + BLOCK, k)
        errors = torch.zeros_like(w[:, begin:end])
        for i in range(begin, end):
            value = choose(i, w)
            errors[:, i - begin] = (w[:, i] - value) / upper[i, i]
            w[:, i:end] -= errors[:, i - begin, None] * upper[i, i:end]
            # exactly
            w[:, i] = value
        w[:, end:] -= errors @ upper[begin:end, end:]
    return w


def prune_layer(weight: Tensor, unused: Tensor, upper: Tensor, pattern: NMPattern) -> tuple[Tensor, Tensor]:
    """(group codes [out, K / M], weight under its mask [out, K] in the dtype of ``upper``) of a weight [out, K].

    Args:
        unused: bool [K], true for columns without input; their weights count as 0.
        upper: [K, K], see ``inverse_factor``.
    """
    codes = []
    kept = None
    w = weight.detach().to(upper.dtype).clone()
    w[:, unused] = 0.0

    def choose(i: int, w: Tensor) -> Tensor:
        nonlocal kept
        if i % pattern.m == 0:
            group = slice(i, i + pattern.m)
            # the root of the cost has the same order; squares may exceed the range of float32
            codes.append(top_n_mask((w[:, group] / upper.diagonal()[group]).abs().float(), pattern))
            kept = expand_mask(codes[-1], pattern)
        return torch.where(kept[:, i % pattern.m], w[:, i], 0.0)

    w = column_by_column(w, upper, choose)
    return torch.cat(codes, 1), w


@torch.no_grad()
def sparsegpt(model: nn.Module, layers: Mapping[str, nn.Module], pattern: str | NMPattern,
              calibration: Iterable, *, keep_weights: bool = False,
              progress: Callable[[int, int], None] | None = None) -> Reconstruction:  # fmt: skip
    """Compute masks of all layers; the inputs of each come from the pruned and compensated layers before.

    In a chain of blocks only the inputs of one block, its new weights and one Gram matrix are in memory; with
    ``keep_weights`` all new weights. Layers with the same input tensor share its Gram matrix. Sums are float32.

    Args:
        model: the model of ``layers``; its weights stay unchanged.
        layers, pattern: nn.Linear or similar modules, by name; "N:M" or NMPattern.
        calibration: batches for the model, each a tensor, a tuple or a mapping.
        keep_weights: whether to return the new weights as well, with exact zeros, in the dtype of the weights. Without
            them the masks apply to the model's own weights.
        progress: called with (layers done, layers in all) before the first layer and after each.

    Warns:
        UserWarning: names experts without a token, which get masks by magnitude.

    Raises:
        TypeError, ValueError: an argument is not as above, there is no batch, another layer gets no input, or inputs
            are not finite.
    """
    pattern = NMPattern(pattern)
    calls = calls_of(calibration)
    codes: dict[str, Tensor] = {}
    masks = (LayerMasks if keep_weights else WeightsOfBlock)(layers, {}, {})

    def visit(names: Sequence[str], moments: Moments) -> Iterator[None]:
        gram = moments.gram
        upper = inverse_factor(gram)
        for name in names:
            weight = layers[name].weight.detach()
            codes[name], pruned = prune_layer(weight, gram.diagonal() == 0, upper, pattern)
            masks.weights[name] = pruned.to(weight.dtype)
            yield

    for name in layer_by_layer(model, layers, calls, masks, visit, "get masks by magnitude", progress):
        weight = layers[name].weight.detach()
        codes[name] = top_n_mask(weight.abs(), pattern)
        if keep_weights:
            masks.weights[name] = torch.where(expand_mask(codes[name], pattern), weight, 0.0)
    return Reconstruction({name: codes[name] for name in layers}, masks.weights if keep_weights else {})
