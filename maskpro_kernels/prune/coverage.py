"""How much of a model has a mask, and which matrices have none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..modules import MaskedLinear
from ..packed import NMLinear

HEAD = "output head"
EMBEDDING = "embedding"
# Below that share of its matrix weights, a model is told to be masked in part alone
MOST_OF_A_MODEL = 0.9


@dataclass(frozen=True)
class Coverage:
    """What of the matrices of a model, its parameters of two or more dimensions, follows an N:M pattern.

    Attributes:
        share: of their weights, those of embeddings and of the output head apart; 1 where there are no others.
        unmasked: the others by parameter name, each with the reason; the largest first, embeddings and the output head
            last.
    """

    share: float
    unmasked: dict[str, str]


def coverage(model: nn.Module, skipped: Mapping[str, str]) -> Coverage:
    """Of a model whose layers have been replaced.

    Args:
        model: with MaskedLinear or NMLinear modules.
        skipped: the reasons of the nn.Linear layers that were left out, by name.
    """
    masked, total, unmasked, sizes, seen = 0, 0, {}, {}, set()
    heads = output_heads(model)
    for name, module in model.named_modules():
        if isinstance(module, (MaskedLinear, NMLinear)):
            masked += module.in_features * module.out_features
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or not parameter.is_floating_point() or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{name}.{own}" if name else own
            apart = EMBEDDING if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else None
            apart = HEAD if module in heads else apart
            unmasked[full] = apart or skipped.get(name) or f"of {type(module).__name__}, which is no nn.Linear"
            if not apart:
                sizes[full] = parameter.numel()
    total = masked + sum(sizes.values())
    largest_first = sorted(unmasked, key=lambda name: -sizes.get(name, 0))
    return Coverage(masked / total if total else 1.0, {name: unmasked[name] for name in largest_first})


def reasons_by_name(model: nn.Module, skipped: Mapping[str, str]) -> dict[str, str]:
    """Reasons by the names that modules have: of a layer that there is no more, of the module that holds its matrix."""
    modules, named = dict(model.named_modules()), {}
    for name, reason in skipped.items():
        while name not in modules:
            name = name.rpartition(".")[0]
        named.setdefault(name, reason)
    return named


def output_heads(model: nn.Module) -> set[nn.Module]:
    """What transformers calls the output embeddings of a model, or of those within it, and the modules in them."""
    heads = (module.get_output_embeddings() for module in model.modules() if hasattr(module, "get_output_embeddings"))
    return {part for head in heads if head is not None for part in head.modules()}
