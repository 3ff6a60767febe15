"""The dtype of a checkpoint's weights, by its files."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import get_safetensors_metadata, hf_hub_download

from ..checked_json import load_json
from ..safetensors_files import named_files
from .loading import SMOLLM2, check_model
from .stored_files import stored_dtypes

KNOWN = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# That none of these holds
WIDER = "F64"


def stored_dtype(name: str) -> str | None:
    """ "float32", "bfloat16" or "float16": what the config names, else what holds all weights of safetensors files.

    Args:
        name: a folder, or an id on the hub, of which the config and the heads of safetensors files are fetched.

    Returns:
        None where the config names none of the three, and the files tell none; also where there are no such files.

    Raises:
        ValueError, OSError: as ``check_model``.
    """
    check_model(name)
    if name == SMOLLM2:
        return None
    try:
        config = Path(name) / "config.json" if Path(name).is_dir() else Path(hf_hub_download(name, "config.json"))
        settings = load_json(config.read_text(encoding="utf-8"))
        named = str(settings.get("dtype", settings.get("torch_dtype"))).removeprefix("torch.")
        if named in KNOWN.values():
            return named
        files = named_files(config.parent) or sorted(config.parent.glob("*.safetensors"))
        if files or Path(name).is_dir():
            found = set(stored_dtypes(files).values())
        else:
            # the weights have not been fetched yet
            found = set(get_safetensors_metadata(name).parameter_count)
    except Exception:
        # whatever the hub raises: loading the model tells what is wrong
        return None
    held = [KNOWN[kind] for kind in found & KNOWN.keys()]
    if not held or WIDER in found:
        return None
    return held[0] if len(held) == 1 else "float32"
