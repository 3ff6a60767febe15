"""MaskLLM: a distribution over all masks of a group, by Gumbel-softmax (Fang et al. 2024, arXiv 2409.17481).

A group has a logit pi_i for each of its C(M, N) masks M_i, of probability p = softmax(kappa pi). A forward sees the
relaxed mask sum_i y_i M_i with y = softmax((kappa pi + g) / tau) and Gumbel noise g. The loss is that of the text
less ``regularization`` times the squared norm of the relaxed weight, which keeps gradients alive. That factor falls
linearly to 0, as in the authors' scripts. Temperature tau falls and scale kappa rises linearly over the steps. pi
starts as noise of standard deviation sigma, plus a prior: pi_i += strength * sigma * (<M_0, M_i> - N^2 / M) for the
initial mask M_0.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from relaxed import RelaxedMask, generator, gumbel
from torch import Tensor

from maskpro_kernels.functional.masks import expand_mask, pack_mask, top_n_mask
from maskpro_kernels.learn.estimator import check_float
from maskpro_kernels.modules import MaskedLinear
from maskpro_kernels.ops.pattern import NMPattern

# A group of 4:8 has 70; one of 8:16 has 12,870, each with a logit and two moments
MOST_MASKS = 128
SIGMA = 0.01
TEMPERATURES = (4.0, 0.05)
SCALES = (100.0, 500.0)
# What the cosine schedule leaves of the learning rate
LAST_LR = 0.1


def masks_of(pattern: NMPattern, device: torch.device | str = "cpu") -> Tensor:
    """All masks of a group, float32 [C(M, N), M].

    Raises:
        ValueError: if there are more than ``MOST_MASKS``.
    """
    count = math.comb(pattern.m, pattern.n)
    if count > MOST_MASKS:
        raise ValueError(
            f"pattern: expected one with at most {MOST_MASKS} masks a group, for each has a logit, got {pattern} with "
            f"{count}"
        )
    masks = torch.zeros(count, pattern.m)
    for row, columns in zip(masks, combinations(range(pattern.m), pattern.n), strict=True):
        row[list(columns)] = 1.0
    return masks.to(device)


class MaskLLM(RelaxedMask):
    """Gumbel-softmax over the masks of each group; the defaults are those of the authors' LLaMA-2 scripts.

    Args:
        steps: how many there will be.
        lr: of AdamW; falls to a tenth of it by a cosine.
        strength: of the prior.
        regularization: factor of the squared norm of the relaxed weights, at the first step.

    Raises:
        TypeError, ValueError: an argument is not as above; or by ``begin``, if a group has too many masks.
    """

    name = "maskllm"
    options = {"lr": 5e-4, "strength": 3.0, "regularization": 1e-5}
    betas = (0.9, 0.95)
    eps = 1e-5
    weight_decay = 0.1
    clip = 1.0

    def __init__(self, steps: int, lr: float = 5e-4, strength: float = 3.0, regularization: float = 1e-5):
        super().__init__(steps, lr)
        check_float("strength", strength, 0.0)
        check_float("regularization", regularization, 0.0)
        self.strength = float(strength)
        self.regularization = float(regularization)

    def start(self, layer: MaskedLinear) -> Tensor:
        pattern = layer.pattern
        device = layer.weight.device
        masks = masks_of(pattern, device)
        mask = expand_mask(top_n_mask(layer.logits_on_device(), pattern), pattern)
        mask = mask.float().view(layer.out_features, -1, pattern.m)
        overlap = mask @ masks.T - pattern.n**2 / pattern.m
        seed = int(layer.counter_state.seed)
        noise = torch.empty_like(overlap).normal_(0.0, SIGMA, generator=generator(layer, seed, -1))
        return noise.add_(overlap, alpha=self.strength * SIGMA).movedim(-1, 0).contiguous()

    def probabilities(
        self, learned: Tensor, step: int, noise: Tensor | float = 0.0, temperature: float = 1.0
    ) -> Tensor:
        """softmax((kappa pi + noise) / temperature), of the shape of ``learned`` [C(M, N), out, K / M].

        The masks of a group come first, as a CPU takes a softmax over a short last dimension one by one.
        """
        first, last = SCALES
        scale = first + (last - first) * self.progress(step)
        return ((learned * scale + noise) / temperature).softmax(0)

    def temperature(self, step: int) -> float:
        first, last = TEMPERATURES
        return first + (last - first) * self.progress(step)

    def lr_at(self, step: int) -> float:
        return self.lr * (LAST_LR + (1.0 - LAST_LR) * 0.5 * (1.0 + math.cos(math.pi * self.progress(step))))

    def weight(self, layer: MaskedLinear, learned: Tensor, step: int, noise: torch.Generator) -> Tensor:
        y = self.probabilities(learned, step, gumbel(learned.shape, noise), self.temperature(step))
        relaxed = masks_of(layer.pattern, layer.weight.device).T @ y.flatten(1)
        return relaxed.T.reshape(layer.weight.shape) * layer.weight

    def penalty(self, layer: MaskedLinear, learned: Tensor, weight: Tensor, step: int) -> Tensor | None:
        factor = self.regularization * (1.0 - step / self.steps)
        return -factor * weight.square().sum() if factor else None

    def codes(self, layer: MaskedLinear, learned: Tensor) -> Tensor:
        codes = pack_mask(masks_of(layer.pattern, layer.weight.device).bool(), layer.pattern)
        return codes.flatten()[learned.argmax(0)]
