"""transformers' experts of a mixture: one parameter [experts, out, K] for the matrices of all.

Their eager forward multiplies with one expert's matrix after the other, ``linear(x, self.gate_up_proj[expert])`` or, of
parameters [experts, K, out], ``x @ self.gate_up_proj[expert]``. The parameter's place is taken by ``ExpertWeights``,
and the product is then that of the expert's layers: one, or where gate's rows stand ahead of up's a layer of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .form import Form, Joins, Views, linear

# What transformers' decorator of experts gives them
MARKS = ("is_transposed", "has_gate", "_apply_gate", "num_experts", "config")
CHILD = "linears"
# Of a parameter whose rows are those of two matrices, one behind the other: what these are called
HALVES = {"gate_up_proj": ("gate_proj", "up_proj")}
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class ExpertLinears(nn.ModuleDict):
    """The layers of all experts, [out, K] each, in a list by the name of what they multiply with.

    Args:
        lists: the layers.
        sources: the names of the lists that a parameter has become, by its name.
        config: what the experts had as ``config`` before.
    """

    def __init__(self, lists: dict[str, nn.ModuleList], sources: dict[str, tuple[str, ...]], config):
        super().__init__(lists)
        self.sources, self.config = sources, config

    def of(self, parameter: str) -> list[nn.ModuleList]:
        """The lists that a parameter has become."""
        return [self[name] for name in self.sources[parameter]]


class ExpertWeights:
    """Stands where the parameter of all experts was."""

    # transformers would give it random values
    _is_hf_initialized = True

    def __init__(self, lists: list[nn.ModuleList]):
        self.lists = lists

    def __getitem__(self, expert) -> ExpertWeight:
        return ExpertWeight([layers[int(expert)] for layers in self.lists])


class ExpertWeight:
    """Stands for the matrix of one expert in a product, which its layers make."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if len(args) >= 2 and isinstance(args[1], cls) and not kwargs:
            x, weight, *bias = args
            # of a linear product [out, K], of another one [K, out]; a layer is one of the two
            if func is nn.functional.linear or (func in PRODUCTS and not bias):
                parts = [layer(x) for layer in weight.layers]
                y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
                return y + bias[0] if bias and bias[0] is not None else y
        raise TypeError(f"experts: expected a product with the matrix of one, got {getattr(func, '__name__', func)}")


class Fusion(NamedTuple):
    """How a parameter holds the matrices of experts.

    Attributes:
        parts: of how many matrices an expert's rows are made, one behind the other.
        transposed: true where it is [experts, K, out]; else it is [experts, out, K].
    """

    parts: int
    transposed: bool

    def apart(self, fused: Tensor) -> Tensor:
        """A view [parts, experts, out / parts, K]."""
        rows = 2 if self.transposed else 1
        single = fused.unflatten(rows, (self.parts, -1)).movedim(rows, 0)
        return single.mT if self.transposed else single

    def together(self, single: Sequence[Tensor]) -> Tensor:
        """A new tensor of matrices: those of the first part of all experts, then those of the next one."""
        experts, (rows, k), first = len(single) // self.parts, single[0].shape, single[0]
        shape = (experts, k, self.parts * rows) if self.transposed else (experts, self.parts * rows, k)
        fused = torch.empty(shape, dtype=first.dtype, device=first.device)
        views = self.apart(fused)
        for place, matrix in enumerate(single):
            views[divmod(place, experts)].copy_(matrix)
        return fused


def _fusion(module: nn.Module, name: str) -> Fusion:
    """How a parameter of experts holds their matrices."""
    halves = name in HALVES and module.has_gate and _gate_stands_ahead(module)
    return Fusion(len(HALVES[name]) if halves else 1, module.is_transposed)


@torch.no_grad()
def _gate_stands_ahead(module: nn.Module) -> bool:
    """True if all outputs of the gate stand ahead of those of up; else they take turns.

    Not every transformers has a flag for it. Of four outputs the second one belongs to the first result where they take
    turns.
    """
    one, other = module._apply_gate(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0]], device="cpu"))
    return bool(one[0] == other[0])


class ExpertsForm(Form):
    """The experts stay in their place. Their child ``linears`` holds the layers, and they run eagerly."""

    in_place = True

    def is_built(self, module: nn.Module) -> bool:
        return all(hasattr(module, mark) for mark in MARKS) and bool(self._fused(module))

    def _fused(self, module: nn.Module) -> dict[str, nn.Parameter]:
        own = module.named_parameters(recurse=False)
        # where they are spread over ranks, it counts those of one
        spread = getattr(module, "_is_expert_parallel", False)
        return {name: x for name, x in own if x.dim() == 3 and (spread or len(x) == module.num_experts)}

    def reason_against(self, module: nn.Module) -> str | None:
        if getattr(module, "_is_expert_parallel", False):
            return "its experts are spread over devices"
        return None if self._multiplies_alone(module) else "its forward does more with the matrices than multiply"

    def _multiplies_alone(self, module: nn.Module) -> bool:
        """True if one token through one expert comes out the same by ``ExpertWeights``."""
        fused = self._fused(module)
        name, parameter = next(iter(fused.items()))
        # one on meta has no values to choose an expert by, and a checkpoint that names it was made of one that has
        if parameter.is_meta:
            return True
        with torch.no_grad(), suppress(Exception):
            token = parameter.new_ones(1, parameter.shape[1 if module.is_transposed else 2])
            call = token, torch.zeros(1, 1, dtype=torch.int64, device=token.device), token[:, :1]
            expected = type(module).forward.__wrapped__(module, *call)
            undo = self._take_apart(module, fused, Views())
            try:
                return torch.allclose(type(module).forward(module, *call), expected, rtol=1e-2, atol=1e-2)
            finally:
                undo()
        return False

    def matrices(self, module: nn.Module) -> dict[str, Callable[[], Tensor]]:
        def view(name: str) -> Tensor:
            return getattr(module, name).mT if module.is_transposed else getattr(module, name)

        return {name: partial(view, name) for name in self._fused(module)}

    def take_apart(self, module: nn.Module, views: Views):
        return module, self._take_apart(module, self._fused(module), views)

    def _take_apart(self, module: nn.Module, fused: dict[str, nn.Parameter], views: Views) -> Callable[[], None]:
        config, training, before = module.config, module.training, dict(module._parameters)
        lists, sources = {}, {}
        for name, parameter in fused.items():
            how = _fusion(module, name)
            parts = _layers_of(parameter, how, views, training)
            sources[name] = (name,) if how.parts == 1 else HALVES[name]
            lists |= dict(zip(sources[name], map(nn.ModuleList, parts), strict=True))
        linears = ExpertLinears(lists, sources, config).train(training)
        for name in fused:
            del module._parameters[name]
            setattr(module, name, ExpertWeights(linears.of(name)))
        setattr(module, CHILD, linears)
        # the other ways to run experts take the parameter as a whole
        module.config = copy.copy(config)
        module.config._experts_implementation_internal = "eager"

        def undo() -> None:
            self._remove_layers(module)
            module._parameters = before

        return undo

    def _remove_layers(self, module: nn.Module) -> ExpertLinears:
        linears = getattr(module, CHILD)
        module.config = linears.config
        for name in (CHILD, *linears.sources):
            delattr(module, name)
        return linears

    def parts(self, module: nn.Module) -> list[nn.Module] | None:
        lists = getattr(module, CHILD, None)
        return [layer for layers in lists.values() for layer in layers] if isinstance(lists, ExpertLinears) else None

    def put_together(self, module: nn.Module, joins: Joins) -> nn.Module:
        linears = self._remove_layers(module)
        for name in linears.sources:
            weights = [layer.weight for layer in chain(*linears.of(name))]
            module.register_parameter(name, joins.of(weights, _fusion(module, name).together))
        return module


def _layers_of(parameter: nn.Parameter, how: Fusion, views: Views, training: bool) -> list[list[nn.Linear]]:
    """Layers [parts][experts] that share the memory of a parameter."""

    def layer(part: int, expert: int) -> nn.Linear:
        return linear(
            views.of(parameter, (how, part, expert), lambda fused: how.apart(fused)[part, expert]), None, training
        )

    return [[layer(part, expert) for expert in range(len(parameter))] for part in range(how.parts)]


def expert_groups(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """For each layer of an expert, those of all experts of the same parameter: none of them feeds another."""
    found = [module for module in model.modules() if isinstance(module, ExpertLinears)]
    groups = (tuple(chain(*linears.of(name))) for linears in found for name in linears.sources)
    return {layer: layers for layers in groups for layer in layers}
