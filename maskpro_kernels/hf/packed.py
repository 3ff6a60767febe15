"""Checkpoints with packed N:M weights: how they are described, and how transformers loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..functional.checks import LOGIT_DTYPES
from ..packed import NMLinear, PackedNM, check_bitmask, packed_class
from ..pattern import NMPattern
from ..replacement import replace_modules
from .quantizer import SparseQuantizer
from .stored_files import (
    HOW_TO_LOAD,
    check_all_stored,
    check_names,
    check_own_settings,
    linears_named,
    stored_names,
    take_apart,
)

PACKED_METHOD, PACKED_FORMAT, PACKED_VERSION = "maskpro", "nm-bitmask", 1


@register_quantization_config(PACKED_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a checkpoint with packed weights, which hold ``values`` and ``bitmask``: ``PackedNM``.

    Args:
        patterns: names of the packed nn.Linear modules, by "N:M".
        taken_apart: names of the modules that hold some of them and were built otherwise, see ``linear_form``.
        format, version: of what is stored.
        loading: for who reads the checkpoint without this package: what transformers needs to load it.

    Raises:
        TypeError, ValueError: an argument is not as above, or of a format or version that this release does not know.
    """

    def __init__(
        self,
        patterns: Mapping[str, Sequence[str]],
        taken_apart: Sequence[str] = (),
        format: str = PACKED_FORMAT,
        version: int = PACKED_VERSION,
        loading: str = HOW_TO_LOAD,
        **others,
    ):
        self.quant_method = PACKED_METHOD
        check_own_settings(others, format=(format, PACKED_FORMAT), version=(version, PACKED_VERSION))
        if not isinstance(patterns, Mapping) or any(isinstance(names, str) for names in patterns.values()):
            raise TypeError(f"quantization_config: expected names of modules by pattern, got {patterns!r}")
        self.patterns = {str(NMPattern(pattern)): list(names) for pattern, names in patterns.items()}
        self.taken_apart = check_names("taken_apart", taken_apart)
        self.format, self.version, self.loading = format, version, loading

    @classmethod
    def of(cls, layers: Mapping[str, NMLinear], taken_apart: Sequence[str]) -> PackedConfig:
        """Of a model's packed layers by name."""
        patterns: dict[str, list[str]] = {}
        for name, layer in layers.items():
            patterns.setdefault(str(layer.pattern), []).append(name)
        return cls(patterns, taken_apart)

    @property
    def layers(self) -> dict[str, NMPattern]:
        """The pattern of each layer."""
        return {name: NMPattern(pattern) for pattern, names in self.patterns.items() for name in names}


@register_quantizer(PACKED_METHOD)
class PackedQuantizer(SparseQuantizer):
    """Gives a model NMLinear modules before transformers loads its checkpoint, and refuses one that is damaged."""

    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        layers = self.quantization_config.layers
        take_apart(model, self.quantization_config.taken_apart)
        # without layers it is a dense model whose adapters stand in what is taken apart
        if layers or not self.quantization_config.taken_apart:
            replace_by_packed(model, layers)
        if checkpoint_files is not None:
            check_all_stored(stored_names(checkpoint_files), ("values", "bitmask"), layers)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in model.named_modules():
            if isinstance(module, NMLinear):
                if not module.bitmask.is_meta:
                    _check_loaded(name, module)
                # as ``finalize`` leaves it; transformers makes all parameters trainable
                module.requires_grad_(False)
        return model


def replace_by_packed(model: nn.Module, layers: Mapping[str, NMPattern]) -> None:
    """Put empty NMLinear modules on the meta device in the place of nn.Linear.

    Args:
        model: on the meta device, say.
        layers: the pattern of each, by the name that a checkpoint has for it.

    Raises:
        ValueError: if one of the names is of no nn.Linear, or a pattern does not fit.
    """
    replacements = {}
    for name, linear in linears_named(model, layers).items():
        pattern = layers[name]
        rows, k = linear.weight.shape
        if k % pattern.m:
            raise ValueError(
                f"quantization_config: expected in_features divisible by {pattern.m} for {pattern}, got {k} in {name}"
            )
        values = torch.empty(rows, k // pattern.m * pattern.n, dtype=linear.weight.dtype, device="meta")
        bitmask = torch.empty(rows, -(-k // 8), dtype=torch.uint8, device="meta")
        bias = None if linear.bias is None else torch.empty(rows, dtype=linear.weight.dtype, device="meta")
        layer = packed_class(pattern)(PackedNM(values, bitmask, pattern), bias)
        replacements[id(linear)] = layer.train(linear.training)
    replace_modules(model, replacements)


def _check_loaded(name: str, layer: NMLinear) -> None:
    """Raise ValueError unless transformers has given a layer a sound packed weight."""
    if layer.values.dtype not in LOGIT_DTYPES:
        raise ValueError(f"checkpoint: {name}.values: expected one of {LOGIT_DTYPES}, got {layer.values.dtype}")
    if layer.bitmask.dtype != torch.uint8:
        raise ValueError(f"checkpoint: {name}.bitmask: expected torch.uint8, got {layer.bitmask.dtype}")
    try:
        check_bitmask(layer.bitmask, layer.in_features, layer.pattern)
    except ValueError as error:
        raise ValueError(f"checkpoint: {name}.{error}") from error
