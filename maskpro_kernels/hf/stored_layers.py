"""What a model's config says of its masked and packed layers, so that ``save_pretrained`` loses none."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..modules import MaskedLinear, masked_layers
from ..packed import NMLinear
from .masked import MaskedConfig
from .packed import PackedConfig


def tell_config(model: nn.Module) -> None:
    """Have the config of a model, or of those within it, tell of its masked and packed layers.

    ``from_pretrained`` then gives them back once ``maskpro_kernels.hf`` is imported, and refuses the checkpoint where
    it is not.
    """
    for outermost in _pretrained_models(model):
        packed = {name: module for name, module in outermost.named_modules() if isinstance(module, NMLinear)}
        if any(isinstance(module, MaskedLinear) for module in outermost.modules()):
            outermost.config.quantization_config = MaskedConfig.of(masked_layers(outermost))
        elif packed:
            outermost.config.quantization_config = PackedConfig.of(packed)
        elif isinstance(getattr(outermost.config, "quantization_config", None), (PackedConfig, MaskedConfig)):
            _forget(outermost)


def check_can_be_stored(model: nn.Module) -> None:
    """Raise ValueError if a checkpoint of the model would not give all of it back."""
    kinds = {type(module) for module in model.modules()}
    if MaskedLinear in kinds and any(issubclass(kind, NMLinear) for kind in kinds):
        raise ValueError("model: expected masked or packed layers, got both; finalize it, or unpack it, first")
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear) and module.is_shard:
            raise ValueError(f"model: expected whole layers, got a shard in {name}")


def _pretrained_models(model: nn.Module) -> list[PreTrainedModel]:
    """The model itself, or those that it wraps: no parts of others."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in _pretrained_models(child)]


def _forget(model: PreTrainedModel) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    else:
        del model.config.quantization_config
