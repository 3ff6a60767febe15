"""What the safetensors files of a checkpoint hold, and the modules of a model that it is for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from ..unfuse import as_linears, taken_apart

HOW_TO_LOAD = "import maskpro_kernels.hf, of the package maskpro-kernels[hf], before from_pretrained"


def bare_name(name: str, model: nn.Module) -> str:
    """Without what a model with a head puts before the names of its base model, as transformers matches them."""
    return name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def stored_dtypes(files: Iterable[str | Path] | None) -> dict[str, str]:
    """The dtype of each tensor of safetensors files by its name, as safetensors calls it.

    Raises:
        ValueError: if a file is of another kind or damaged.
    """
    dtypes = {}
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"checkpoint: expected safetensors files, got {file!r}")
        try:
            with safe_open(file, framework="pt") as opened:
                dtypes |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint: expected a whole safetensors file, got {str(file)!r}: {error}") from error
    return dtypes


def check_all_stored(names: Iterable[str], parts: Iterable[str], layers: Collection[str]) -> None:
    """Raise ValueError unless each part is stored as often as there are layers.

    Names in files are not those of the modules: transformers renames some as it loads them.
    """
    names = list(names)
    stored = {part: [name.removesuffix(f".{part}") for name in names if name.endswith(f".{part}")] for part in parts}
    for part, found in stored.items():
        if len(found) != len(layers):
            raise ValueError(
                f"checkpoint: expected {part} of the {len(layers)} layers that its quantization_config names"
                f"{_such_as(layers)}, got {len(found)}{_cure(found, layers, any(stored.values()))}"
            )


def check_dense_parts_stored(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError unless the dense matrices of modules that are taken apart are stored.

    transformers would give others random values, and a warning alone.
    """
    stored = {bare_name(name, model) for name in names}
    for module in taken_apart(model):
        for name, layer in model.get_submodule(module).named_modules(prefix=module):
            if type(layer) is nn.Linear and bare_name(f"{name}.weight", model) not in stored:
                raise ValueError(
                    f"checkpoint: expected the matrices of {module}, which its quantization_config tells to be taken "
                    f"apart, got none of {name}; write it again by save_pretrained"
                )


def _cure(found: Collection[str], layers: Collection[str], any_stored: bool) -> str:
    """What to do where a part is stored of these layers, and others are named."""
    if not any_stored:
        return "; of a dense model that shared its config with another, take quantization_config out of its config.json"
    # names that fit no better are those of layers that are renamed as they are loaded
    lacking, unknown = sorted(set(layers) - set(found)), sorted(set(found) - set(layers))
    if len(found) < len(layers):
        which = f", none of {lacking[0]}" if found and len(lacking) == len(layers) - len(found) else ""
        return f"{which}; copy or download the checkpoint again"
    which = unknown[0] if len(unknown) == len(found) - len(layers) else "others"
    return (
        f", also of {which}, which it does not name; take config.json from where the checkpoint comes from, or write "
        "it again by save_pretrained"
    )


def check_scales_stored(dtypes: Mapping[str, str], layers: Collection[str]) -> None:
    """Raise ValueError unless as many packed weights have scales as there are layers with int8 values.

    Args:
        dtypes: of all tensors that are stored.
        layers: names of those with int8 values.
    """
    # other modules may have tensors of that name
    found = sorted(name for name in dtypes if name.endswith(".scales") and _beside(name, "bitmask") in dtypes)
    for name in found:
        values = _beside(name, "values")
        # transformers would cast them without a word
        if dtypes.get(values) != "I8":
            raise ValueError(f"checkpoint: {values}: expected torch.int8 beside scales, got {dtypes.get(values)}")
    if len(found) != len(layers):
        raise ValueError(
            f"checkpoint: expected {len(layers)} packed weights with scales, one for each layer of int8 values in its "
            f"quantization_config{_such_as(layers)}, got {len(found)}{_such_as(found)}; copy or download it again"
        )


def _beside(name: str, part: str) -> str:
    return f"{name.rpartition('.')[0]}.{part}"


def _such_as(names: Collection[str]) -> str:
    return f", such as {next(iter(names))}" if names else ""


def linears_named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    """The nn.Linear modules that a checkpoint names, by the names that it gives them.

    Raises:
        ValueError: if there is none of a name, or it is no nn.Linear.
    """
    found, modules = {}, dict(model.named_modules())
    for name, own in own_names(model, names).items():
        module = modules.get(own)
        if type(module) is not nn.Linear:
            raise ValueError(
                f"quantization_config: expected names of nn.Linear modules of {type(model).__name__}, got {name!r}, "
                f"which is {'none of its modules' if module is None else type(module).__name__}"
            )
        found[name] = module
    if not found:
        raise ValueError("quantization_config: expected the name of at least one nn.Linear, got none")
    return found


def own_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What a model calls the modules that a checkpoint names; a name that it does not know stays as it is.

    The checkpoint may be of a model with a head and the given one without, or with another: modules of the checkpoint's
    own head are then left out, as transformers leaves out their weights.
    """
    own = {bare_name(name, model): name for name, _ in model.named_modules()}
    stored = getattr(getattr(model, "config", None), "architectures", None)
    same = not stored or type(model).__name__ in stored
    parts = {name.split(".")[0] for name in own}
    bare = {name: bare_name(name, model) for name in names}
    return {name: own.get(key, name) for name, key in bare.items() if same or key.split(".")[0] in parts}


def take_apart(model: nn.Module, names: Iterable[str]) -> None:
    """Take the modules of a model apart that a checkpoint names.

    Raises:
        ValueError: if one of them cannot be.
    """
    try:
        as_linears(model, list(own_names(model, names).values()))
    except ValueError as error:
        raise ValueError(f"quantization_config: taken_apart: {error}") from error


def check_names(argument: str, names: Iterable[str]) -> list[str]:
    """The names of modules.

    Raises:
        TypeError: if they are not a list of str.
    """
    if isinstance(names, str) or not isinstance(names, Iterable) or any(not isinstance(name, str) for name in names):
        raise TypeError(f"quantization_config: expected a list of names as {argument}, got {names!r}")
    return list(names)


def check_digests(digests: object) -> dict[str, dict[str, str]]:
    """Digests by the names of two tables of them, none where there are none.

    Raises:
        TypeError: if they are something else.
    """
    digests = {} if digests is None else digests
    if not isinstance(digests, Mapping) or not all(isinstance(table, Mapping) for table in digests.values()):
        raise TypeError(f"quantization_config: expected tables of digests, got {type(digests).__name__}")
    return {name: dict(table) for name, table in digests.items()}


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
