"""LoRA for masked and packed layers.

After ``import maskpro_kernels.peft`` peft adds LoRA to MaskedLinear and NMLinear modules, like to nn.Linear: by
``get_peft_model`` and ``PeftModel.from_pretrained``, and by transformers' ``add_adapter``, ``load_adapter`` and
``from_pretrained`` of an adapter's folder. The import raises ModuleNotFoundError without the extra ``peft``.
"""

from __future__ import annotations

import copy
import re

from torch import nn

from .extras import require
from .modules import MaskedLinear
from .packed import SPARSE, NMLinear
from .unfuse import ExpertLinears, refuse_merging

try:
    from peft import LoraConfig
except ModuleNotFoundError:
    require("maskpro_kernels.peft", "peft")
    raise
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND

# Others compute the adapter from the base weight, or change this weight
INITIAL_WEIGHTS = (True, False, "gaussian")


# peft recognises a linear layer by "Linear" in the name of its class
class SparseLoraLinear(lora.Linear):
    """LoRA of a MaskedLinear or an NMLinear, which does not merge.

    Raises:
        ValueError: if an adapter would read or change the base weight: DoRA, KaSA, or initial weights that depend on
            it.
    """

    def __init__(self, base_layer: MaskedLinear | NMLinear, adapter_name: str, config: LoraConfig, **kwargs):
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        refuse_merging(self, SPARSE)

    def _get_in_out_features(self, module: MaskedLinear | NMLinear) -> tuple[int, int]:
        # peft warns about unknown layers
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs) -> None:
        """Add an adapter; peft calls this for the first one too."""
        _check_leaves_base_weight(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)


class SparseLoraModel(lora.LoraModel):
    """LoraModel with support of masked and packed layers, also by "all-linear".

    Raises:
        ValueError: if an adapter does not work with such a layer, see ``SparseLoraLinear``. The model does not change.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Add an adapter to its targets; peft calls this for each adapter."""
        config = self.peft_config[adapter_name]
        if config.target_modules and _sparse_layers(model):
            self.peft_config[adapter_name] = _resolved(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: LoraConfig, model_config: dict) -> LoraConfig:
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        sparse = _sparse_layers(self.model)
        if not sparse:
            return peft_config
        if any(self._check_target_module_exists(peft_config, name) for name in sparse):
            _check_leaves_base_weight(peft_config)
        return beside_masks(peft_config)


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = SparseLoraModel


def beside_masks(config: LoraConfig) -> LoraConfig:
    """Let a configuration add LoRA to MaskedLinear and NMLinear modules, and return it.

    The import of this module is enough if all adapters are LoRA. With adapters of several kinds, by
    ``get_peft_model(..., mixed=True)``, each configuration needs this call.

    Raises:
        TypeError: if ``config`` is no LoraConfig.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module(dict.fromkeys(SPARSE, SparseLoraLinear))
    return config


def _sparse_layers(model: nn.Module) -> set[str]:
    """Names of the masked and packed layers; of those with adapters the names of peft's layers around them."""
    modules = dict(model.named_modules())
    adapted = {name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    bases = modules | {name: module.get_base_layer() for name, module in adapted.items()}
    within = tuple(f"{name}." for name in adapted)
    return {name for name, base in bases.items() if isinstance(base, SPARSE) and not name.startswith(within)}


def _resolved(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Copy a configuration, with names of modules as targets, if peft alone would choose others."""
    targets = config.target_modules
    modules = dict(model.named_modules())
    every = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    experts = any(isinstance(module, ExpertLinears) for module in modules.values())
    if not (every or experts):
        return config
    config = copy.copy(config)
    gate = LoraConfig(target_modules=["gate"])
    if experts:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        # of some models peft translates targets, like routers, and shortens patterns to last parts of names
        convert_peft_config_for_transformers(gate, model, None)
    translated = others = {"gate"} - gate.target_modules
    if every:
        names = _maybe_include_all_linear_layers(config, model).target_modules | _sparse_layers(model)
    else:
        names = {name for name in modules if check_target_module_exists(config, name)}
        lists = {name for name in names if isinstance(modules[name], nn.ModuleList)}
        names = names - lists | {f"{name}.{expert}" for name in lists for expert in range(len(modules[name]))}
        listed = () if isinstance(targets, str) else targets
        others = {target for target in listed if not any(f".{name}".endswith(f".{target}") for name in modules)}
    if names:
        # a pattern, since a listed name is also the end of others; names are those in the chosen blocks already
        config.target_modules = names | others if translated else "|".join(map(re.escape, sorted(names)))
        config.layers_to_transform = config.layers_pattern = None
    return config


def _check_leaves_base_weight(config: LoraConfig) -> None:
    """Raise ValueError if an adapter would read or change the base weight."""
    # the second one is in newer releases of peft
    for name, allowed in (("use_dora", (False,)), ("kasa_config", (None,)), ("init_lora_weights", INITIAL_WEIGHTS)):
        if (got := getattr(config, name, None) or allowed[0]) not in allowed:
            expected = f"one of {allowed}" if len(allowed) > 1 else allowed[0]
            raise ValueError(f"{name}: expected {expected} for a masked or packed layer, got {got!r}")
