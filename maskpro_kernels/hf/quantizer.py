"""Checkpoints with masked, packed and int8 layers: their config, and the quantizer by which transformers loads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..functional.checks import check_in_memory
from ..modules import CounterState, MaskedLinear
from ..ops.pattern import NMPattern
from ..ops.reference import INT4_GROUPS, SCALED
from ..packed import (
    INT4,
    INT8,
    METHOD,
    REPLACING,
    VALUE_KINDS,
    Int8Linear,
    NMLinear,
    PackedNM,
    dense_layer,
    packed_class,
)
from ..unfuse import as_built, as_linears, fit_adapters, is_linear, refuse_merging, replace_modules, unfused_modules

VERSION = 1
HOW_TO_LOAD = "import maskpro_kernels.hf before from_pretrained: transformers alone does not know these layers"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INTEGERS = {INT8: ("I8", torch.int8), INT4: ("U8", torch.uint8)}
COPY_AGAIN = "copy or download the checkpoint again"


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """``quantization_config`` of a model with masked, packed or int8 layers.

    Values that change during learning, such as seed and step, are in the extra state of the modules.

    Args:
        layers: by name, the ``pattern`` of each layer; for a MaskedLinear also ``layer``, its id in the counter; for an
            NMLinear also ``values``, and of "int4" ``group``, as in ``pack_nm``. For an Int8Linear ``values`` alone,
            "int8", which older releases refuse.
        taken_apart: names of unfused modules with such layers, see ``unfuse``.
        shared: other names of layers that are in several places, each with the name in ``layers``.
        version: of the format.
        loading: how to load it with transformers, for readers without this package.

    Raises:
        TypeError, ValueError: an argument is not as above, or this release does not read the version.
    """

    def __init__(self, layers: Mapping[str, Mapping], taken_apart: Sequence[str] = (),
                 shared: Mapping[str, str] | None = None, version: int = VERSION, loading: str = HOW_TO_LOAD,
                 **unknown):  # fmt: skip
        unknown.pop("quant_method", None)
        if version != VERSION or unknown:
            raise ValueError(
                f"quantization_config: expected version {VERSION} without other settings, got version {version!r}"
                f"{f' and {sorted(unknown)}' if unknown else ''}; a newer maskpro_kernels may have written it, install "
                "that one"
            )
        if not isinstance(layers, Mapping) or isinstance(taken_apart, str):
            raise TypeError(f"quantization_config: expected layers by name and a list taken_apart, got {layers!r}")
        for name, layer in layers.items():
            settings = layer if isinstance(layer, Mapping) else {}
            values = settings.get("values", INT8)
            group = settings.get("group", SCALED)
            if "layer" in settings:
                keys = {"pattern", "layer"}
            elif settings.get("values") == INT8 and "pattern" not in settings:
                keys = {"values"}
            elif settings.get("values") == INT4:
                keys = {"pattern", "values", "group"}
            else:
                keys = {"pattern", "values"}
            if set(settings) != keys or values not in VALUE_KINDS or group not in INT4_GROUPS:
                raise ValueError(
                    f"quantization_config: expected the pattern, and layer or values, of {name}, got {layer!r}"
                )
            if "pattern" in layer:
                NMPattern(layer["pattern"])
        shared = {} if shared is None else shared
        if not isinstance(shared, Mapping) or not set(map(str, shared.values())) <= layers.keys():
            raise ValueError(f"quantization_config: expected names in layers of each in shared, got {shared!r}")
        self.quant_method = METHOD
        self.layers = {name: dict(layer) for name, layer in layers.items()}
        self.taken_apart = list(taken_apart)
        self.shared = dict(shared)
        self.version = version
        self.loading = loading

    @classmethod
    def from_model(cls, model: nn.Module) -> SparseConfig | None:
        """Make the config of a model's masked, packed and int8 layers; None if it has none."""
        layers = {}
        shared = {}
        first_names = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if not isinstance(module, REPLACING):
                continue
            if first_names.setdefault(module, name) != name:
                shared[name] = first_names[module]
            elif isinstance(module, MaskedLinear):
                layers[name] = {"pattern": str(module.pattern), "layer": module.layer}
            elif isinstance(module, Int8Linear):
                layers[name] = {"values": INT8}
            else:
                group = {"group": module.packed.group} if module.kind == INT4 else {}
                layers[name] = {"pattern": str(module.pattern), "values": module.kind, **group}
        # dense modules may stay unfused because of adapters of peft
        unfused = unfused_modules(model)
        return cls(layers, unfused, shared) if layers or unfused else None


def describe(model: nn.Module) -> None:
    """Set ``config.quantization_config`` of the transformers models in a model by their current layers.

    ``from_pretrained`` reads it. ``convert``, ``finalize``, ``pack`` and ``save_model`` call this function. After other
    changes of layers, or if only a part of a model was converted, call it before ``save_pretrained``. By the config an
    output layer in int8 is not tied to the embedding.

    Raises:
        ValueError: if another library has quantized one of the models.
    """
    check_not_quantized(model)
    configs = set()
    for module in model.modules():
        # parts share the config of the whole model, which comes first
        if not isinstance(module, PreTrainedModel) or id(module.config) in configs:
            continue
        configs.add(id(module.config))
        if isinstance(module.get_output_embeddings(), Int8Linear):
            for config in (module.config, module.config.get_text_config()):
                config.tie_word_embeddings = False
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
        config = SparseConfig.from_model(module)
        if config is not None:
            module.config.quantization_config = config
        elif getattr(module.config, "quantization_config", None) is not None:
            if getattr(module, "hf_quantizer", None) is not None:
                module.hf_quantizer.remove_quantization_config(module)
            else:
                del module.config.quantization_config


def guarded_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """State dict of a model with packed or int8 layers and a weight of the wrong shape; None if it has no such layer.

    Without this package transformers skips a quantization that it does not know, and makes random weights for packed
    layers. A weight of another shape than its layer's is an error.
    """
    for name, module in model.named_modules():
        if isinstance(module, (NMLinear, Int8Linear)):
            dtype = module.scales.dtype if isinstance(module, Int8Linear) else module.packed.dtype
            return {**model.state_dict(), f"{name}.weight": torch.zeros(1, dtype=dtype)}
    return None


def check_not_quantized(model: nn.Module) -> None:
    """Raise ValueError if another library has quantized a transformers model: a config describes one quantization."""
    for module in model.modules():
        config = getattr(getattr(module, "config", None), "quantization_config", None)
        if isinstance(module, PreTrainedModel) and config is not None and not isinstance(config, SparseConfig):
            raise ValueError(
                f"model: expected a config without quantization_config, got {type(config).__name__}, with which "
                "masks cannot be saved"
            )


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Quantizer that makes MaskedLinear, NMLinear and Int8Linear modules, and checks them after weights are loaded.

    Such layers can be saved, trained and compiled. Each is on one device as a whole.
    """

    # a dense checkpoint cannot be converted during loading, only by ``convert`` and ``finalize``
    requires_calibration = True
    quantization_config: SparseConfig

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        return guarded_state_dict(model), {}

    def preprocess_model(self, model: PreTrainedModel, *args, **kwargs) -> None:
        """Prepare a model for its weights; ValueError if layers would be split over devices."""
        config = getattr(model.config, "distributed_config", None)
        split = {name: getattr(config, name, None) for name in ("tp_size", "tp_plan", "ep_size", "ep_plan")}
        split = [f"{name}={value!r}" for name, value in split.items() if value not in (None, 1, {})]
        if split:
            raise ValueError(
                "distributed_config: expected whole layers of a checkpoint with masked or packed weights, got "
                f"{', '.join(split)}; write a dense checkpoint by finalize or `maskpro export`, which transformers can "
                "split"
            )
        super().preprocess_model(model, *args, **kwargs)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        layers = self.quantization_config.layers
        # dtypes by name of the tensor, in the spelling of safetensors
        stored = {}
        states = []
        for file in checkpoint_files or ():
            try:
                with safe_open(file, framework="pt") as opened:
                    stored |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
                    states += [opened.get_tensor(name) for name in opened.keys() if name.endswith("._extra_state")]
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"checkpoint: expected a whole safetensors file, got {str(file)!r}: {error}"
                ) from error
        masked = [name for name, layer in layers.items() if "layer" in layer]
        self._extra_states = _by_id(states) if masked else {}
        check_stored(stored, layers)
        ids = [layers[name]["layer"] for name in masked]
        if sorted(self._extra_states) != sorted(ids):
            raise ValueError(
                "checkpoint: expected the extra state of each masked layer, with a layer id of its own, got ids "
                f"{sorted(self._extra_states)} for {len(masked)} layers; save the model again with other layer ids"
            )
        try:
            as_linears(model, list(_model_names(model, self.quantization_config.taken_apart).values()))
        except ValueError as error:
            raise ValueError(f"quantization_config: taken_apart: {error}") from error
        if layers or not self.quantization_config.taken_apart:
            dtypes = {FLOATS.get(kind) for name, kind in stored.items() if masked and name.endswith(".logits")}
            if None in dtypes:
                raise ValueError(f"checkpoint: expected logits of {' or '.join(FLOATS)}, got others")
            logits_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
            put_empty_layers(model, layers, logits_dtype)
        # the weight of ``guarded_state_dict``
        kinds = NMLinear, Int8Linear
        names = "|".join(re.escape(name) for name, module in model.named_modules() if isinstance(module, kinds))
        model._keys_to_ignore_on_load_unexpected.add(rf"^({names})\.weight$")
        shared = self.quantization_config.shared
        modules = dict(model.named_modules(remove_duplicate=False))
        names_of_layers = _model_names(model, shared.values())
        self._shared = {alias: names_of_layers[shared[name]] for name, alias in _model_names(model, shared).items()}
        for alias, name in self._shared.items():
            # some models put one module in both places themselves
            if not isinstance(modules.get(alias), nn.Linear) and modules.get(alias) is not modules[name]:
                raise ValueError(f"quantization_config: shared: expected names of nn.Linear modules, got {alias!r}")
            # no parameters while weights are loaded: the checkpoint has each tensor under one name
            model.set_submodule(alias, nn.Identity())
            for parameter in ("weight", "bias"):
                model.all_tied_weights_keys.pop(f"{alias}.{parameter}", None)
            # of the extra state, which is stored under each name
            model._keys_to_ignore_on_load_unexpected.add(re.escape(f"{alias}."))
        # for missing tensors transformers would only warn and set random values
        names = {_bare_name(name, model) for name in stored}
        for module in unfused_modules(model) if layers else ():
            for name, layer in model.get_submodule(module).named_modules(prefix=module):
                if type(layer) is nn.Linear and _bare_name(f"{name}.weight", model) not in names:
                    raise ValueError(
                        f"checkpoint: expected the matrices of {module}, unfused by its quantization_config, "
                        f"got none of {name}; write it again by save_pretrained"
                    )

    def _process_model_after_weight_loading(self, model, **kwargs):
        for alias, name in self._shared.items():
            model.set_submodule(alias, model.get_submodule(name))
        states: dict[torch.device, CounterState] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, (NMLinear, Int8Linear)):
                try:
                    if isinstance(layer, Int8Linear):
                        layer.check()
                    elif not layer.bitmask.is_meta:
                        layer.packed.check()
                        layer.convert_bitmask()
                except (TypeError, ValueError) as error:
                    raise ValueError(f"checkpoint: {name}.{error}") from error
                # frozen as after ``finalize``; transformers makes all parameters trainable
                layer.requires_grad_(False)
            elif isinstance(layer, MaskedLinear):
                # accelerate moves an offloaded layer to its device for each forward
                device = torch.device("cpu") if layer.weight.is_meta else layer.weight.device
                layer.counter_state = states.setdefault(device, CounterState(device=device))
                # loading leaves buffers that are not stored uninitialized
                layer.layer_id = torch.empty((), dtype=torch.int64, device=device)
                state = self._extra_states[layer.layer]
                whole = [layer.pattern.n, layer.pattern.m, layer.group_offset, layer.group_row_stride]
                if [*state[1:3].tolist(), *state[5:7].tolist()] != whole:
                    raise ValueError(
                        f"checkpoint: expected the extra state of a whole {layer.pattern} layer, got {state} of {name}"
                    )
                layer.set_extra_state(state)
                for parameter in (layer.weight, layer.bias):
                    if parameter is not None:
                        parameter.requires_grad_(False)
        return model

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Make a model's layers dense in place, with exact zeros for dropped weights.

        Args:
            model: with masked, packed or int8 layers.
            dtype: of its weights; None: unchanged.

        Raises:
            ValueError: if a weight is not in memory. The model is then unchanged.
        """
        return super().dequantize(model, model.dtype if dtype is None else dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, REPLACING)}
        for name, layer in layers.items():
            check_in_memory("model", layer, name, layer.weight if isinstance(layer, MaskedLinear) else layer.values)
        with torch.no_grad():
            dense = {id(layer): dense_layer(layer) for layer in layers.values()}
        replace_modules(model, dense)
        as_built(model)
        fit_adapters(model)
        refuse_merging(model, REPLACING)
        # not by `model.to`, which would round the frequencies of the rotary embedding, and tensors kept in float32
        dtypes = {linear.weight.dtype for linear in dense.values()}
        for parameter in model.parameters():
            if parameter.dtype in dtypes:
                parameter.data = parameter.data.to(dtype)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                for name in ("_is_quantized", "quantization_config"):
                    vars(module.config).pop(name, None)
        return model

    def is_serializable(self) -> bool:
        return True

    # properties of the base class
    is_trainable = is_qat_trainable = is_compileable = True


def put_empty_layers(model: nn.Module, layers: Mapping[str, Mapping], logits_dtype: torch.dtype) -> None:
    """Replace nn.Linear modules by the layers of a SparseConfig, on the meta device."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    replacements = {}
    modules = dict(model.named_modules())
    state = CounterState(device="meta")
    for name, model_name in _model_names(model, layers).items():
        linear = modules.get(model_name)
        if linear is None or not is_linear(linear):
            raise ValueError(
                f"quantization_config: expected names of nn.Linear modules of {type(model).__name__}, got {name!r}, "
                f"which is {'none of its modules' if linear is None else type(linear).__name__}"
            )
        rows, k = linear.weight.shape
        dtype = linear.weight.dtype
        bias = None if linear.bias is None else empty(rows, dtype=dtype)
        if "pattern" not in layers[name]:
            values = empty(rows, k, dtype=torch.int8)
            layer = Int8Linear(values, empty(rows, -(-k // SCALED), dtype=dtype), bias)
            replacements[id(linear)] = layer.train(linear.training)
            continue
        pattern = NMPattern(layers[name]["pattern"])
        if k % pattern.m:
            raise ValueError(
                f"quantization_config: expected in_features divisible by {pattern.m} for {pattern}, got {k} in {name}"
            )
        if "layer" in layers[name]:
            weight = empty(rows, k, dtype=dtype)
            logits = empty(rows, k, dtype=logits_dtype)
            try:
                layer = MaskedLinear(weight, bias, logits, pattern, layer=layers[name]["layer"], counter_state=state)
            except (TypeError, ValueError) as error:
                raise ValueError(f"quantization_config: {name}: {error}") from error
        else:
            kind = layers[name]["values"]
            count = k // pattern.m * pattern.n
            _, values_dtype = INTEGERS.get(kind, (None, dtype))
            values = empty(rows, count // 2 if kind == INT4 else count, dtype=values_dtype)
            group = layers[name].get("group", SCALED)
            scales = empty(rows, -(-count // group), dtype=dtype) if kind in INTEGERS else None
            packed = PackedNM(values, empty(rows, -(-k // 8), dtype=torch.uint8), pattern, scales)
            layer = packed_class(pattern)(packed, bias)
        replacements[id(linear)] = layer.train(linear.training)
    if not replacements:
        raise ValueError("quantization_config: expected the name of at least one nn.Linear, got none")
    replace_modules(model, replacements)


def _bare_name(name: str, model: nn.Module) -> str:
    """Name without the prefix of the base model, as transformers matches names."""
    return name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def _model_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Map names of a checkpoint's modules to those of the model; an unknown name stays unchanged.

    The checkpoint may have a head that the model lacks, or another one. Modules of the checkpoint's head are then left
    out, as transformers leaves out their weights.
    """
    names_by_bare = {_bare_name(name, model): name for name, _ in model.named_modules()}
    architectures = getattr(getattr(model, "config", None), "architectures", None)
    same_class = not architectures or type(model).__name__ in architectures
    children = {name.split(".")[0] for name in names_by_bare}
    bare_names = {name: _bare_name(name, model) for name in names}
    return {
        name: names_by_bare.get(bare, name)
        for name, bare in bare_names.items()
        if same_class or bare.split(".")[0] in children
    }


def check_stored(stored: Mapping[str, str], layers: Mapping[str, Mapping]) -> None:
    """Raise ValueError unless the checkpoint has as many tensors of each kind as the config's layers need."""
    # compare numbers, not names: transformers renames some tensors when it loads them
    if any(".base_layer." in name for name in stored):
        raise ValueError(
            "checkpoint: expected one without adapters of peft, got base_layer in the names of its tensors; save the "
            "adapter by save_pretrained of the PeftModel, and the model that its unload() returns"
        )
    kinds = [layer.get("values", "masked") for layer in layers.values() if "pattern" in layer]
    masked = kinds.count("masked")
    scaled = sum(kind in INTEGERS for kind in kinds)
    # the extra state is checked by layer ids
    expected = {"logits": masked} if masked else {}
    packed = len(kinds) - masked
    companions = {"values": "bitmask", "scales": "bitmask", "bitmask": "values"}
    for tensor, count in (expected | {"values": packed, "bitmask": packed, "scales": scaled}).items():
        modules = [name.rpartition(".")[0] for name in stored if name.endswith(f".{tensor}")]
        if tensor in companions:
            # other modules may have tensors of these names, and a shared layer has a bitmask under each name
            modules = [name for name in modules if f"{name}.{companions[tensor]}" in stored]
        if len(modules) != count:
            raise ValueError(
                f"checkpoint: expected {tensor} of {count} layers by its quantization_config, got {len(modules)}; "
                f"{COPY_AGAIN}, with its config.json; if the model is dense and shared its config with a sparse "
                "one, remove quantization_config"
            )
        for name in modules if tensor == "scales" else ():
            # transformers would cast them silently
            dtypes = dict(INTEGERS[kind] for kind in INTEGERS if kind in kinds)
            if stored.get(f"{name}.values") not in dtypes:
                expected = " or ".join(map(str, dtypes.values()))
                raise ValueError(f"checkpoint: {name}.values: expected {expected} beside scales; {COPY_AGAIN}")
    in_int8 = len(names_in_int8(stored))
    if in_int8 != len(layers) - len(kinds):
        raise ValueError(
            f"checkpoint: expected int8 values and scales of {len(layers) - len(kinds)} layers without a bitmask by "
            f"its quantization_config, got {in_int8}; {COPY_AGAIN}, with its config.json"
        )


def names_in_int8(stored: Mapping[str, str]) -> list[str]:
    """Names of the layers with int8 values of all weights in a checkpoint, from the dtypes of its tensors."""
    with_values = [name.removesuffix(".values") for name, dtype in stored.items() if dtype == "I8"]
    return [name for name in with_values if f"{name}.scales" in stored and f"{name}.bitmask" not in stored]


def _by_id(states: Sequence[Tensor]) -> dict[int, Tensor]:
    """Extra state of each masked layer by its id."""
    for state in states:
        if state.shape != (8,):
            raise ValueError(f"checkpoint: expected extra state of shape [8], got {list(state.shape)}")
    counts = {tuple(state[3:5].tolist()) for state in states}
    if len(counts) > 1:
        raise ValueError(f"checkpoint: expected one seed and one step for all layers, got {sorted(counts)}")
    return {int(state[0]): state for state in states}
