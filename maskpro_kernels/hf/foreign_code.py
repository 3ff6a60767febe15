"""Python code that a checkpoint brings along, which transformers runs where it is told to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from transformers import PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config


class ForeignCode(ValueError):
    """A checkpoint needs Python code of its own, and nobody has allowed to run it.

    Attributes:
        files: of that code, as far as the checkpoint names them.
    """

    def __init__(self, name: str, files: Sequence[str]):
        where = " and ".join(files) or "Python files"
        at = f" in {str(Path(name).absolute())!r}" if Path(name).is_dir() else ""
        super().__init__(
            f"model: expected a model whose code is transformers' own, got {name!r}, which brings code along: {where}"
            f"{at}; read it, and allow it by --trust-remote-code, in Python trust_remote_code=True"
        )
        self.files = tuple(files)


def is_refusal(error: Exception) -> bool:
    """Whether transformers has refused to run code that nobody has allowed; it has no exception of its own for it."""
    return isinstance(error, ValueError) and "trust_remote_code=True" in str(error)


def files_of_code(name: str) -> list[str]:
    """The Python files that a checkpoint's config and tokenizer config name; none are run here."""
    found = {}
    for read in (lambda: PretrainedConfig.get_config_dict(name)[0], lambda: get_tokenizer_config(name)):
        # damaged, or none: what can be told is told
        with suppress(Exception):
            found |= dict.fromkeys(_modules(read().get("auto_map")))
    return list(found)


def _modules(auto_map: object) -> Iterator[str]:
    """The files behind an ``auto_map``: "module.Class" or "repository--module.Class" by kind, or a list of these."""
    if isinstance(auto_map, str):
        repository, _, reference = auto_map.rpartition("--")
        yield f"{reference.partition('.')[0]}.py" + (f" of {repository}" if repository else "")
    elif isinstance(auto_map, dict):
        for value in auto_map.values():
            yield from _modules(value)
    elif isinstance(auto_map, list):
        for value in auto_map:
            yield from _modules(value)
