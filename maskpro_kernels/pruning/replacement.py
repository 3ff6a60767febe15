"""Layers put in the place of others, in models of transformers too."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import nn

from ..adapters import refuse_merging
from ..modules import MaskedLinear
from ..packed import NMLinear
from ..replacement import replace_modules


def replace_layers(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """``replace_modules``, and the config of a transformers model tells of its masked and packed layers."""
    replace_modules(model, replacements)
    refuse_merging(model, (MaskedLinear, NMLinear))
    if "transformers" in sys.modules and any(hasattr(module, "save_pretrained") for module in model.modules()):
        from ..hf import tell_config

        tell_config(model)
