"""LoRA for masked, packed and int8 layers.

peft adds LoRA to MaskedLinear, NMLinear and Int8Linear modules, like to nn.Linear, by a configuration that
``beside_masks`` has prepared; nothing of peft itself changes. The import raises ModuleNotFoundError without the extra
``peft``.
"""

from __future__ import annotations

import copy
import re

from torch import nn

from .extras import require
from .modules import MaskedLinear
from .packed import REPLACING, SPARSE, Int8Linear, NMLinear
from .unfuse import ExpertLinears, refuse_merging

try:
    from peft import LoraConfig, PeftMixedModel, PeftModel
except ModuleNotFoundError:
    require("maskpro_kernels.peft", "peft")
    raise
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND

# Other values compute the adapter from the base weight, or change this weight
INITIAL_WEIGHTS = (True, False, "gaussian")


# peft recognises a linear layer by "Linear" in the name of its class
class SparseLoraLinear(lora.Linear):
    """LoRA of a MaskedLinear, an NMLinear or an Int8Linear, which does not merge.

    Raises:
        ValueError: if an adapter would read or change the base weight: DoRA, KaSA, or initial weights that depend on
            it.
    """

    def __init__(
        self, base_layer: MaskedLinear | NMLinear | Int8Linear, adapter_name: str, config: LoraConfig, **kwargs
    ):
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        refuse_merging(self, REPLACING)

    def _get_in_out_features(self, module: MaskedLinear | NMLinear | Int8Linear) -> tuple[int, int]:
        # peft warns about unknown layers
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs) -> None:
        """Add an adapter; peft calls this for the first one too."""
        _check_leaves_base_weight(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)


def beside_masks(config: LoraConfig, model: nn.Module | None = None) -> LoraConfig:
    """Let a configuration add LoRA to MaskedLinear, NMLinear and Int8Linear modules.

    peft takes classes for other layers from each configuration, and does not save them: a loaded one needs this call
    too.

    Args:
        config: for ``get_peft_model``, mixed or not, ``add_adapter``, and ``load_adapter`` or ``from_pretrained`` of a
            saved adapter.
        model: the one that gets the adapter; it may have others. Needed for the target "all-linear" and if ``convert``
            has unfused its experts.

    Returns:
        ``config``; or if peft alone would choose other targets in ``model``, a copy that names them.

    Raises:
        TypeError: if ``config`` is no LoraConfig.
        ValueError: if an adapter does not work with such a layer, see ``SparseLoraLinear``, or the model is missing.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected peft.LoraConfig, got {type(config).__name__}")
    _check_leaves_base_weight(config)
    if model is None and _is_all_linear(config):
        raise ValueError("model: expected the one that gets the adapter, for target_modules='all-linear', got None")
    config._register_custom_module(dict.fromkeys(REPLACING, SparseLoraLinear))
    if isinstance(model, (PeftModel, PeftMixedModel)):
        model = model.base_model.model
    if model is None or not config.target_modules or not _sparse_layers(model):
        return config
    return _resolved(model, config)


def _is_all_linear(config: LoraConfig) -> bool:
    return str(config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def _sparse_layers(model: nn.Module) -> set[str]:
    """Names of the masked and packed layers; of those with adapters the names of peft's layers around them."""
    modules = dict(model.named_modules())
    adapted = {name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    bases = modules | {name: module.get_base_layer() for name, module in adapted.items()}
    prefixes = tuple(f"{name}." for name in adapted)
    return {name for name, base in bases.items() if isinstance(base, SPARSE) and not name.startswith(prefixes)}


def _resolved(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Copy a configuration, with names of modules as targets, if peft alone would choose others."""
    targets = config.target_modules
    modules = dict(model.named_modules())
    all_linear = _is_all_linear(config)
    experts = any(isinstance(module, ExpertLinears) for module in modules.values())
    if not (all_linear or experts):
        return config
    config = copy.copy(config)
    gate = LoraConfig(target_modules=["gate"])
    if experts:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        # of some models peft translates targets, like routers, and shortens patterns to last parts of names
        convert_peft_config_for_transformers(gate, model, None)
    translated = "gate" not in gate.target_modules
    unmatched = {"gate"} - gate.target_modules
    if all_linear:
        names = _maybe_include_all_linear_layers(config, model).target_modules | _sparse_layers(model)
    else:
        names = {name for name in modules if check_target_module_exists(config, name)}
        lists = {name for name in names if isinstance(modules[name], nn.ModuleList)}
        names = names - lists | {f"{name}.{expert}" for name in lists for expert in range(len(modules[name]))}
        listed = () if isinstance(targets, str) else targets
        unmatched = {target for target in listed if not any(f".{name}".endswith(f".{target}") for name in modules)}
    if names:
        # a pattern, since a listed name is also the end of others; names are those in the chosen blocks already
        config.target_modules = names | unmatched if translated else "|".join(map(re.escape, sorted(names)))
        config.layers_to_transform = config.layers_pattern = None
    return config


def _check_leaves_base_weight(config: LoraConfig) -> None:
    """Raise ValueError if an adapter would read or change the base weight."""
    # the second one is in newer releases of peft
    for name, allowed in (("use_dora", (False,)), ("kasa_config", (None,)), ("init_lora_weights", INITIAL_WEIGHTS)):
        value = getattr(config, name, None) or allowed[0]
        if value not in allowed:
            expected = f"one of {allowed}" if len(allowed) > 1 else allowed[0]
            raise ValueError(f"{name}: expected {expected} for a masked or packed layer, got {value!r}")
