"""LoRA beside masked and packed layers.

The import raises ModuleNotFoundError without peft, of the extra ``peft``.
"""

from __future__ import annotations

from .adapters import refuse_merging
from .extras import require
from .modules import MaskedLinear
from .packed import NMLinear

try:
    from peft import LoraConfig
except ModuleNotFoundError:
    require("maskpro_kernels.peft", "peft")
    raise
from peft.tuners import lora

# Others compute the adapter from the base weight, or change that weight
INITIAL_WEIGHTS = (True, False, "gaussian")


class SparseLora(lora.Linear):
    """LoRA beside a MaskedLinear or an NMLinear, which does not merge.

    Raises:
        ValueError: if the configuration asks for DoRA, or for initial weights that depend on the base weight.
    """

    def __init__(self, base_layer: MaskedLinear | NMLinear, adapter_name: str, config: LoraConfig, **kwargs):
        if config.use_dora:
            raise ValueError("use_dora: expected False beside a masked layer, whose weight has no fixed norm, got True")
        if config.init_lora_weights not in INITIAL_WEIGHTS:
            raise ValueError(
                f"init_lora_weights: expected one of {INITIAL_WEIGHTS} beside a masked layer, got "
                f"{config.init_lora_weights!r}"
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        refuse_merging(self, (MaskedLinear, NMLinear))


def beside_masks(config: LoraConfig) -> LoraConfig:
    """The configuration itself, once it lets LoRA stand beside MaskedLinear and NMLinear modules.

    For ``get_peft_model(model, beside_masks(config))``, and for an adapter that was saved:
    ``PeftModel.from_pretrained(model, folder, config=beside_masks(LoraConfig.from_pretrained(folder)))``.

    Raises:
        TypeError: if ``config`` is no LoraConfig.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module({MaskedLinear: SparseLora, NMLinear: SparseLora})
    return config
