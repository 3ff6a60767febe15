"""transformers' experts of a mixture: one parameter [experts, out, K] for the matrices of all.

Their eager forward multiplies with one expert's matrix after the other, ``linear(x, self.gate_up_proj[expert])`` or, of
parameters [experts, K, out], ``x @ self.gate_up_proj[expert]``. The parameter's place is taken by ``ExpertWeights``,
and the product is then that of the expert's layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from .form import Form, Joins, Views, linear

# What transformers' decorator of experts gives them
MARKS = ("is_transposed", "has_gate", "_apply_gate", "num_experts", "config")
CHILD = "linears"
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class ExpertLinears(nn.ModuleDict):
    """The layers of all experts, [out, K] each, in a list by the name of the parameter that held them.

    Args:
        lists: the layers.
        config: what the experts had as ``config`` before.
    """

    def __init__(self, lists: dict[str, nn.ModuleList], config):
        super().__init__(lists)
        self.config = config


class ExpertWeights:
    """Stands where the parameter of all experts was."""

    # transformers would give it random values
    _is_hf_initialized = True

    def __init__(self, layers: nn.ModuleList):
        self.layers = layers

    def __getitem__(self, expert) -> ExpertWeight:
        return ExpertWeight(self.layers[int(expert)])


class ExpertWeight:
    """Stands for the matrix of one expert in a product, which its layer makes."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if len(args) >= 2 and isinstance(args[1], cls) and not kwargs:
            x, weight, *bias = args
            # of a linear product [out, K], of another one [K, out]; the layer is one of the two
            if func is nn.functional.linear or (func in PRODUCTS and not bias):
                y = weight.layer(x)
                return y + bias[0] if bias and bias[0] is not None else y
        raise TypeError(f"experts: expected a product with the matrix of one, got {getattr(func, '__name__', func)}")


class ExpertsForm(Form):
    """The experts stay in their place. Their child ``linears`` holds the layers, and they run eagerly."""

    in_place = True

    def is_built(self, module: nn.Module) -> bool:
        return all(hasattr(module, mark) for mark in MARKS) and bool(self._fused(module))

    def _fused(self, module: nn.Module) -> dict[str, nn.Parameter]:
        own = module.named_parameters(recurse=False)
        return {name: x for name, x in own if x.dim() == 3 and len(x) == module.num_experts}

    def reason_against(self, module: nn.Module) -> str | None:
        if getattr(module, "_is_expert_parallel", False):
            return "its experts are spread over devices"
        return None if self._multiplies_alone(module) else "its forward does more with the matrices than multiply"

    def _multiplies_alone(self, module: nn.Module) -> bool:
        """Whether one token through one expert comes out the same by ``ExpertWeights``."""
        name, parameter = next(iter(self._fused(module).items()))
        # one on meta has no values to choose an expert by, and a checkpoint that names it was made of one that has
        if parameter.is_meta:
            return True
        token = parameter.new_ones(1, parameter.shape[1 if module.is_transposed else 2])
        call = token, torch.zeros(1, 1, dtype=torch.int64, device=token.device), token[:, :1]
        with torch.no_grad(), suppress(Exception):
            expected = type(module).forward.__wrapped__(module, *call)
            _, undo = self.take_apart(module, Views())
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
        fused, config, training = self._fused(module), module.config, module.training
        before = dict(module._parameters)
        transposed = (lambda weight: weight.T) if module.is_transposed else (lambda weight: weight)
        lists = {
            name: nn.ModuleList(
                linear(views.of(parameter, e, lambda whole, e=e: transposed(whole[e])), None, training)
                for e in range(len(parameter))
            )
            for name, parameter in fused.items()
        }
        for name, layers in lists.items():
            del module._parameters[name]
            setattr(module, name, ExpertWeights(layers))
        setattr(module, CHILD, ExpertLinears(lists, config).train(training))
        # the other ways to run experts take the parameter as a whole
        module.config = copy.copy(config)
        module.config._experts_implementation_internal = "eager"

        def undo() -> None:
            self._restore(module, fused)
            module._parameters = before

        return module, undo

    def _restore(self, module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        module.config = getattr(module, CHILD).config
        delattr(module, CHILD)
        for name, parameter in parameters.items():
            delattr(module, name)
            module.register_parameter(name, parameter)

    def parts(self, module: nn.Module) -> list[nn.Module] | None:
        lists = getattr(module, CHILD, None)
        return [layer for layers in lists.values() for layer in layers] if isinstance(lists, ExpertLinears) else None

    def put_together(self, module: nn.Module, joins: Joins) -> nn.Module:
        def stacked(weights: list[Tensor]) -> Tensor:
            return torch.stack([weight.T for weight in weights] if module.is_transposed else weights)

        lists = getattr(module, CHILD).items()
        self._restore(module, {name: joins.of([layer.weight for layer in layers], stacked) for name, layers in lists})
        return module


def expert_groups(model: nn.Module) -> dict[nn.Module, nn.ModuleList]:
    """For each layer of an expert, those of all experts of the same parameter: none of them feeds another."""
    lists = (layers for module in model.modules() if isinstance(module, ExpertLinears) for layers in module.values())
    return {layer: layers for layers in lists for layer in layers}
