"""What a tensor-parallel plan has put around a layer: it calls the layer with a DTensor, and takes one from it.

torch's ``parallelize_module`` hooks to the layer. transformers puts a forward of its own in the place of the layer's.
Neither has a public name by which it is known.

Of experts the plan is around the module that holds them: it brings plain tensors in and sums up what comes out. Their
layers take plain inputs, of columns the own features alone, and give what this rank has of outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

OF_TORCH = ("torch.distributed.tensor._api", "distribute_module.<locals>.<lambda>")
OF_TRANSFORMERS = (
    "transformers.distributed.tensor_parallel",
    "TensorParallelLayer.install_forward.<locals>.tp_forward",
)

# Attribute of such a layer
PARTS = "takes_parts_of_plan"


def is_hook_of_plan(hook: Callable) -> bool:
    """Whether ``parallelize_module`` has hooked it to a layer."""
    return _name_of(hook) == OF_TORCH


def has_forward_of_plan(module: nn.Module) -> bool:
    """Whether transformers has put a forward around that of the module's class."""
    forward = vars(module).get("forward")
    return _name_of(forward) == OF_TRANSFORMERS and _held_by(forward)["original_forward"] == _own_forward(module)


def mark_as_taking_parts(layer: nn.Module) -> None:
    """Tell a layer that a plan is around the module that it stands in."""
    setattr(layer, PARTS, True)


def takes_parts(layer: nn.Module) -> bool:
    """Whether ``mark_as_taking_parts`` was told to it, or to the layer that it stands for."""
    return hasattr(layer, PARTS)


def hand_on(module: nn.Module, replacement: nn.Module) -> None:
    """Put what a plan has put around a layer around another one, whose weight has the same placement."""
    for hook in filter(is_hook_of_plan, module._forward_pre_hooks.values()):
        replacement.register_forward_pre_hook(hook)
    for hook in filter(is_hook_of_plan, module._forward_hooks.values()):
        replacement.register_forward_hook(hook)
    if takes_parts(module):
        mark_as_taking_parts(replacement)
    if has_forward_of_plan(module):
        held = _held_by(module.forward)
        held["self"].install_forward(replacement, held["mesh"])


def _name_of(function: Callable | None) -> tuple[str | None, str | None]:
    return getattr(function, "__module__", None), getattr(function, "__qualname__", None)


def _held_by(forward: Callable) -> dict:
    return dict(inspect.getclosurevars(forward).nonlocals)


def _own_forward(module: nn.Module) -> Callable:
    return type(module).forward.__get__(module)
