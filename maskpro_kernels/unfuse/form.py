"""Forms: how a kind of module is written as nn.Linear layers, and how they become that module again.

A module is *built* as its authors wrote it, or *taken apart*.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from ..replacement import BUILT_AS, is_conv1d


class Views:
    """Parameters that are views of others, one for each part: what was shared stays shared."""

    def __init__(self):
        self._made: dict[tuple[int, Hashable], tuple[nn.Parameter, nn.Parameter]] = {}

    def of(self, parameter: nn.Parameter, part: Hashable, view: Callable[[Tensor], Tensor]) -> nn.Parameter:
        """``view(parameter)``, a leaf with the parameter's memory; the same one when it is asked for again."""
        # the whole one is kept too, or its id might become another's; of `data`, for views of `detach` count changes
        # together, and a step that changes one in backward would spoil the others for autograd
        made = self._made.setdefault(
            (id(parameter), part), (parameter, nn.Parameter(view(parameter.data), parameter.requires_grad))
        )
        return made[1]


class Joins:
    """Parameters that are made of several: what was shared stays shared."""

    def __init__(self):
        self._made: dict[tuple[int, ...], nn.Parameter] = {}

    def of(self, parameters: list[nn.Parameter], join: Callable[[list[Tensor]], Tensor]) -> nn.Parameter:
        """``join(parameters)``, frozen where all are; the same one when it is asked for again."""
        key = tuple(map(id, parameters))
        if key not in self._made:
            tensor = join([parameter.detach() for parameter in parameters])
            self._made[key] = nn.Parameter(tensor, any(parameter.requires_grad for parameter in parameters))
        return self._made[key]


class Form(ABC):
    """One kind of module, built and taken apart.

    Attributes:
        in_place: the module itself changes, so that its hooks stay; else another takes its place.
        by_forward: an adapter of peft beside it needs no more of it than its forward.
    """

    in_place = by_forward = False

    @abstractmethod
    def is_built(self, module: nn.Module) -> bool:
        """Tell a module of that kind, built."""

    def reason_against(self, module: nn.Module) -> str | None:
        """Why a module of that kind is not taken apart; None where it can be."""
        return None

    @abstractmethod
    def matrices(self, module: nn.Module) -> dict[str, Callable[[], Tensor]]:
        """Functions that give the matrices of a built module as views [..., K], by the names of its parameters."""

    @abstractmethod
    def take_apart(self, module: nn.Module, views: Views) -> tuple[nn.Module, Callable[[], None]]:
        """(the module's replacement, or the module itself; what undoes a change of the module itself)."""

    @abstractmethod
    def parts(self, module: nn.Module) -> list[nn.Module] | None:
        """The nn.Linear layers, or their replacements, of a module that was taken apart; None of another."""

    @abstractmethod
    def put_together(self, module: nn.Module, joins: Joins) -> nn.Module:
        """The module built, from nn.Linear layers."""


def linear(weight: nn.Parameter, bias: nn.Parameter | None, training: bool) -> nn.Linear:
    """An nn.Linear of these parameters."""
    rows, k = weight.shape
    layer = nn.Linear(k, rows, bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer.train(training)


class Conv1DForm(Form):
    """transformers' Conv1D, of GPT-2 and its kin: an nn.Linear whose weight is stored transposed, [K, out].

    The layer that stands for it has its name, and shares its memory by a transposed view. ``replace_modules`` hands on
    the class to build again, which is an attribute of the layer.
    """

    by_forward = True

    def is_built(self, module: nn.Module) -> bool:
        return is_conv1d(module)

    def matrices(self, module: nn.Module) -> dict[str, Callable[[], Tensor]]:
        return {"weight": lambda: module.weight.T}

    def take_apart(self, module: nn.Module, views: Views):
        layer = linear(views.of(module.weight, "transposed", lambda weight: weight.T), module.bias, module.training)
        setattr(layer, BUILT_AS, type(module))
        return layer, lambda: None

    def parts(self, module: nn.Module) -> list[nn.Module] | None:
        return [module] if hasattr(module, BUILT_AS) else None

    def put_together(self, module: nn.Module, joins: Joins) -> nn.Module:
        rows, k = module.weight.shape
        with torch.device("meta"):
            built = getattr(module, BUILT_AS)(rows, k)
        built.weight = joins.of([module.weight], lambda weights: weights[0].T.contiguous())
        built.bias = module.bias
        return built.train(module.training)
