"""Weights refitted to what a mask has cut: the kept values of each layer make up for the dropped ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..fsdp import check_in_memory, is_distributed, local
from ..functional.masks import expand_mask, top_n_mask
from ..modules import MaskedLinear, evaluating, masked_layers
from ..pattern import NMPattern
from .calibration import calls_of
from .least_squares import FITS, check_damping, refit_rows
from .reconstruction import DAMPING, Told, layer_by_layer, masks_of, tell_unvisited, without_cache


def refit(
    model: nn.Module,
    calibration: Iterable,
    to: str = "weights",
    *,
    damping: float = DAMPING,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Refit the weights of a converted model under its top-N masks, so that each layer gives what the dense one would.

    The masks, the biases and all else stay as they are. With "weights" dropped weights keep their dense values, so that
    learning can go on over both. ``convert`` does the same with its ``refit``, and then chooses the masks for it.

    Beside the new weights one block's inputs and one Gram matrix are held. They are put into the layers at the end, as
    tensors of their own: a weight that an embedding shares does not change there.

    Args:
        model: converted, see ``convert``; none of its weights refitted or trained before.
        calibration: batches for the model, each a tensor, a tuple or a mapping. Several times as many tokens as the
            widest layer has inputs.
        to: "weights": the kept values of least error, by conjugate gradients (``prune/least_squares.py``). "scales":
            the one factor of least error for each row of a weight.
        damping: what is added to the diagonal of a Gram matrix, as a share of its mean.
        progress: called with how many layers are done, and of how many, before the first and after each.

    Returns:
        error of the layer's outputs after the refit over that before, by name; none of an expert without a token.

    Warns:
        UserWarning: of experts that no token reaches, which keep their weights.

    Raises:
        TypeError, ValueError: an argument is not as above, there is no batch, or a layer sees none of them. The model
            is then as it was.
    """
    if to not in FITS:
        raise ValueError(f"to: expected one of {tuple(FITS)}, got {to!r}")
    check_damping(damping)
    layers = masked_layers(model)
    _check_layers(layers)
    codes = {name: top_n_mask(layer.logits_on_device().detach(), layer.pattern) for name, layer in layers.items()}
    patterns = {name: layer.pattern for name, layer in layers.items()}
    weights, shares = refit_layers(model, layers, codes, patterns, calibration, to, damping, progress)
    put_weights(layers, weights)
    return shares


@torch.no_grad()
def refit_layers(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    codes: Mapping[str, Tensor],
    patterns: Mapping[str, NMPattern],
    calibration: Iterable,
    to: str,
    damping: float = DAMPING,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Refitted weights, and the share of the error that is left, by name; the model stays as it is.

    Layer by layer in the order in which they run. A layer's inputs are those of the model as it is so far, masked and
    refitted; its target is what its dense weight would give on the same inputs. The squared error of the outputs falls
    in every row of a weight, or the row stays as it is. Sums are float32; values are rounded to the weight's dtype
    once.

    Args:
        layers: nn.Linear or alike, with their dense weights.
        codes: their group codes [out, K / M]. Of layers that ranks share these are those of this rank's part, and the
            weights that it gives as well.
        patterns: of the codes.
    """
    calls = calls_of(calibration)
    masks = masks_of(model, layers, codes, patterns)
    shares: dict[str, float] = {}

    told = Told(progress, len(layers))

    def fitted(gram: Tensor, pattern: NMPattern):
        return lambda weight, codes: refit_rows(weight, expand_mask(codes, pattern), gram, FITS[to])

    def visit(names: Sequence[str], gram: Tensor) -> None:
        gram = gram.to(layers[names[0]].weight.device)
        gram.diagonal().add_(damping * gram.diagonal().mean())
        for name in names:
            found = masks.whole_codes(name)
            refitted, errors = masks.by_rows(fitted(gram, patterns[name]), masks.dense(name), found)
            masks.put(name, found, refitted)
            before, after = errors.double().sum(0).tolist()
            shares[name] = after / before if before > 0 else 1.0
            told.one_more()

    with evaluating(model), without_cache(model), masks.running():
        unvisited = layer_by_layer(model, layers, calls, visit, masks)
    tell_unvisited(unvisited, "keep their masks and weights")
    told.all_done()
    return masks.weights, shares


def _check_layers(layers: Mapping[str, MaskedLinear]) -> None:
    for name, layer in layers.items():
        check_in_memory("model", layer, name)
        if layer.weight_changed:
            raise ValueError(
                f"model: expected dense weights, which are what a refit reconstructs, got refitted or trained ones in "
                f"{name}; convert the model anew"
            )


def put_weights(layers: Mapping[str, MaskedLinear], weights: Mapping[str, Tensor]) -> None:
    """Give layers refitted or trained weights, and note that theirs have changed.

    Args:
        layers: by name.
        weights: [out, K] by name, of some of the layers; of one that ranks share what this rank has. A layer takes
            them in its dtype, onto its device; else they are not copied.

    Raises:
        ValueError: if a layer is missing or of another shape. Nothing has changed then.
    """
    for name, weight in weights.items():
        shape = list(local(layers[name].weight).shape) if name in layers else None
        if shape != list(weight.shape):
            raise ValueError(
                f"weights: expected those of the model's masked layers, got {list(weight.shape)} in {name}"
            )
    for name, weight in weights.items():
        layer = layers[name]
        if is_distributed(layer.weight):
            # FSDP2 knows it by this memory
            local(layer.weight.detach()).copy_(weight)
        else:
            # in place of the tensor, not into it: it may be shared with a layer that has no mask
            layer.weight.data = weight.to(layer.weight.device, layer.weight.dtype)
        layer.weight_changed = True
