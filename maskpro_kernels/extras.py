"""Optional packages: the extras that install them, and the message if one is missing."""

from __future__ import annotations

import importlib.util

# The optional packages of each extra in pyproject.toml, small extras first
EXTRAS = {
    "hf": ("transformers",),
    "cli": ("transformers", "matplotlib"),
    "demo": ("transformers", "matplotlib", "gguf", "accelerate"),
    "data": ("datasets",),
    "peft": ("peft",),
    "tensorboard": ("accelerate", "tensorboard"),
    "wandb": ("accelerate", "wandb"),
}


def missing(*packages: str) -> str | None:
    """Name the missing packages and how to install them, as the end of a sentence; None if all are installed.

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
        f"installed (pip install 'maskpro-kernels[{extra}]')"
    )


def require(what: str, *packages: str) -> None:
    """Raise ModuleNotFoundError, which names the extra to install, unless the packages are installed."""
    lacking = missing(*packages)
    if lacking:
        raise ModuleNotFoundError(f"{what} needs {lacking}")
