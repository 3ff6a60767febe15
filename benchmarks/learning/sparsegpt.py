"""SparseGPT: masks and weights in one pass over the layers (Frantar and Alistarh 2023, arXiv 2301.00774).

With H = X^T X of a layer's inputs, columns go from left to right. Dropping w_i costs w_i^2 / [F^-1]_ii and moves the
weights to the right by -w_i / [F^-1]_ii [F^-1]_i, F being the rest of H from column i on: row i of the upper Cholesky
factor U of H^-1 holds both, [F^-1]_i = U_ii U_i. The N:M mask of a group is chosen by that cost as its first column
comes up. Updates reach the columns beyond a block of 128 together, at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from maskpro_kernels.functional.masks import expand_mask, top_n_mask
from maskpro_kernels.modules import evaluating
from maskpro_kernels.pattern import NMPattern
from maskpro_kernels.pruning.blocks import calls_by_block, layers_in_order
from maskpro_kernels.pruning.calibration import calls_of, gram_matrices

BLOCK = 128


def prune_layer(weight: Tensor, gram: Tensor, pattern: str | NMPattern, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """(weight under its mask, of the dtype of ``gram``; group codes [out, K / M]) of a weight [out, K].

    Args:
        weight: [out, K].
        gram: X^T X [K, K], float32 or float64.
        pattern: "N:M" or NMPattern.
        damping: what is added to the diagonal, as a share of its mean.
    """
    pattern, k = NMPattern(pattern), weight.shape[1]
    w = weight.detach().to(gram.dtype).clone()
    gram = gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal().add_(dead.to(gram.dtype))
    w[:, dead] = 0.0
    gram.diagonal().add_(damping * gram.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    codes = []
    for left in range(0, k, BLOCK):
        right = min(left + BLOCK, k)
        errors = torch.zeros_like(w[:, left:right])
        for i in range(left, right):
            if i % pattern.m == 0:
                group = slice(i, i + pattern.m)
                codes.append(top_n_mask((w[:, group] / upper.diagonal()[group]).square().float(), pattern))
                kept = expand_mask(codes[-1], pattern)
            dropped = torch.where(kept[:, i % pattern.m], 0.0, w[:, i])
            errors[:, i - left] = dropped / upper[i, i]
            w[:, i:right] -= errors[:, i - left, None] * upper[i, i:right]
            # exactly 0
            w[:, i] = torch.where(kept[:, i % pattern.m], w[:, i], 0.0)
        w[:, right:] -= errors @ upper[left:right, right:]
    return w, torch.cat(codes, 1)


@torch.no_grad()
def sparsegpt(
    model: nn.Module, layers: Mapping[str, nn.Linear], pattern: str | NMPattern, calibration: Iterable
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights under their masks, group codes) by layer, each on what the layers before it give once they are pruned.

    Args:
        model: holds ``layers``; its weights are afterwards as they were.
        layers: by name.
        pattern: "N:M" or NMPattern.
        calibration: batches for the model, each a tensor, a tuple or a mapping.

    Raises:
        TypeError, ValueError: ``calibration`` is no iterable of batches or holds none, a layer sees none of them, or a
            language model keeps keys and values, to which a block that runs again would append.
    """
    if getattr(getattr(model, "config", None), "use_cache", False):
        raise ValueError("model: expected config.use_cache to be False, got True")
    dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    weights, codes = {}, {}
    try:
        with evaluating(model):
            for module, calls in calls_by_block(model, layers, calls_of(calibration)):
                stages = layers_in_order(module, calls, layers)
                for names, once in ((names, stage.once) for stage in stages for names in stage.groups):
                    (gram,) = gram_matrices(module, calls, [layers[names[0]]], stop=once)
                    for name in names:
                        weight = layers[name].weight
                        found, codes[name] = prune_layer(weight, gram.to(weight.device), pattern)
                        weights[name] = found.to(weight.dtype)
                        weight.copy_(weights[name])
    finally:
        for name, layer in layers.items():
            layer.weight.copy_(dense[name])
    return weights, codes
