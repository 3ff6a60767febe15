"""What a form is: how a kind of module is written as nn.Linear layers, and how they become that module again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn


class Views:
    """Parameters that are views of others, one for each part: what was shared stays shared."""

    def __init__(self):
        self._made: dict[tuple[int, Hashable], tuple[nn.Parameter, nn.Parameter]] = {}

    def of(self, parameter: nn.Parameter, part: Hashable, view: Callable[[Tensor], Tensor]) -> nn.Parameter:
        """``view(parameter)``, a leaf with the parameter's memory; the same one when it is asked for again."""
        # the whole one is kept too, or its id might become another's
        made = self._made.setdefault(
            (id(parameter), part), (parameter, nn.Parameter(view(parameter.detach()), parameter.requires_grad))
        )
        return made[1]


class Form(ABC):
    """One kind of module, as built by its authors and taken apart."""

    @abstractmethod
    def is_built(self, module: nn.Module) -> bool:
        """Whether this is a module of that kind, not taken apart."""

    def reason_against(self, module: nn.Module) -> str | None:
        """Why a module of that kind is not taken apart; None where it can be."""
        return None

    @abstractmethod
    def matrices(self, module: nn.Module) -> dict[str, Callable[[], Tensor]]:
        """What gives the matrices of a module, not taken apart, as views [..., K], by the names of its parameters."""

    @abstractmethod
    def take_apart(self, module: nn.Module, views: Views) -> tuple[nn.Module, Callable[[], None]]:
        """(what to put in the place of the module, or the module itself; what undoes a change of the module itself)."""

    @abstractmethod
    def parts(self, module: nn.Module) -> list[nn.Module] | None:
        """The nn.Linear layers, or what stands in their place, of a module that was taken apart; None of another."""

    @abstractmethod
    def put_together(self, module: nn.Module) -> nn.Module:
        """As its authors built it, from nn.Linear layers."""


def linear(weight: nn.Parameter, bias: nn.Parameter | None, training: bool) -> nn.Linear:
    """An nn.Linear of these parameters."""
    rows, k = weight.shape
    layer = nn.Linear(k, rows, bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer.train(training)


def nothing_to_undo() -> None:
    pass


def joined(parameters: list[nn.Parameter], join: Callable[[list[Tensor]], Tensor]) -> nn.Parameter:
    """One parameter of several; frozen where all are."""
    with torch.no_grad():
        tensor = join([parameter.detach() for parameter in parameters])
    return nn.Parameter(tensor, any(parameter.requires_grad for parameter in parameters))
