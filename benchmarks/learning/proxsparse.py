"""ProxSparse: weights learn under a regularizer that draws groups to N:M (Liu et al. 2025, arXiv 2502.00258).

The regularizer of a group is the sum of the products of every three of its four |w|, which is 0 where at most two are
not 0. Here for any N:M: e_{N+1}(|w|), the elementary symmetric polynomial of that degree, which at 2:4 is the paper's.
After each step of AdamW on the loss the weights become prox(v) = argmin_x |x - v|^2 / 2 + strength * e_{N+1}(|x|). A
second regularizer, frozen * sum of (|w0| / (|w0| + epsilon) * (w - w0))^2, may hold weights near the dense w0. What is
learned is the mask, the N largest |w| of each group: it is applied to the dense weights.
"""

from __future__ import annotations

import torch
from relaxed import RelaxedMask
from torch import Tensor

from maskpro_kernels.functional.masks import expand_mask, top_n_mask
from maskpro_kernels.learn.estimator import check_float
from maskpro_kernels.modules import MaskedLinear

EPSILON = 0.1
# Share of the steps over which the learning rate rises
WARMUP = 0.1
# A group has converged if no weight moves by more than this share of its largest
REST = 1e-7
MOST_SWEEPS = 200


def symmetric_polynomials(values: list[Tensor], degree: int) -> list[Tensor]:
    """e_0 to e_degree of values that are all of one shape."""
    polynomials = [torch.ones_like(values[0])] + [torch.zeros_like(values[0]) for _ in range(degree)]
    for i, value in enumerate(values):
        for d in range(min(i + 1, degree), 0, -1):
            polynomials[d] = polynomials[d] + polynomials[d - 1] * value
    return polynomials


def proximal(v: Tensor, strength: float, n: int) -> Tensor:
    """prox(v) of groups [..., M]: argmin over x of |x - v|^2 / 2 + strength * e_{N+1}(|x|).

    |x| lies between 0 and |v|. Where strength * (M - N) * e_{N-1}(|v|) < 1, the sum is convex there by Gershgorin's
    bound, and minima along one weight after the other, |x_i| = max(|v_i| - strength * e_N of the others, 0), lead to
    the minimum. Elsewhere that is done for each number of weights above 0, from N to M, which are then the largest of
    |v|, and the best one is taken, as the paper enumerates them.
    """
    m = v.shape[-1]
    y = v.abs().reshape(-1, m)
    x = _descended(y, y, strength, n)
    hard = (strength * (m - n) * symmetric_polynomials(list(y.unbind(1)), n - 1)[-1] >= 1.0).nonzero().squeeze(1)
    if len(hard):
        x[hard] = _enumerated(y[hard], strength, n)
    return x.view(v.shape).copysign(v)


def _descended(y: Tensor, start: Tensor, strength: float, n: int) -> Tensor:
    """Minima along one weight after the other, until all rest; weights at 0 in ``start`` stay."""
    result = start.T.contiguous()
    x = result.clone()
    y = y.T.contiguous()
    free = x > 0
    at_rest = REST * y.amax(0)
    # few groups take many sweeps: those at rest are left out
    groups = torch.arange(x.shape[1], device=x.device)
    for _ in range(MOST_SWEEPS):
        previous = x.clone()
        for i in range(len(x)):
            other_weights = [*x[:i], *x[i + 1 :]]
            moved = (y[i] - strength * symmetric_polynomials(other_weights, n)[n]).clamp_min(0.0)
            x[i] = torch.where(free[i], moved, 0.0)
        moving = (x - previous).abs().amax(0) > at_rest
        result[:, groups] = x
        if not moving.any():
            break
        groups = groups[moving]
        at_rest = at_rest[moving]
        x = x[:, moving]
        y = y[:, moving]
        free = free[:, moving]
    return result.T.contiguous()


def _enumerated(y: Tensor, strength: float, n: int) -> Tensor:
    order = y.argsort(dim=1, descending=True, stable=True)
    ranked = y.gather(1, order)
    m = y.shape[1]
    best = torch.full_like(y[:, 0], torch.inf)
    chosen = torch.zeros_like(y)
    for count in range(n, m + 1):
        start = ranked.clone()
        start[:, count:] = 0.0
        x = _descended(ranked, start, strength, n)
        value = (x - ranked).square().sum(1) / 2 + strength * symmetric_polynomials(list(x.unbind(1)), n + 1)[-1]
        better = value < best
        best = torch.where(better, value, best)
        chosen = torch.where(better[:, None], x, chosen)
    return torch.zeros_like(y).scatter_(1, order, chosen)


class ProxSparse(RelaxedMask):
    """Proximal AdamW on float32 copies of the masked layers' weights; options are at those of the authors' script.

    That script is for LLaMA-2-7B. It trains all parameters, in bfloat16. It also clips the norm of the gradient at 1;
    AdamW divides out what is common to all steps.

    Args:
        steps: how many there will be.
        lr: of AdamW; rises over a tenth of the steps and falls linearly to 0.
        strength: of the N:M regularizer, lambda_1 in the paper.
        frozen: factor of the regularizer that holds weights near the dense ones, lambda_2 in the paper.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    name = "proxsparse"
    options = {"lr": 1e-4, "strength": 0.25, "frozen": 0.0}

    def __init__(self, steps: int, lr: float = 1e-4, strength: float = 0.25, frozen: float = 0.0):
        super().__init__(steps, lr)
        check_float("strength", strength, 0.0)
        check_float("frozen", frozen, 0.0)
        self.strength = float(strength)
        self.frozen = float(frozen)

    def start(self, layer: MaskedLinear) -> Tensor:
        return layer.weight.detach().float().clone()

    def lr_at(self, step: int) -> float:
        rising = max(round(WARMUP * self.steps), 1)
        return self.lr * min((step + 1) / rising, (self.steps - step) / max(self.steps - rising, 1), 1.0)

    def weight(self, layer: MaskedLinear, learned: Tensor, step: int, noise: torch.Generator) -> Tensor:
        return learned

    def penalty(self, layer: MaskedLinear, learned: Tensor, weight: Tensor, step: int) -> Tensor | None:
        if not self.frozen:
            return None
        dense = layer.weight.float()
        share = dense.abs() / (dense.abs() + EPSILON)
        return self.frozen * (share * (learned - dense)).square().sum()

    def after_update(self, layer: MaskedLinear, learned: Tensor) -> None:
        groups = learned.view(layer.out_features, -1, layer.pattern.m)
        learned.copy_(proximal(groups, self.strength, layer.pattern.n).view_as(learned))

    def codes(self, layer: MaskedLinear, learned: Tensor) -> Tensor:
        return top_n_mask(learned.abs(), layer.pattern)

    def sparse_weights(self, layers: dict[str, MaskedLinear]) -> dict[str, Tensor]:
        """The learned weights [out, K] under the learned masks, in the weights' dtypes, by layer."""
        return {
            name: (learned.detach() * expand_mask(self.codes(layers[name], learned), layers[name].pattern)).to(
                layers[name].weight.dtype
            )
            for name, learned in self.learned.items()
        }
