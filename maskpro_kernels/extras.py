"""Optional packages: which extra of this one installs them, and what to say where one is missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import suppress

# The optional packages of each extra in pyproject.toml, small extras first
EXTRAS = {
    "hf": ("transformers",),
    "cli": ("transformers", "matplotlib"),
    "demo": ("transformers", "matplotlib", "gguf", "accelerate"),
    "data": ("datasets",),
    "peft": ("peft",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}


def missing(*packages: str) -> str | None:
    """What to install of these packages, as the end of a sentence; None if nothing.

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
    """Raise ModuleNotFoundError, which names ``what`` needs the packages and their extra, unless they are installed."""
    lacking = missing(*packages)
    if lacking:
        raise ModuleNotFoundError(f"{what} needs {lacking}")


def watch_saving() -> None:
    """Import ``hf`` where models of transformers are in memory: a model may be given layers, and saved, without it.

    Its ``save_pretrained`` then writes what loads them again.
    """
    own = f"{__package__}.hf"
    if "transformers.modeling_utils" in sys.modules and own not in sys.modules:
        # an older transformers knows no quantizers of others; what needs them says so
        with suppress(ImportError):
            importlib.import_module(own)
