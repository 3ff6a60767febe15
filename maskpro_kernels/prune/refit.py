"""Refit: kept weights that make up for dropped ones, so that each layer gives what its dense weight would.

For inputs X of a layer, H = X^T X, a row w of its dense weight and a row v with zeros where the mask drops, the squared
error of the outputs is E(v) = (w - v) H (w - v)^T. Over the kept set S it is least where H_SS v_S = (H w^T)_S. With the
initial mask "reconstruction", masks are chosen for the refit as well: ``reconstruction.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..fsdp import check_in_memory, is_distributed, local
from ..functional.masks import expand_mask, top_n_mask
from ..modules import MaskedLinear, masked_layers
from ..ops.pattern import NMPattern
from .calibration import calls_of, layer_by_layer, masks_of

# What is added to the diagonal of a Gram matrix, as a share of its mean
DAMPING = 0.01
# Elements of the weight that are worked on at a time; rows do not depend on each other
PIECE = 1 << 24
# On the layers of a language model the error is within 1% of its least after 10 to 15
ITERATIONS = 30
# A row is done where an iteration lowers its error by less than this part of it
LEAST_FALL = 1e-3

# (dense weight [out, K], 1.0 where kept and 0.0 where dropped, Gram matrix [K, K]) -> refitted weight [out, K], whose
# dropped values have no part in the error; all float32
Fit = Callable[[Tensor, Tensor, Tensor], Tensor]


def refit(
    model: nn.Module, calibration: Iterable, to: str = "weights", *, progress: Callable[[int, int], None] | None = None
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
        to: "weights": the kept values of least error, by conjugate gradients. "scales": the one factor of least error
            for each row of a weight.
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
    layers = masked_layers(model)
    for name, layer in layers.items():
        check_in_memory("model", layer, name)
        if layer.weight_changed:
            raise ValueError(
                f"model: expected dense weights, which are what a refit reconstructs, got refitted or trained ones in "
                f"{name}; convert the model anew"
            )
    codes = {name: top_n_mask(layer.logits_on_device().detach(), layer.pattern) for name, layer in layers.items()}
    patterns = {name: layer.pattern for name, layer in layers.items()}
    weights, shares = refit_layers(model, layers, codes, patterns, calibration, to, progress)
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
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Refitted weights, and the share of the error that is left, by name; the model stays as it is.

    Layer by layer in the order in which they run. A layer's inputs are those of the model as it is so far, masked and
    refitted; its target is what its dense weight would give on the same inputs. The squared error of the outputs falls
    in every row of a weight, or the row stays as it is. Sums are float32; values are rounded to the weight's dtype
    once. Of layers that ranks share, codes and refitted weights are those of this rank's part.
    """
    calls = calls_of(calibration)
    masks = masks_of(model, layers, codes, patterns)
    shares: dict[str, float] = {}

    def visit(names: Sequence[str], gram: Tensor) -> Iterator[None]:
        gram.diagonal().add_(DAMPING * gram.diagonal().mean())
        for name in names:

            def fitted(weight: Tensor, codes: Tensor, pattern: NMPattern = patterns[name]) -> tuple[Tensor, Tensor]:
                return refit_rows(weight, expand_mask(codes, pattern), gram, FITS[to])

            found = masks.whole_codes(name)
            refitted, errors = masks.by_rows(fitted, masks.dense(name), found)
            masks.put(name, found, refitted)
            before, after = errors.double().sum(0).tolist()
            shares[name] = after / before if before > 0 else 1.0
            yield

    layer_by_layer(model, layers, calls, masks, visit, "keep their masks and weights", progress)
    return masks.weights, shares


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


def check_refit(refit: str) -> None:
    if refit != "none" and (not isinstance(refit, str) or refit not in FITS):
        raise ValueError(f"refit: expected one of {('none', *FITS)}, got {refit!r}")


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """d H d^T of every row d of ``difference`` [out, K]: float32 [out]."""
    return ((difference @ gram) * difference).sum(1)


def fit_weights(dense: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """The kept values of least error, by ``conjugate_gradients`` from those of the dense weight; the others stay."""
    fitted, _ = conjugate_gradients(dense, dense * kept, kept, gram)
    return torch.where(kept > 0, fitted, dense)


def fit_scales(dense: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """The dense weight with each row times its factor of least error, c = m H w^T / m H m^T.

    m is the row with zeros where dropped. The factor is one of the row's output, so dropped values get it too: learning
    may take them up again. Rows whose masked outputs are all zero keep the factor 1.
    """
    masked = dense * kept
    product = masked @ gram
    power = (product * masked).sum(1, keepdim=True)
    factor = (product * dense).sum(1, keepdim=True) / power
    return dense * torch.where(power > 0, factor, 1.0)


FITS: dict[str, Fit] = {"scales": fit_scales, "weights": fit_weights}


def conjugate_gradients(dense: Tensor, start: Tensor, kept: Tensor, gram: Tensor,
                        iterations: int = ITERATIONS,
                        least_fall: float = LEAST_FALL) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Descend on E over the kept values of every row, by conjugate gradients with the diagonal of H as preconditioner.

    Hestenes and Stiefel 1952, with steps of each row's own, all rows in one product with H an iteration. An iteration
    with step a, preconditioned residual z and residual r lowers E by a (r z), without another product.

    Args:
        dense: w, float32 [out, K].
        start: zero where dropped, float32 [out, K].
        kept: 1.0 where kept and 0.0 where dropped, float32 [out, K].
        gram: H, symmetric positive definite float32 [K, K].
        iterations: at most.
        least_fall: a row ends where an iteration lowers its error by less than this part of it.

    Returns:
        (v, float32 [out, K]; (w - v) H, which is 0 where kept once E is at its least, float32 [out, K]).
    """
    fitted, preconditioner = start.clone(), kept / gram.diagonal()
    product = (dense - fitted) @ gram
    error = ((dense - fitted) * product).sum(1, keepdim=True)
    direction = product * preconditioner
    slope = (product * direction).sum(1, keepdim=True)
    going = slope > 0
    for _ in range(iterations):
        image = direction @ gram
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(going & (curvature > 0), slope / curvature, 0.0)
        fitted.addcmul_(direction, step)
        product.addcmul_(image, step, value=-1)
        fall = step * slope
        error -= fall
        going &= fall > least_fall * error
        if not going.any():
            break
        preconditioned = product * preconditioner
        before, slope = slope, (product * preconditioned).sum(1, keepdim=True)
        # of rows that are done neither changes any more
        direction.mul_(torch.where(going, slope / before, 0.0)).add_(preconditioned)
    return fitted, product


def refit_rows(weight: Tensor, kept: Tensor, gram: Tensor, fit: Fit) -> tuple[Tensor, Tensor]:
    """The dense weight [out, K] refitted, rounded once; a row whose error would not fall stays as it is.

    Args:
        kept: bool [out, K].
        gram: symmetric positive definite float32 [K, K].
        fit: of ``FITS``.

    Returns:
        (weight [out, K] in its dtype; float32 [out, 2], the error of each row before and after).
    """
    pieces = []
    rows = max(PIECE // weight.shape[1], 1)
    for piece, kept_piece in zip(weight.split(rows), kept.split(rows), strict=True):
        dense, mask = piece.float(), kept_piece.float()
        fitted = fit(dense, mask, gram).to(piece.dtype)
        before = row_errors(dense - dense * mask, gram)
        after = row_errors(dense - fitted.float() * mask, gram)
        # false for what is not finite, too
        better = after < before
        errors = torch.stack([before, torch.where(better, after, before)], 1)
        pieces.append((torch.where(better[:, None], fitted, piece), errors))
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))
