"""Checkpoints with masked and with packed layers: what their config says, and how transformers loads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..fsdp import check_in_memory
from ..modules import CounterState, MaskedLinear
from ..ops.pattern import NMPattern
from ..ops.reference import SCALED
from ..packed import INT8, SPARSE, VALUE_KINDS, NMLinear, PackedNM, dense_layer, hold_in_huge_pages, packed_class
from ..unfuse import as_built, as_linears, fit_adapters, refuse_merging, replace_modules, taken_apart

METHOD, VERSION = "maskpro", 1
HOW_TO_LOAD = "import maskpro_kernels.hf, of the package maskpro-kernels[hf], before from_pretrained"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
COPY_AGAIN = "copy or download the checkpoint again"


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """``quantization_config`` of a model with masked or packed layers.

    What changes as masks are learned, seed and step among it, is in the extra state of the modules.

    Args:
        layers: of each layer by name its ``pattern``, and ``layer``, the id in the counter, of a MaskedLinear, or
            ``values``, "keep" or "int8" as in ``pack_nm``, of an NMLinear.
        taken_apart: names of the modules that hold some of them and were built otherwise, see ``unfuse``.
        version: of the format.
        loading: says what transformers needs to load it, to readers without this package.

    Raises:
        TypeError, ValueError: an argument is not as above, or of a version that this release does not know.
    """

    def __init__(self, layers: Mapping[str, Mapping], taken_apart: Sequence[str] = (),
                 version: int = VERSION, loading: str = HOW_TO_LOAD, **others):  # fmt: skip
        others.pop("quant_method", None)
        if version != VERSION or others:
            raise ValueError(
                f"quantization_config: expected version {VERSION} without other settings, got version {version!r} and "
                f"{sorted(others) or 'none'}; a newer maskpro_kernels may have written it"
            )
        if not isinstance(layers, Mapping) or isinstance(taken_apart, str):
            raise TypeError(f"quantization_config: expected layers by name and a list taken_apart, got {layers!r}")
        for name, layer in layers.items():
            kind = set(layer) - {"pattern"} if isinstance(layer, Mapping) else set()
            if kind not in ({"layer"}, {"values"}) or layer.get("values", INT8) not in VALUE_KINDS:
                raise ValueError(
                    f"quantization_config: expected the pattern, and layer or values, of {name}, got {layer!r}"
                )
            NMPattern(layer["pattern"])
        self.quant_method = METHOD
        self.layers = {name: dict(layer) for name, layer in layers.items()}
        self.taken_apart, self.version, self.loading = list(taken_apart), version, loading

    @classmethod
    def of(cls, model: nn.Module) -> SparseConfig | None:
        """Of the layers that a model has now; None if it has none."""
        layers = {}
        for name, module in model.named_modules():
            if isinstance(module, MaskedLinear):
                layers[name] = {"pattern": str(module.pattern), "layer": module.layer}
            elif isinstance(module, NMLinear):
                layers[name] = {"pattern": str(module.pattern), "values": module.kind}
        # modules may stay taken apart when they are dense again, where adapters of peft stand in them
        apart = taken_apart(model)
        return cls(layers, apart) if layers or apart else None


def describe(model: nn.Module) -> None:
    """Set ``config.quantization_config`` of the transformers models in a model by the layers that they have now.

    ``convert``, ``finalize`` and ``pack`` call it with the model that they are given, and ``save_model`` with the one
    that it saves. ``from_pretrained`` goes by it. Whoever puts layers into a model by hand, or converts a part of one,
    calls it before ``save_pretrained``.

    Raises:
        ValueError: if another library has quantized one of the models.
    """
    check_not_quantized(model)
    seen = set()
    for module in model.modules():
        # parts share the config of the whole model, which comes first
        if not isinstance(module, PreTrainedModel) or id(module.config) in seen:
            continue
        seen.add(id(module.config))
        config = SparseConfig.of(module)
        if config is not None:
            module.config.quantization_config = config
        elif getattr(module.config, "quantization_config", None) is not None:
            if getattr(module, "hf_quantizer", None) is not None:
                module.hf_quantizer.remove_quantization_config(module)
            else:
                del module.config.quantization_config


def check_not_quantized(model: nn.Module) -> None:
    """Raise ValueError if another library has quantized a transformers model: a config describes one quantization."""
    for module in model.modules():
        config = getattr(getattr(module, "config", None), "quantization_config", None)
        if isinstance(module, PreTrainedModel) and config is not None and not isinstance(config, SparseConfig):
            raise ValueError(
                f"model: expected one whose config has no quantization_config, got {type(config).__name__}, beside "
                "which masks could not be saved"
            )


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Gives a model MaskedLinear and NMLinear modules before transformers loads its checkpoint, and checks them after.

    Layers are stored as they are, trained and compiled, each as a whole on one device.
    """

    # layers are made by ``convert`` and ``finalize``, not from a dense checkpoint while it is loaded
    requires_calibration = True
    quantization_config: SparseConfig

    def preprocess_model(self, model: PreTrainedModel, *args, **kwargs) -> None:
        """Prepare a model for its weights; ValueError if its layers are to be split over devices."""
        how = getattr(model.config, "distributed_config", None)
        split = {name: getattr(how, name, None) for name in ("tp_size", "tp_plan", "ep_size", "ep_plan")}
        split = [f"{name}={value!r}" for name, value in split.items() if value not in (None, 1, {})]
        if split:
            raise ValueError(
                "distributed_config: expected whole layers of a checkpoint with masked or packed weights, got "
                f"{', '.join(split)}; write the dense one, by finalize or `maskpro export`, which transformers splits "
                "as any other"
            )
        super().preprocess_model(model, *args, **kwargs)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        layers = self.quantization_config.layers
        # dtypes, as safetensors calls them, by name of the tensor
        stored, states = {}, []
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
        _check_stored(stored, layers)
        ids = [layers[name]["layer"] for name in masked]
        if sorted(self._extra_states) != sorted(ids):
            raise ValueError(
                "checkpoint: expected the extra state of each masked layer, with a layer id of its own, got ids "
                f"{sorted(self._extra_states)} for {len(masked)} layers; save the model again with other layer ids"
            )
        try:
            as_linears(model, list(_own_names(model, self.quantization_config.taken_apart).values()))
        except ValueError as error:
            raise ValueError(f"quantization_config: taken_apart: {error}") from error
        if layers or not self.quantization_config.taken_apart:
            dtypes = {FLOATS.get(kind) for name, kind in stored.items() if masked and name.endswith(".logits")}
            if None in dtypes:
                raise ValueError(f"checkpoint: expected logits of {' or '.join(FLOATS)}, got others")
            logits_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
            put_empty_layers(model, layers, logits_dtype)
        # transformers would give those that are not stored random values, and a warning alone
        names = {_bare_name(name, model) for name in stored}
        for module in taken_apart(model) if layers else ():
            for name, layer in model.get_submodule(module).named_modules(prefix=module):
                if type(layer) is nn.Linear and _bare_name(f"{name}.weight", model) not in names:
                    raise ValueError(
                        f"checkpoint: expected the matrices of {module}, which its quantization_config names as taken "
                        f"apart, got none of {name}; write it again by save_pretrained"
                    )

    def _process_model_after_weight_loading(self, model, **kwargs):
        states: dict[torch.device, CounterState] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, NMLinear):
                try:
                    if not layer.bitmask.is_meta:
                        layer.packed.check()
                except (TypeError, ValueError) as error:
                    raise ValueError(f"checkpoint: {name}.{error}") from error
                # as ``finalize`` leaves it; transformers makes all parameters trainable
                layer.requires_grad_(False)
            elif isinstance(layer, MaskedLinear):
                # a layer that accelerate offloads comes to its device for each forward
                device = torch.device("cpu") if layer.weight.is_meta else layer.weight.device
                layer.counter_state = states.setdefault(device, CounterState(device=device))
                # buffers that are not stored come out of meta with any value
                layer.layer_id = torch.empty((), dtype=torch.int64, device=device)
                state = self._extra_states[layer.layer]
                own = [layer.pattern.n, layer.pattern.m, layer.group_offset, layer.group_row_stride]
                if [*state[1:3].tolist(), *state[5:7].tolist()] != own:
                    raise ValueError(
                        f"checkpoint: expected the extra state of a whole {layer.pattern} layer, got {state} of {name}"
                    )
                layer.set_extra_state(state)
                for frozen in (layer.weight, layer.bias):
                    if frozen is not None:
                        frozen.requires_grad_(False)
        hold_in_huge_pages(model)
        return model

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Give a model dense layers in place, with exact zeros where weights are dropped; it is saved as any other.

        Args:
            model: whose layers are to be dense.
            dtype: of its weights; None: as they are.

        Raises:
            ValueError: if a weight is not in memory. The model is then as it was.
        """
        return super().dequantize(model, model.dtype if dtype is None else dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SPARSE)}
        for name, layer in layers.items():
            check_in_memory("model", layer, name, layer.weight if isinstance(layer, MaskedLinear) else layer.values)
        with torch.no_grad():
            dense = {id(layer): dense_layer(layer) for layer in layers.values()}
        replace_modules(model, dense)
        as_built(model)
        fit_adapters(model)
        refuse_merging(model, SPARSE)
        # not by `model.to`: it would round the frequencies of the rotary embedding, and what is to stay in float32
        before = {linear.weight.dtype for linear in dense.values()}
        for parameter in model.parameters():
            if parameter.dtype in before:
                parameter.data = parameter.data.to(dtype)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                for name in ("_is_quantized", "quantization_config"):
                    vars(part.config).pop(name, None)
        return model

    def is_serializable(self) -> bool:
        return True

    # properties of the base class
    is_trainable = is_qat_trainable = is_compileable = True


def put_empty_layers(model: nn.Module, layers: Mapping[str, Mapping], logits_dtype: torch.dtype) -> None:
    """Put layers of a SparseConfig, on the meta device, in the place of nn.Linear modules."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    replacements, modules, state = {}, dict(model.named_modules()), CounterState(device="meta")
    for name, own in _own_names(model, layers).items():
        linear, pattern = modules.get(own), NMPattern(layers[name]["pattern"])
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"quantization_config: expected names of nn.Linear modules of {type(model).__name__}, got {name!r}, "
                f"which is {'none of its modules' if linear is None else type(linear).__name__}"
            )
        (rows, k), dtype = linear.weight.shape, linear.weight.dtype
        if k % pattern.m:
            raise ValueError(
                f"quantization_config: expected in_features divisible by {pattern.m} for {pattern}, got {k} in {name}"
            )
        bias = None if linear.bias is None else empty(rows, dtype=dtype)
        if "layer" in layers[name]:
            weight, logits = empty(rows, k, dtype=dtype), empty(rows, k, dtype=logits_dtype)
            try:
                layer = MaskedLinear(weight, bias, logits, pattern, layer=layers[name]["layer"], counter_state=state)
            except (TypeError, ValueError) as error:
                raise ValueError(f"quantization_config: {name}: {error}") from error
        else:
            is_int8, kept = layers[name]["values"] == INT8, k // pattern.m * pattern.n
            values = empty(rows, kept, dtype=torch.int8 if is_int8 else dtype)
            scales = empty(rows, -(-kept // SCALED), dtype=dtype) if is_int8 else None
            packed = PackedNM(values, empty(rows, -(-k // 8), dtype=torch.uint8), pattern, scales)
            layer = packed_class(pattern)(packed, bias)
        replacements[id(linear)] = layer.train(linear.training)
    if not replacements:
        raise ValueError("quantization_config: expected the name of at least one nn.Linear, got none")
    replace_modules(model, replacements)


def _bare_name(name: str, model: nn.Module) -> str:
    """Without what a model with a head puts before the names of its base model, as transformers matches them."""
    return name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def _own_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Names of a model's modules by the names that a checkpoint has for them; an unknown name stays as it is.

    The checkpoint may be of a model with a head and the given one without, or with another: modules of the checkpoint's
    own head are then left out, as transformers leaves out their weights.
    """
    own = {_bare_name(name, model): name for name, _ in model.named_modules()}
    stored = getattr(getattr(model, "config", None), "architectures", None)
    same = not stored or type(model).__name__ in stored
    parts = {name.split(".")[0] for name in own}
    bare = {name: _bare_name(name, model) for name in names}
    return {name: own.get(key, name) for name, key in bare.items() if same or key.split(".")[0] in parts}


def _check_stored(stored: Mapping[str, str], layers: Mapping[str, Mapping]) -> None:
    """Raise ValueError unless each part of the layers is stored as often as the config names layers that have it."""
    # by number, for transformers renames some tensors as it loads them
    if any(".base_layer." in name for name in stored):
        raise ValueError(
            "checkpoint: expected one without adapters of peft, got base_layer in the names of its tensors; save the "
            "adapter by save_pretrained of the PeftModel, and the model that its unload() gives"
        )
    kinds = [layer.get("values", "masked") for layer in layers.values()]
    masked, int8 = kinds.count("masked"), kinds.count(INT8)
    expected = {"logits": masked, "_extra_state": masked} if masked else {}
    packed = len(kinds) - masked
    for part, count in (expected | {"values": packed, "bitmask": packed, "scales": int8}).items():
        found = [name.rpartition(".")[0] for name in stored if name.endswith(f".{part}")]
        if part in ("values", "scales"):
            # other modules may have tensors of these names
            found = [name for name in found if f"{name}.bitmask" in stored]
        if len(found) != count:
            raise ValueError(
                f"checkpoint: expected {part} of the {count} layers that have such in its quantization_config, got "
                f"{len(found)}; {COPY_AGAIN}, with its config.json; of a dense model that shared its config with a "
                "sparse one, take quantization_config out of it"
            )
        for name in found if part == "scales" else ():
            # transformers would cast them without a word
            if stored.get(f"{name}.values") != "I8":
                raise ValueError(f"checkpoint: {name}.values: expected torch.int8 beside scales; {COPY_AGAIN}")


def _by_id(states: Sequence[Tensor]) -> dict[int, Tensor]:
    """The extra state of each masked layer by its id."""
    for state in states:
        if state.shape != (8,):
            raise ValueError(f"checkpoint: expected extra state of shape [8], got {list(state.shape)}")
    counts = {tuple(state[3:5].tolist()) for state in states}
    if len(counts) > 1:
        raise ValueError(f"checkpoint: expected one seed and one step for all layers, got {sorted(counts)}")
    return {int(state[0]): state for state in states}
