"""Modules put in the place of others, and what becomes of the adapters that peft has put beside them.

peft's layers are recognised without an import of peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import nn

# Attribute of a layer that stands for a module of another kind: the class to build again
BUILT_AS = "built_as"
# Why a layer within an adapter gets no mask
ADAPTER = "adapter of peft"


def is_conv1d(module: nn.Module) -> bool:
    """True of transformers' Conv1D, which stores its weight transposed; without an import of transformers."""
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


def adapter_modules(model: nn.Module) -> set[str]:
    """Names of the modules within peft's layers, but for the base layers that these stand in for."""
    names = set()
    for name, layer in model.named_modules():
        # of a module that is trained as a whole, the copy that learns
        saved = "original_module" if _of_peft(layer, "AuxiliaryTrainingWrapper") else None
        base = "base_layer" if _has_adapters(layer) else saved
        if base is not None:
            own = (child for child, _ in layer.named_modules() if child and child.split(".")[0] != base)
            names |= {f"{name}.{child}" if name else child for child in own}
    return names


def refuse_merging(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Have peft's layers refuse to merge into base layers of these kinds: the sum would lose the pattern.

    Where a base layer is of another kind again, they merge as before.
    """
    for name, layer in model.named_modules():
        if _has_adapters(layer):
            sparse = isinstance(layer.get_base_layer(), kinds)
            for method in ("merge", "unmerge"):
                layer.__dict__.pop(method, None)
                if sparse:
                    setattr(layer, method, partial(_refuse, method, name))


def base_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that adapters stand beside."""
    return [layer.get_base_layer() for layer in model.modules() if _has_adapters(layer)]


def fit_adapters(model: nn.Module) -> None:
    """Have adapters merge as their base layers store weights now, which may have changed: transposed, or not."""
    for layer in model.modules():
        if _has_adapters(layer) and hasattr(layer, "fan_in_fan_out"):
            layer.fan_in_fan_out = is_conv1d(layer.get_base_layer())


def check_not_merged(model: nn.Module) -> None:
    """Raise ValueError if an adapter is merged into its base layer, which could not be undone under a mask."""
    for name, layer in model.named_modules():
        if _has_adapters(layer) and layer.merged:
            raise ValueError(
                f"model: expected adapters that are not merged, got a merged one in {name}; unmerge it first"
            )


def _refuse(method: str, name: str, *_, **__) -> None:
    raise ValueError(
        f"{method}: expected a dense base layer, got a masked or packed one{f' in {name}' if name else ''}, whose "
        "pattern the sum would not follow; put the adapter beside the dense export, which finalize gives, merge there, "
        "and call the restore of a KeptZeros that was made before"
    )


def _has_adapters(layer: nn.Module) -> bool:
    return _of_peft(layer, "BaseTunerLayer")


def _of_peft(layer: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.split(".")[0] == "peft" for kind in type(layer).__mro__)
