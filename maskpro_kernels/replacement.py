"""Modules put in the place of others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

# Attribute of a layer that stands for a module of another kind: the class to build again
BUILT_AS = "built_as"


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, which stores its weight transposed."""
    # told apart without an import of transformers
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put a replacement wherever a module with that id stands, under every name it has, with accelerate's hook."""
    for module in list(model.modules()):
        if id(module) in replacements:
            replacement = replacements[id(module)]
            if hasattr(module, "_hf_hook"):
                _hook(replacement, module._hf_hook)
            kind = getattr(module, BUILT_AS, None)
            if kind is not None and not isinstance(replacement, kind):
                setattr(replacement, BUILT_AS, kind)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


def _hook(layer: nn.Module, hook) -> None:
    """Hook what accelerate had hooked to the layer before; the hook moves to its device what is not there."""
    # it has made the hook, so it is there
    from accelerate.hooks import add_hook_to_module

    logits = getattr(layer, "logits", None)
    add_hook_to_module(layer, hook)
    if logits is not None:
        layer.logits = logits
