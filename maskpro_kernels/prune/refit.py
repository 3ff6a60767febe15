"""Refit: new kept weights that compensate for dropped ones, so that outputs are close to those of the dense weight.

For inputs X of a layer, H = X^T X, a target t of a row and a row v with zeros where the mask drops, the squared error
of the outputs is E(v) = (t - v) H (t - v)^T. Over the kept set S its minimum solves H_SS v_S = (H t^T)_S. The target
follows from the row of the dense weight and the inputs that the dense model gives the layer, see ``target_shift``. With
the initial mask "reconstruction", masks are also chosen for the refit: ``reconstruction.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..functional.checks import check_in_memory, check_one_of
from ..functional.masks import expand_mask, top_n_mask
from ..modules import MaskedLinear, masked_layers
from ..ops.pattern import NMPattern
from ..shards import is_distributed, local
from .calibration import Moments, calls_of, layer_by_layer, masks_of

# Share of the inputs that the dense model gives in the target of a refit. 0 and 1 are worse on a language model: with
# 16 batches the differences of two models' inputs are fitted too closely
DENSE_SHARE = 0.5
# Added to the diagonal of a Gram matrix, as a fraction of the diagonal's mean
DAMPING = 0.01
# Elements of the weight to process at a time; rows do not depend on each other
PIECE = 1 << 24
# On a language model's layers the error is within 1% of its minimum after 10 to 15
ITERATIONS = 30
# A row is done when an iteration lowers its error by less than this fraction
LEAST_FALL = 1e-3

# (dense weight [out, K], target [out, K], mask of 1.0 and 0.0, Gram matrix [K, K]) -> refitted weight [out, K], whose
# dropped values do not count in the error; all float32
Fit = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def refit(
    model: nn.Module, calibration: Iterable, to: str = "weights", *, progress: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """Refit the weights of a converted model under its top-N masks, to approximate the outputs of the dense layers.

    Only the weights change. With "weights", dropped weights keep their dense values, so that masks can learn further.
    ``convert`` does the same with its ``refit``, and can also choose the masks for it.

    In memory are the new weights, one block's inputs, also those that the dense model gives, and two matrices [K, K] of
    a layer, in float64 while its target is computed. The layers get the new weights at the end, as new tensors: an
    embedding that shares a weight does not change.

    Args:
        model: converted, see ``convert``; none of its weights refitted or trained before.
        calibration: batches for the model, each a tensor, a tuple or a mapping. Use several times as many tokens as the
            widest layer has inputs.
        to: "weights": the kept values with the smallest error, by conjugate gradients. "scales": for each row of a
            weight the one factor with the smallest error.
        progress: called with (layers done, layers in all) before the first layer and after each.

    Returns:
        by name, the error of a layer's outputs after the refit divided by that before; without experts that got no
        token.

    Warns:
        UserWarning: names experts without a token, which keep their weights.

    Raises:
        TypeError, ValueError: an argument is not as above, there is no batch, or a layer gets no input. The model is
            then unchanged.
    """
    check_one_of("to", to, FITS)
    layers = masked_layers(model)
    for name, layer in layers.items():
        check_in_memory("model", layer, name)
        if layer.weight_changed:
            raise ValueError(
                f"model: expected dense weights, the target of a refit, got refitted or trained ones in {name}; "
                f"load and convert the model again"
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
    """Compute refitted weights and the remaining share of the error, by name; the model stays unchanged.

    It visits the layers in the order in which they run. The inputs of a layer come from the masked and refitted layers
    before; see ``target_shift`` for its target. A row whose squared error does not fall stays unchanged. Sums are
    float32; values are rounded to the weight's dtype once. For layers that are cut over ranks, codes and refitted
    weights are those of this rank's rows.
    """
    calls = calls_of(calibration)
    masks = masks_of(model, layers, codes, patterns)
    shares: dict[str, float] = {}

    def visit(names: Sequence[str], moments: Moments) -> Iterator[None]:
        shift = target_shift(moments)
        gram = moments.gram
        gram.diagonal().add_(DAMPING * gram.diagonal().mean())
        for name in names:

            def fitted(weight: Tensor, codes: Tensor, pattern: NMPattern = patterns[name]) -> tuple[Tensor, Tensor]:
                return refit_rows(weight, expand_mask(codes, pattern), gram, FITS[to], shift)

            layer_codes = masks.whole_codes(name)
            refitted, errors = masks.by_rows(fitted, masks.dense(name), layer_codes)
            masks.put(name, layer_codes, refitted)
            before, after = errors.double().sum(0).tolist()
            shares[name] = after / before if before > 0 else 1.0
            yield

    layer_by_layer(model, layers, calls, masks, visit, "keep their masks and weights", progress, with_dense=True)
    return masks.weights, shares


def put_weights(layers: Mapping[str, MaskedLinear], weights: Mapping[str, Tensor]) -> None:
    """Set refitted or trained weights of layers, and their ``weight_changed``.

    Args:
        layers: by name.
        weights: [out, K] by name, of some of the layers; of a layer that is cut over ranks, this rank's rows. They are
            converted to the layer's dtype and device, and not copied if they have both.

    Raises:
        ValueError: if a layer is missing or has another shape. Nothing changes then.
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
            # into the same memory, which FSDP2 uses
            local(layer.weight.detach()).copy_(weight)
        else:
            # a new tensor: the old one may be shared with a layer without a mask
            layer.weight.data = weight.to(layer.weight.device, layer.weight.dtype)
        layer.weight_changed = True


def target_shift(moments: Moments) -> Tensor | None:
    """Matrix A, float32 [K, K], by which w + w A is the target of a refit for a row w of the dense weight.

    With the inputs X that the masked and refitted model gives a layer, Z that the dense model gives it, and a share s,
    the target t minimizes (1 - s) |X t - X w|^2 + s |X t - Z w|^2 + d |t - w|^2, with the damping d of H = X^T X. So
    A^T = s (H + d I)^-1 (X^T Z - H).

    Returns:
        A; None, for w itself, without cross moments, or if H + d I is singular.
    """
    if moments.cross is None:
        return None
    gram = moments.gram.double()
    difference = moments.cross.double() - gram
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return None
    return torch.cholesky_solve(difference, factor).mul_(DENSE_SHARE).T.float().contiguous()


def target_of(dense: Tensor, shift: Tensor | None) -> Tensor:
    """Target of a refit, float32 [out, K], of the dense weight, float32 [out, K]."""
    return dense if shift is None else torch.addmm(dense, dense, shift)


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """d H d^T for each row d of ``difference`` [out, K]: float32 [out]."""
    return ((difference @ gram) * difference).sum(1)


def fit_weights(dense: Tensor, target: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """Kept values with the smallest error, by ``conjugate_gradients`` from the dense ones; dropped values stay."""
    fitted, _ = conjugate_gradients(target, dense * kept, kept, gram)
    return torch.where(kept > 0, fitted, dense)


def fit_scales(dense: Tensor, target: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """The dense weight, each row times the factor with the smallest error, c = m H t^T / m H m^T.

    m is the row with zeros where dropped, t the target. The factor scales the row's output, so it applies to dropped
    values too: learning may keep them later. Rows whose masked outputs are all zero keep the factor 1.
    """
    masked = dense * kept
    product = masked @ gram
    power = (product * masked).sum(1, keepdim=True)
    factor = (product * target).sum(1, keepdim=True) / power
    return dense * torch.where(power > 0, factor, 1.0)


FITS: dict[str, Fit] = {"scales": fit_scales, "weights": fit_weights}


def conjugate_gradients(target: Tensor, start: Tensor, kept: Tensor, gram: Tensor,
                        iterations: int = ITERATIONS,
                        least_fall: float = LEAST_FALL) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Minimize E over the kept values of each row v, by conjugate gradients with the diagonal of H as preconditioner.

    Hestenes and Stiefel 1952, with a step size for each row and one product with H for all rows in an iteration. An
    iteration with step a, preconditioned residual z and residual r lowers E by a (r z), without another product.

    Args:
        target: t, float32 [out, K].
        start: zero where dropped, float32 [out, K].
        kept: 1.0 where kept and 0.0 where dropped, float32 [out, K].
        gram: H, symmetric positive definite float32 [K, K].
        iterations: the most iterations.
        least_fall: a row is done when an iteration lowers its error by less than this fraction.

    Returns:
        (v, float32 [out, K]; (t - v) H, float32 [out, K], which is 0 for kept weights at the minimum of E).
    """
    fitted = start.clone()
    preconditioner = kept / gram.diagonal()
    product = (target - fitted) @ gram
    error = ((target - fitted) * product).sum(1, keepdim=True)
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
        before = slope
        slope = (product * preconditioned).sum(1, keepdim=True)
        # neither changes for rows that are done
        direction.mul_(torch.where(going, slope / before, 0.0)).add_(preconditioned)
    return fitted, product


def refit_rows(
    weight: Tensor, kept: Tensor, gram: Tensor, fit: Fit, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Refit the dense weight [out, K], rounded once; a row whose error would not fall stays unchanged.

    Args:
        kept: bool [out, K].
        gram: symmetric positive definite float32 [K, K].
        fit: one of ``FITS``.
        shift: see ``target_shift``.

    Returns:
        (weight [out, K] in its dtype; float32 [out, 2], the error of each row before and after).
    """
    pieces = []
    rows = max(PIECE // weight.shape[1], 1)
    for piece, kept_piece in zip(weight.split(rows), kept.split(rows), strict=True):
        dense = piece.float()
        target = target_of(dense, shift)
        mask = kept_piece.float()
        fitted = fit(dense, target, mask, gram).to(piece.dtype)
        before = row_errors(target - dense * mask, gram)
        after = row_errors(target - fitted.float() * mask, gram)
        # also false for NaN
        better = after < before
        errors = torch.stack([before, torch.where(better, after, before)], 1)
        pieces.append((torch.where(better[:, None], fitted, piece), errors))
    return tuple(torch.cat(tensors) for tensors in zip(*pieces, strict=True))
