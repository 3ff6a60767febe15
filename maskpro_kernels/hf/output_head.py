"""Whether the output head of a model is dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from ..modules import MaskedLinear
from ..packed import NMLinear
from ..pattern import NMPattern
from ..safetensors_files import named_files, tensor_files

# That are looked at together
ROWS = 4096


def has_dense_head(model: PreTrainedModel, patterns: Sequence[str], folder: Path) -> bool:
    """Whether a model is known to have an output head whose weights follow none of its patterns.

    Args:
        model: its weights may be on the meta device.
        patterns: "N:M" each.
        folder: of its checkpoint, where such weights are read.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or isinstance(head, (MaskedLinear, NMLinear)):
        return False
    if head.weight is model.get_input_embeddings().weight:
        return True
    return not any(_follows(model, head, NMPattern(pattern), folder) for pattern in patterns)


def _follows(model: PreTrainedModel, head: torch.nn.Linear, pattern: NMPattern, folder: Path) -> bool:
    if head.in_features % pattern.m:
        return False
    rows = _stored_rows(model, head, folder) if head.weight.is_meta else head.weight.detach().split(ROWS)
    # of none it is not known
    # most heads are known to be dense by their first rows
    return all(int((part != 0).reshape(-1, pattern.m).sum(1).max()) <= pattern.n for part in rows)


def _stored_rows(model: PreTrainedModel, head: torch.nn.Linear, folder: Path) -> Iterator[torch.Tensor]:
    """The rows of a head in a checkpoint; none where its tensors have other names than the model's."""
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is head)
    file = tensor_files(named_files(folder)).get(name)
    if file is None:
        return
    with safe_open(file, framework="pt") as opened:
        rows = opened.get_slice(name)
        for first in range(0, head.out_features, ROWS):
            yield rows[first : first + ROWS]
