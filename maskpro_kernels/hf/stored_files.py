"""What the safetensors files of a checkpoint hold, and the modules of a model that it is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

HOW_TO_LOAD = "import maskpro_kernels.hf, of the package maskpro-kernels[hf], before from_pretrained"


def bare_name(name: str, model: nn.Module) -> str:
    """Without what a model with a head puts before the names of its base model, as transformers matches them."""
    return name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def stored_names(files: Iterable[str | Path] | None) -> list[str]:
    """Names of all tensors of safetensors files.

    Raises:
        ValueError: if a file is of another kind or damaged.
    """
    names = []
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"checkpoint: expected safetensors files, got {file!r}")
        try:
            with safe_open(file, framework="pt") as opened:
                names += opened.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint: expected a whole safetensors file, got {str(file)!r}: {error}") from error
    return names


def check_all_stored(names: Iterable[str], parts: Iterable[str], layers: Iterable[str]) -> None:
    """Raise ValueError unless each part is stored as often as there are layers.

    Names in files are not those of the modules: transformers renames some as it loads them.
    """
    names, layers = list(names), list(layers)
    for part in parts:
        stored = sum(name.endswith(f".{part}") for name in names)
        if stored != len(layers):
            raise ValueError(
                f"checkpoint: expected {part} of the {len(layers)} layers that its quantization_config names, such as "
                f"{layers[0]}, got {stored} of them; of a dense model that shared its config with another, take "
                "quantization_config out of its config.json"
            )


def linears_named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    """The nn.Linear modules that a checkpoint names, by the names that it gives them.

    The checkpoint may be of a model with a head and the given one without, or with another: layers of the checkpoint's
    own head are then left out, as transformers leaves out their weights.

    Raises:
        ValueError: if there is none of a name, or it is no nn.Linear.
    """
    modules: Mapping[str, nn.Module] = {bare_name(name, model): module for name, module in model.named_modules()}
    stored = getattr(getattr(model, "config", None), "architectures", None)
    same = not stored or type(model).__name__ in stored
    parts = {bare_name(name, model).split(".")[0] for name in modules}
    found = {}
    for name in names:
        module = modules.get(bare_name(name, model))
        if module is None and not same and bare_name(name, model).split(".")[0] not in parts:
            continue
        if type(module) is not nn.Linear:
            raise ValueError(
                f"quantization_config: expected names of nn.Linear modules of {type(model).__name__}, got {name!r}, "
                f"which is {'none of its modules' if module is None else type(module).__name__}"
            )
        found[name] = module
    if not found:
        raise ValueError("quantization_config: expected the name of at least one nn.Linear, got none")
    return found


def check_own_settings(others: dict, **expected: tuple[object, object]) -> None:
    """Raise ValueError where settings are of another format or version, or unknown.

    Args:
        others: what the configuration holds beside its own settings.
        expected: (value, what it has to be) by name.
    """
    for name, (value, known) in expected.items():
        if value != known:
            raise ValueError(
                f"quantization_config: expected {name} {known!r}, got {value!r}; a newer maskpro_kernels may have "
                "written it"
            )
    others.pop("quant_method", None)
    if others:
        raise ValueError(f"quantization_config: expected no others than its own settings, got {sorted(others)}")
