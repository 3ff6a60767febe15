"""Arguments of the public functions, good ones."""

from __future__ import annotations

import itertools

import torch

import maskpro_kernels as mk

DRAWING = ["sample_mask", "sample_masked_weight", "score_update_", "masked_linear"]


def cpu_normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_codes(*shape: int) -> torch.Tensor:
    """Codes of 2:4, all different where there are no more than six."""
    cycle = itertools.cycle([3, 5, 6, 9, 10, 12])
    return torch.tensor([next(cycle) for _ in range(torch.Size(shape).numel())], dtype=torch.uint8).view(shape)


def good_arguments(function: str) -> dict:
    logits, weight = cpu_normal(2, 8, seed=1), cpu_normal(2, 8, seed=2)
    masked_linear = {"x": cpu_normal(3, 8, seed=3), "weight": weight, "logits": logits, "bias": cpu_normal(2, seed=4)}
    masked_linear |= {"pattern": "2:4", "seed": 0}
    return {
        "sample_mask": {"logits": logits, "pattern": "2:4", "seed": 0},
        "sample_masked_weight": {"weight": weight, "logits": logits, "pattern": "2:4", "seed": 0},
        "top_n_mask": {"scores": logits, "pattern": "2:4"},
        "pack_mask": {"mask": mk.expand_mask(some_codes(2, 2), "2:4"), "pattern": "2:4"},
        "expand_mask": {"codes": some_codes(2, 2), "pattern": "2:4"},
        "mask_log_prob": {"logits": logits, "codes": some_codes(2, 2), "pattern": "2:4"},
        "score_update_": {"logits": logits, "coef": 0.5, "pattern": "2:4", "seed": 0},
        "masked_linear": masked_linear,
        "straight_through_linear": masked_linear,
        "codes_linear": {"x": cpu_normal(3, 8, seed=3), "weight": weight, "codes": some_codes(2, 2), "pattern": "2:4"},
    }.get(function, {})


def linear_arguments(shape: tuple[int, ...] = (2, 3, 8)) -> dict[str, torch.Tensor]:
    tensors = {"x": cpu_normal(*shape), "weight": cpu_normal(5, 8, seed=1)}
    tensors |= {"logits": cpu_normal(5, 8, seed=2), "bias": cpu_normal(5, seed=3)}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}
