"""Relaxed top-k: one logit a weight, and masks drawn by a relaxation of sampling without replacement.

Xie and Ermon 2019 (arXiv 1901.10517): keys are logits plus Gumbel noise. N times in turn p = softmax(key / t) is added
to the relaxed mask, and log(1 - p) to the keys, so that what was taken is not taken again. As t falls to 0 that becomes
the draw of N of the M weights without replacement. The relaxed masks of a group add up to N.
"""

from __future__ import annotations

import torch
from relaxed import RelaxedMask, gumbel
from torch import Tensor

from maskpro_kernels.functional.masks import expand_mask, top_n_mask
from maskpro_kernels.learn.estimator import check_float
from maskpro_kernels.modules import MaskedLinear


def relaxed_top_k(keys: Tensor, n: int, temperature: float) -> Tensor:
    """The relaxed masks [M, ...] of keys [M, ...]: not below 0, N in sum. Warm ones may take a weight more than once.

    The weights of a group come first, as a CPU takes a softmax over a short last dimension one by one.
    """
    tiny = torch.finfo(keys.dtype).tiny
    mask = torch.zeros_like(keys)
    for turn in range(n):
        p = (keys / temperature).softmax(0)
        mask = mask + p
        if turn + 1 < n:
            keys = keys + (1.0 - p).clamp_min(tiny).log()
    return mask


class RelaxedTopK(RelaxedMask):
    """Logits by AdamW on the loss under relaxed masks; the temperature falls linearly over the steps.

    Args:
        steps: how many there will be.
        lr: of AdamW; falls linearly to 0.
        prior: initial logit of a weight that the initial mask keeps over one that it drops.
        warmest, coldest: temperature of the first and of the last step.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    name = "relaxed-top-k"
    options = {"lr": 0.1, "prior": 3.0, "warmest": 1.0, "coldest": 0.1}

    def __init__(self, steps: int, lr: float = 0.1, prior: float = 3.0, warmest: float = 1.0, coldest: float = 0.1):
        super().__init__(steps, lr)
        check_float("prior", prior, 0.0)
        check_float("warmest", warmest, 0.0, strict=True)
        check_float("coldest", coldest, 0.0, warmest, strict=True)
        self.prior = float(prior)
        self.warmest = float(warmest)
        self.coldest = float(coldest)

    def start(self, layer: MaskedLinear) -> Tensor:
        mask = expand_mask(top_n_mask(layer.logits_on_device(), layer.pattern), layer.pattern)
        return mask.float() * self.prior

    def lr_at(self, step: int) -> float:
        return self.lr * (1.0 - step / self.steps)

    def temperature(self, step: int) -> float:
        return self.warmest + (self.coldest - self.warmest) * self.progress(step)

    def weight(self, layer: MaskedLinear, learned: Tensor, step: int, noise: torch.Generator) -> Tensor:
        keys = (learned + gumbel(learned.shape, noise)).view(-1, layer.pattern.m).T.contiguous()
        relaxed = relaxed_top_k(keys, layer.pattern.n, self.temperature(step))
        return relaxed.T.reshape(learned.shape) * layer.weight

    def codes(self, layer: MaskedLinear, learned: Tensor) -> Tensor:
        return top_n_mask(learned, layer.pattern)
