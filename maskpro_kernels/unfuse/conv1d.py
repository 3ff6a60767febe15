"""transformers' Conv1D, of GPT-2 and its kin: an nn.Linear whose weight is stored transposed, [K, out]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..replacement import BUILT_AS, is_conv1d
from .form import Form, Joins, Views, linear, nothing_to_undo


class Conv1DForm(Form):
    """The layer that stands for a Conv1D has its name, and shares its memory by a transposed view.

    ``replace_modules`` hands on the class to build again, which is an attribute of the layer.
    """

    by_forward = True

    def is_built(self, module: nn.Module) -> bool:
        return is_conv1d(module)

    def matrices(self, module: nn.Module) -> dict[str, Callable[[], Tensor]]:
        return {"weight": lambda: module.weight.T}

    def take_apart(self, module: nn.Module, views: Views):
        layer = linear(views.of(module.weight, "transposed", lambda weight: weight.T), module.bias, module.training)
        setattr(layer, BUILT_AS, type(module))
        return layer, nothing_to_undo

    def parts(self, module: nn.Module) -> list[nn.Module] | None:
        return [module] if hasattr(module, BUILT_AS) else None

    def put_together(self, module: nn.Module, joins: Joins) -> nn.Module:
        rows, k = module.weight.shape
        with torch.device("meta"):
            built = getattr(module, BUILT_AS)(rows, k)
        built.weight = joins.of([module.weight], lambda weights: weights[0].T.contiguous())
        built.bias = module.bias
        return built.train(module.training)
