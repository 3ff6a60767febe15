"""What no graph of ``torch.compile`` takes in. Importing it loads torch's compiler."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.compiler.disable
def straight_through(layer: nn.Module, input: Tensor) -> Tensor:
    """``layer.straight_through(input)``.

    A graph would hold the ``logits_backward`` of the step it was made in, and what that reads and writes beside the
    tensors.
    """
    return layer.straight_through(input)
