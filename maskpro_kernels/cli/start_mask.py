"""The mask that a run of `maskpro learn` begins with, where ``--init`` is a path and no name.

It is read once, before the first step. The run then goes on without what lies there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..prune.initial_masks import INITIAL_MASKS
from ..prune.selection import layers_to_convert
from ..prune.stored_mask import is_there, stored_mask
from .progress import tell
from .run_files import LOGITS, goes_on, how_to_go_on


def is_path_of_mask(init: str) -> bool:
    """Whether ``--init`` is a path: a name of an initial mask goes before a path of that name."""
    return init not in INITIAL_MASKS


def name_of_init(init: str) -> str:
    """What the mask of ``--init`` is called in a table, without the folders of this machine."""
    return f"mask of {Path(init).resolve().name}" if is_path_of_mask(init) else init


def told_init(init: str) -> str:
    """The same in a sentence, behind an article."""
    return name_of_init(init) if is_path_of_mask(init) else f"{init} mask"


class StartMask:
    """What ``--init`` gives.

    Args:
        args: of ``learn``, complete.

    Attributes:
        init: what ``initial_codes`` takes: a name, or once a path was read group codes by name.
        known_by: what tells the mask of a path again: of what kind that was, and its digest. None of a name.

    Raises:
        ValueError: if there is no mask of that name, and nothing at that path, or a run that was killed.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        if is_path_of_mask(args.init):
            _check_path(args.init)
        self.init: str | Mapping[str, Tensor] = args.init
        self.known_by: dict[str, str] | None = None

    def read(self, model: torch.nn.Module) -> None:
        """Read what lies at a path, for a dense model of linear layers.

        Raises:
            ValueError, OSError: if it cannot be read, or is of another base model, pattern or set of layers.
        """
        if not is_path_of_mask(self.args.init):
            return
        layers, _ = layers_to_convert(model, self.args.pattern)
        found = stored_mask(self.args.init, layers, self.args.pattern)
        self.init, self.known_by = found.codes, {"kind": found.kind, "digest": found.digest}
        tell(f"the run begins with the mask of the {found.kind} {self.args.init}, {found.digest}")


def _check_path(init: str) -> None:
    if not is_there(init):
        raise ValueError(
            f"init: expected one of {', '.join(INITIAL_MASKS)}, or the path of a mask file, a run or a sparse "
            f"checkpoint, got {init!r}"
        )
    folder = Path(init)
    if goes_on(folder) and not (folder / LOGITS).is_file():
        raise ValueError(
            f"init: expected a run that has left {LOGITS}, got {init!r}, which was killed; {how_to_go_on(folder)}"
        )
