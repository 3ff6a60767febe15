"""Checkpoints with packed N:M weights: how they are described, and how transformers loads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.quantizers import register_quantization_config, register_quantizer

from ..functional.checks import LOGIT_DTYPES
from ..ops.reference import SCALED
from ..packed import INT8, KEEP, VALUE_KINDS, NMLinear, PackedNM, check_content, hold_in_huge_pages, packed_class
from ..pattern import NMPattern
from ..replacement import replace_modules
from ..stored_digests import PACKED_METHOD
from .quantizer import SparseConfig, SparseQuantizer
from .stored_files import (
    HOW_TO_LOAD,
    check_all_stored,
    check_dense_parts_stored,
    check_digests,
    check_names,
    check_own_settings,
    check_scales_stored,
    linears_named,
    stored_dtypes,
    take_apart,
)

PACKED_FORMAT, PACKED_VERSION = "nm-bitmask", 1


class StoredAs(NamedTuple):
    """How a packed layer is stored: its pattern, and the kind of its values, one of VALUE_KINDS."""

    pattern: NMPattern
    values: str = KEEP


@register_quantization_config(PACKED_METHOD)
class PackedConfig(SparseConfig):
    """``quantization_config`` of a checkpoint with packed weights, see ``PackedNM``.

    Args:
        patterns: names of the packed nn.Linear modules, by "N:M".
        values: how the values of all these are stored, "keep" or "int8" as in ``pack_nm``; or names of the modules by
            such kinds, where what is not named is kept.
        taken_apart: names of the modules that hold some of them and were built otherwise, see ``unfuse``.
        digests: of what is stored, see ``stored_digests``.
        format, version: of what is stored.
        loading: for who reads the checkpoint without this package: what transformers needs to load it.

    Raises:
        TypeError, ValueError: an argument is not as above, or of a format or version that this release does not know.
    """

    def __init__(
        self,
        patterns: Mapping[str, Sequence[str]],
        taken_apart: Sequence[str] = (),
        values: str | Mapping[str, Sequence[str]] = KEEP,
        digests: Mapping[str, Mapping[str, str]] | None = None,
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
        self.values = _checked_kinds(values, [name for names in self.patterns.values() for name in names])
        self.taken_apart = check_names("taken_apart", taken_apart)
        self.digests = check_digests(digests)
        self.format, self.version, self.loading = format, version, loading

    @classmethod
    def of(cls, layers: Mapping[str, NMLinear], taken_apart: Sequence[str]) -> PackedConfig:
        """Of a model's packed layers by name."""
        patterns: dict[str, list[str]] = {}
        kinds: dict[str, list[str]] = {}
        for name, layer in layers.items():
            patterns.setdefault(str(layer.pattern), []).append(name)
            kinds.setdefault(layer.kind, []).append(name)
        return cls(patterns, taken_apart, next(iter(kinds), KEEP) if len(kinds) < 2 else {INT8: kinds[INT8]})

    @property
    def layers(self) -> dict[str, StoredAs]:
        """How each layer is stored."""
        kinds = {} if isinstance(self.values, str) else {n: kind for kind, names in self.values.items() for n in names}
        others = self.values if isinstance(self.values, str) else KEEP
        return {
            name: StoredAs(NMPattern(pattern), kinds.get(name, others))
            for pattern, names in self.patterns.items()
            for name in names
        }


def _checked_kinds(values: object, layers: Collection[str]) -> str | dict[str, list[str]]:
    """``values`` of a PackedConfig; ValueError unless it gives each of these layers one known kind."""
    kinds = [values] if isinstance(values, str) else list(values) if isinstance(values, Mapping) else [values]
    for kind in kinds:
        if kind not in VALUE_KINDS:
            raise ValueError(
                f"quantization_config: expected values to be one of {', '.join(VALUE_KINDS)}, or names of modules by "
                f"these, got {kind!r}; a newer maskpro_kernels may have written it"
            )
    if isinstance(values, str):
        return values
    named = {kind: check_names(f"values of {kind}", names) for kind, names in values.items()}
    known, seen = set(layers), set()
    for name in (name for names in named.values() for name in names):
        if name not in known or name in seen:
            found = "twice" if name in seen else "which has no pattern"
            raise ValueError(f"quantization_config: expected values of each packed layer once, got {name!r} {found}")
        seen.add(name)
    return named


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
            stored = stored_dtypes(checkpoint_files)
            check_all_stored(stored, ("values", "bitmask"), layers)
            check_scales_stored(stored, [name for name, how in layers.items() if how.values == INT8])
            if layers:
                check_dense_parts_stored(model, stored)
        self._check_digests(checkpoint_files)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in model.named_modules():
            if isinstance(module, NMLinear):
                if not module.bitmask.is_meta:
                    _check_loaded(name, module)
                # as ``finalize`` leaves it; transformers makes all parameters trainable
                module.requires_grad_(False)
        hold_in_huge_pages(model)
        return model


def replace_by_packed(model: nn.Module, layers: Mapping[str, StoredAs]) -> None:
    """Put empty NMLinear modules on the meta device in the place of nn.Linear.

    Args:
        model: on the meta device, say.
        layers: how each is stored, by the name that a checkpoint has for it.

    Raises:
        ValueError: if one of the names is of no nn.Linear, or a pattern does not fit.
    """
    replacements = {}
    for name, linear in linears_named(model, layers).items():
        pattern, kind = layers[name]
        rows, k = linear.weight.shape
        if k % pattern.m:
            raise ValueError(
                f"quantization_config: expected in_features divisible by {pattern.m} for {pattern}, got {k} in {name}"
            )
        dtype, kept = linear.weight.dtype, k // pattern.m * pattern.n
        values = _empty(rows, kept, dtype=torch.int8 if kind == INT8 else dtype)
        scales = _empty(rows, -(-kept // SCALED), dtype=dtype) if kind == INT8 else None
        packed = PackedNM(values, _empty(rows, -(-k // 8), dtype=torch.uint8), pattern, scales)
        layer = packed_class(pattern)(packed, None if linear.bias is None else _empty(rows, dtype=dtype))
        replacements[id(linear)] = layer.train(linear.training)
    replace_modules(model, replacements)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _check_loaded(name: str, layer: NMLinear) -> None:
    """Raise ValueError unless transformers has given a layer a sound packed weight."""
    expected = {"values": LOGIT_DTYPES, "bitmask": (torch.uint8,)}
    if layer.kind == INT8:
        expected |= {"values": (torch.int8,), "scales": LOGIT_DTYPES}
    for part, dtypes in expected.items():
        found = getattr(layer, part).dtype
        if found not in dtypes:
            raise ValueError(f"checkpoint: {name}.{part}: expected {' or '.join(map(str, dtypes))}, got {found}")
    try:
        check_content(layer.bitmask, layer.scales, layer.in_features, layer.pattern)
    except ValueError as error:
        raise ValueError(f"checkpoint: {name}.{error}") from error
