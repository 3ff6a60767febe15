"""Layers put in the place of others, in models of transformers and beside adapters of peft too."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import nn

from ..adapters import check_not_merged, fit_adapters, refuse_merging
from ..modules import MaskedLinear, masked_layers
from ..packed import SPARSE
from ..replacement import replace_modules
from ..unfuse import as_built


def check_replaceable(model: nn.Module) -> None:
    """Raise unless what is put into a model can be told of in its config.

    Raises:
        ValueError: if an adapter of peft is merged, or the config of a transformers model describes it as quantized by
            another library.
        ImportError: if the transformers that is installed cannot load checkpoints with masks.
    """
    check_not_merged(model)
    if _of_transformers(model):
        from ..hf import check_not_quantized

        check_not_quantized(model)


def replace_layers(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """``replace_modules``, told to what depends on it.

    Adapters refuse to merge into what is sparse, and the config of a transformers model names it. Once nothing of a
    module that was taken apart is sparse, it is put together.
    """
    replace_modules(model, replacements)
    if any(isinstance(layer, MaskedLinear) for layer in replacements.values()):
        # what FSDP2 gathers comes to the new layers from here on
        masked_layers(model)
    if not any(isinstance(layer, SPARSE) for layer in replacements.values()):
        as_built(model)
    fit_adapters(model)
    refuse_merging(model, SPARSE)
    if _of_transformers(model):
        from ..hf import describe

        describe(model)


def _of_transformers(model: nn.Module) -> bool:
    return "transformers" in sys.modules and any(hasattr(module, "save_pretrained") for module in model.modules())
