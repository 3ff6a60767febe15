"""A step of straight-through learning as a CUDA graph can hold it: forward, backward and update of all layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import maskpro_kernels as mk
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.ranks import Ranks


class CapturedStep:
    """Steps of a model [16, 512] to [16, 64] on one batch; the first one reads the mean squares, as a warm-up does."""

    def __init__(self, device: str, pattern: str, train_weights: float | None = None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 64)).to(device)
        mk.convert(self.model, pattern, gap=1.0)
        self.model.train()
        self.x = torch.randn(16, 512, generator=torch.Generator().manual_seed(1)).to(device)
        self.layers = masked_layers(self.model)
        self.estimator = mk.StraightThrough(decay=0.5, train_weights=train_weights)
        self.estimator.begin(self.layers)
        self(read=True)

    def __call__(self, read: bool = False) -> None:
        with self.estimator.attached(0, Ranks(), 1, {}) as backward_pass:
            backward_pass.backward(self.model(self.x).square().mean())
            if read:
                assert backward_pass.bad_layers() == []
        mk.advance(self.model)

    def logits(self) -> list[Tensor]:
        return [layer.logits.detach().cpu() for layer in self.layers.values()]
