"""Digests of a checkpoint in its config.json: of each tensor in its files, and of each setting in the config itself.

They stand in the ``quantization_config``, which goes wherever the checkpoint goes, and is read before any weight. They
are taken of the files once these are written, by the names in the files: so they are the same for one file and for
several, and whatever model is made of them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from .checked_json import entry_digests, load_json
from .digests import digest
from .files import write_whole
from .safetensors_files import read_tensor, tensor_files

CONFIG, QUANTIZATION = "config.json", "quantization_config"
# The quant_method of checkpoints that have digests
PACKED_METHOD, MASKED_METHOD = "maskpro", "maskpro-mask"
# In the quantization_config; and in it
DIGESTS, TENSORS, SETTINGS = "digests", "tensors", "settings"
ON_PURPOSE = (
    "where it was changed on purpose, load it within maskpro_kernels.hf.without_digests(), and save it again; "
    "`maskpro eval`, `import`, `validate` and `speed` take --no-digests"
)

_checked = ContextVar("checked", default=True)


@contextmanager
def without_digests() -> Iterator[None]:
    """Within it, checkpoints and files of logits are loaded whatever their digests say.

    For those that were changed on purpose: a tensor that another program has cast or edited, or a config without
    digests. Saved again they have new ones.
    """
    token = _checked.set(False)
    try:
        yield
    finally:
        _checked.reset(token)


def digests_are_checked() -> bool:
    """Whether this is not within ``without_digests``."""
    return _checked.get()


def tensor_digests(files: Iterable[Path]) -> dict[str, str]:
    """The digest of each tensor in safetensors files by its name; one pass over them, in all of torch's threads."""
    where = tensor_files(files)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return dict(zip(where, threads.map(lambda name: digest([read_tensor(where[name], name)]), where), strict=True))


def add_digests(folder: Path, files: Iterable[Path]) -> None:
    """Write the digests of tensors in files, and of the settings, into the config.json of a checkpoint.

    Args:
        folder: with a config.json. If that has no quantization_config, the weights are dense, and nothing is written.
        files: of the weights.

    Raises:
        OSError: if it cannot be written; it is then as it was.
    """
    config = json.loads((folder / CONFIG).read_bytes())
    if not config.get(QUANTIZATION):
        return
    found = {TENSORS: tensor_digests(files), SETTINGS: _settings_digests(config)}
    config[QUANTIZATION][DIGESTS] = found
    # as transformers writes it
    write_whole(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def has_digests(config: Path) -> bool:
    """Whether a config.json is of a checkpoint that was saved with digests, or may be: it cannot be read."""
    try:
        return load_json(config.read_bytes())[QUANTIZATION]["quant_method"] in (PACKED_METHOD, MASKED_METHOD)
    except (FileNotFoundError, KeyError, TypeError):
        return False
    except (OSError, ValueError):
        return True


def check_checkpoint(files: Iterable[Path], whole: bool = True) -> int:
    """Compare a checkpoint with the digests in the config.json beside its files.

    Settings of the model that have changed are told by a warning, for such are changed by hand.

    Args:
        files: of the weights.
        whole: whether they are all of its files; else the tensors of the others are not missed.

    Returns:
        How many tensors were compared.

    Raises:
        ValueError: if there are no digests, or a tensor or a setting of the sparse layers has another.
    """
    files = list(files)
    config = files[0].parent / CONFIG
    tensors, settings = stored_digests(config)
    if not tensors or not settings:
        raise ValueError(
            f"checkpoint: expected digests of its tensors in the {QUANTIZATION} of its {CONFIG}, got none; take "
            "that file from where the checkpoint comes from; written by config.save_pretrained alone? save the model "
            f"instead; {ON_PURPOSE}"
        )
    changed = _changed_settings(settings, config)
    own = [name for name in changed if name.startswith(f"{QUANTIZATION}.")]
    if own:
        raise ValueError(
            f"checkpoint: expected the settings of its layers as they were saved, got {', '.join(own)} damaged or "
            f"changed; copy or download it again; {ON_PURPOSE}"
        )
    compared = _check_tensors(tensors, files, whole)
    if changed:
        warnings.warn(
            f"{config} was changed since it was saved: {', '.join(changed)}; where that was not "
            "on purpose, take it from where the checkpoint comes from",
            stacklevel=2,
        )
    return compared


def _check_tensors(stored: Mapping[str, str], files: Iterable[Path], whole: bool) -> int:
    """How many tensors the files hold; ValueError unless they have these digests, and no others are there."""
    found = tensor_digests(files)
    names = stored.keys() | found.keys() if whole else found.keys()
    changed = sorted(name for name in names if stored.get(name) != found.get(name))
    if changed:
        first = changed[0]
        what = "damaged or changed" if first in stored and first in found else "there" if first in found else "missing"
        others = f", as {len(changed) - 1} others are" if len(changed) > 1 else ""
        raise ValueError(
            f"checkpoint: expected the {len(stored)} tensors that it was saved with, got {first} {what}{others}; copy "
            f"or download it again; {ON_PURPOSE}"
        )
    return len(found)


def stored_digests(config: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(digests of tensors, digests of settings) in a config.json; empty where it has none, or cannot be read."""
    try:
        found = load_json(config.read_bytes())[QUANTIZATION][DIGESTS]
        return dict(found[TENSORS]), dict(found[SETTINGS])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, {}


def _changed_settings(stored: Mapping[str, str], config: Path) -> list[str]:
    """The names of the settings in a config.json that have other digests than these.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        own = _settings_digests(load_json(config.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"checkpoint: expected its settings in {str(config)!r}, got {error!r}") from error
    return sorted(name for name in stored.keys() | own.keys() if stored.get(name) != own.get(name))


def _settings_digests(config: dict) -> dict[str, str]:
    """By name, but for the digests themselves; those of the quantization_config are called by both names."""
    own = {name: value for name, value in config[QUANTIZATION].items() if name != DIGESTS}
    return entry_digests({**config, QUANTIZATION: own})
