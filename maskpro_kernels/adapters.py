"""Layers that peft has put adapters beside, told apart without an import of peft."""

from __future__ import annotations

from functools import partial

from torch import nn

ADAPTER = "adapter of peft"


def adapter_modules(model: nn.Module) -> set[str]:
    """Names of the modules within peft's layers, but for the base layers that these stand in for."""
    names = set()
    for name, layer in model.named_modules():
        if _has_adapters(layer):
            own = (child for child, _ in layer.named_modules() if child and child.split(".")[0] != "base_layer")
            names |= {f"{name}.{child}" if name else child for child in own}
    return names


def refuse_merging(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Have peft's layers refuse to merge into base layers of these kinds: the sum would lose the pattern."""
    for name, layer in model.named_modules():
        if _has_adapters(layer) and isinstance(layer.get_base_layer(), kinds):
            layer.merge = partial(_refuse, name)


def _refuse(name: str, *_, **__) -> None:
    raise ValueError(
        f"merge: expected a dense base layer, got one with a mask in {name}, which the sum would not follow; finalize "
        "the model, merge, and call the restore of a KeptZeros that was made before"
    )


def _has_adapters(layer: nn.Module) -> bool:
    return any(
        kind.__name__ == "BaseTunerLayer" and kind.__module__.split(".")[0] == "peft" for kind in type(layer).__mro__
    )
