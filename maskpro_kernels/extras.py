"""Optional packages: the extras that install them, and the message if one is missing."""

from __future__ import annotations

import importlib.util

# The optional packages of each extra in pyproject.toml, small extras first
EXTRAS = {
    "hf": ("transformers", "accelerate"),
    "cli": ("transformers", "accelerate", "matplotlib"),
    "demo": ("transformers", "accelerate", "matplotlib", "gguf"),
    "data": ("datasets",),
    "peft": ("peft",),
    "tensorboard": ("transformers", "accelerate", "tensorboard"),
    "wandb": ("transformers", "accelerate", "wandb"),
}


def missing(*packages: str) -> str | None:
    """Name the missing packages and their extra, as the end of a sentence; None if all are installed.

    It has no pip command: as long as this package is not on a registry, anybody may publish another under its name.

    Args:
        packages: all of one extra.
    """
    lacking = [package for package in packages if importlib.util.find_spec(package) is None]
    if not lacking:
        return None
    extra = next(name for name, brought in EXTRAS.items() if set(lacking) <= set(brought))
    several = len(lacking) > 1
    return (
        f"the package{'s' if several else ''} {' and '.join(lacking)}, which {'are' if several else 'is'} not "
        f"installed; the extra {extra!r} brings {'them' if several else 'it'}, see Install in README.md"
    )


def require(what: str, *packages: str) -> None:
    """Raise ModuleNotFoundError, which names their extra, unless the packages are installed."""
    lacking = missing(*packages)
    if lacking:
        raise ModuleNotFoundError(f"{what} needs {lacking}")
