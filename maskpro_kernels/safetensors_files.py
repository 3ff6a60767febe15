"""The safetensors files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checked_json import load_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, each one whole.

    Raises:
        ValueError: if there are none, or one of them is damaged.
    """
    folder = Path(folder)
    files = [folder] if folder.suffix == ".safetensors" else sorted(folder.glob("*.safetensors"))
    if not files:
        told = "which has none" if folder.is_dir() else "which is no folder"
        raise ValueError(f"checkpoint: expected a folder with safetensors files, got {str(folder)!r}, {told}")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"checkpoint: expected a whole safetensors file, got {str(file)!r}: {error}; copy or download it again"
            ) from error
    return files


def named_files(folder: Path) -> list[Path]:
    """The files that ``from_pretrained`` loads from a folder: the single one, else those that its index names.

    Raises:
        ValueError: if the index is damaged, or names files that are not there.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []
    told = f"checkpoint: expected an index of the files in {str(folder)!r}"
    try:
        names = sorted(set(load_json((folder / INDEX).read_bytes())["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{told}, got a damaged {INDEX}: {error!r}; copy or download it again") from error
    missing = [name for name, file in zip(names, files, strict=True) if not file.is_file()]
    if missing:
        raise ValueError(f"{told}, got one that names {missing[0]}, which is not there; copy or download it again")
    return files


def tensor_files(files: Iterable[Path]) -> dict[str, Path]:
    """The file of each tensor, by its name."""
    where = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    return where


def check_parts(where: Mapping[str, Path], name: str, parts: Iterable[str]) -> None:
    """Raise ValueError unless all parts that the weight ``name`` is stored in are there."""
    missing = [part for part in parts if f"{name}.{part}" not in where]
    if missing:
        raise ValueError(f"checkpoint: expected {name}.{', .'.join(parts)}, got none of {missing}")


def read_tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
