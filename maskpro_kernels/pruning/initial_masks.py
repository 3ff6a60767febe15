"""Initial masks: by magnitude, by Wanda, or given as group codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..functional.checks import check_codes, check_exactly_n
from ..functional.masks import top_n_mask
from ..modules import evaluating
from ..pattern import NMPattern


def as_call(batch) -> tuple[tuple, dict]:
    """(arguments, keywords) by which a model takes a batch: a mapping, a tuple or list, or anything else as it is."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def initial_codes(
    layers: Mapping[str, nn.Module],
    pattern: str | NMPattern,
    init: str | Mapping[str, Tensor],
    model: nn.Module | None = None,
    calibration: Iterable | None = None,
) -> dict[str, Tensor]:
    """Group codes of an initial mask for every layer.

    Args:
        layers: modules with a ``weight`` [out, K], by name.
        pattern: "N:M" or NMPattern.
        init: "magnitude": the N largest |w| of each group; "wanda": the N largest |w| * ||x||, ||x|| the
            norm of the input column over the calibration batches (Sun et al. 2023, arXiv 2306.11695);
            or {name: group codes [out, K / M]}.
        model: the model that the layers are part of; needed for "wanda".
        calibration: batches for the model, each a tensor, a tuple or a mapping; needed for "wanda".

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    if isinstance(init, Mapping):
        return _given_codes(layers, pattern, init)
    if init == "magnitude":
        return {name: top_n_mask(layer.weight.detach().abs(), pattern) for name, layer in layers.items()}
    if init != "wanda":
        raise ValueError(f'init: expected "magnitude", "wanda" or a mapping of names to group codes, got {init!r}')
    if model is None or calibration is None:
        raise ValueError('calibration: expected batches for init="wanda", got none')
    squares = input_squares(model, layers, calibration)
    return {
        # a hook on the layer may yet bring its inputs to where the weight is
        name: top_n_mask(layer.weight.detach().abs().float() * squares[name].sqrt().to(layer.weight.device), pattern)
        for name, layer in layers.items()
    }


def _given_codes(layers: Mapping[str, nn.Module], pattern: NMPattern, init: Mapping[str, Tensor]) -> dict[str, Tensor]:
    unknown, missing = sorted(init.keys() - layers.keys()), sorted(layers.keys() - init.keys())
    if unknown or missing:
        raise ValueError(f"init: expected codes for exactly the layers converted; unknown {unknown}, missing {missing}")
    codes = {}
    for name, layer in layers.items():
        codes[name] = init[name].to(layer.weight.device) if isinstance(init[name], Tensor) else init[name]
        check_codes(f"init[{name!r}]", codes[name], pattern, layer.weight)
        check_exactly_n(f"init[{name!r}]", codes[name], pattern)
    return codes


def check_calibration(calibration: Iterable) -> None:
    """Raise TypeError unless it can be an iterable of batches; a tensor or a mapping is one batch."""
    if not isinstance(calibration, Iterable) or isinstance(calibration, (Tensor, Mapping)):
        raise TypeError(f"calibration: expected an iterable of batches, got {type(calibration).__name__}")


def input_squares(model: nn.Module, layers: Mapping[str, nn.Module], calibration: Iterable) -> dict[str, Tensor]:
    """Sum of squares of every input column of every layer over the calibration batches, float32 [K] by name.

    Raises:
        ValueError: if there is no batch, or a layer sees none of them.
    """
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable:
        def add(module, args, kwargs):
            x = (args[0] if args else kwargs["input"]).detach()
            x = x.reshape(-1, x.shape[-1])
            squares = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    check_calibration(calibration)
    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    batches = 0
    try:
        with torch.inference_mode(), evaluating(model):
            for batch in calibration:
                args, kwargs = as_call(batch)
                model(*args, **kwargs)
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ValueError("calibration: expected at least one batch, got none")
    unseen = [name for name in layers if name not in sums]
    if unseen:
        raise ValueError(f"calibration: expected batches that reach every layer, {unseen} saw no input")
    return sums
