"""Calibration batches: how a model takes them, and what its layers see then."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from ..fsdp import resetting
from ..modules import evaluating
from ..unfuse import expert_groups

# The arguments and keywords by which a module is called
Call = tuple[tuple, dict]


class StopForward(Exception):
    """Raised by a hook when a forward pass has reached what was wanted of it."""


def as_call(batch) -> Call:
    """(arguments, keywords) by which a model takes a batch: a mapping, a tuple or list, or anything else as it is."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def check_calibration(calibration: Iterable) -> None:
    """Raise TypeError unless it can be an iterable of batches; a tensor or a mapping is one batch."""
    if not isinstance(calibration, Iterable) or isinstance(calibration, (Tensor, Mapping)):
        raise TypeError(f"calibration: expected an iterable of batches, got {type(calibration).__name__}")


def calls_of(calibration: Iterable) -> list[Call]:
    """The calls by which a model takes all batches.

    Raises:
        TypeError, ValueError: ``calibration`` is no iterable of batches, or holds none.
    """
    check_calibration(calibration)
    calls = [as_call(batch) for batch in calibration]
    if not calls:
        raise ValueError("calibration: expected at least one batch, got none")
    return calls


def run_call(module: nn.Module, call: Call):
    args, kwargs = call
    return module(*args, **kwargs)


@contextmanager
def watching_inputs(hooks: Iterable[tuple[nn.Module, Callable[[Tensor], None]]]) -> Iterator[None]:
    """While it lasts, ``hook(x)`` is called before every forward pass of its module, with the module's input x."""

    def before(hook):
        return lambda module, args, kwargs: hook(args[0] if args else kwargs["input"])

    handles = [module.register_forward_pre_hook(before(hook), with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_squares(model: nn.Module, layers: Mapping[str, nn.Module], calibration: Iterable) -> dict[str, Tensor]:
    """Sum of squares of every input column of every layer over the calibration batches, float32 [K] by name.

    Batches are taken one at a time. Of an expert that none of their tokens is routed to, ones.

    Warns:
        UserWarning: if there are such experts.

    Raises:
        TypeError, ValueError: ``calibration`` is no iterable of batches or holds none, or a layer sees none of them.
    """
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            x = x.reshape(-1, x.shape[-1])
            squares = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    check_calibration(calibration)
    batches = 0
    with watching_inputs((layer, hook(name)) for name, layer in layers.items()):
        with torch.no_grad(), evaluating(model), resetting(model):
            for batch in calibration:
                run_call(model, as_call(batch))
                batches += 1
    if not batches:
        raise ValueError("calibration: expected at least one batch, got none")
    unseen = check_all_reached(model, {name: layer for name, layer in layers.items() if name not in sums})
    if unseen:
        warnings.warn(
            f"calibration: {len(unseen)} matrices of experts saw no token, such as {unseen[0]}, and get masks by "
            "magnitude; more batches reach more experts",
            stacklevel=2,
        )
    return sums | {name: torch.ones(layers[name].in_features, device=layers[name].weight.device) for name in unseen}


def gram_matrices(
    module: nn.Module, calls: Iterable[Call], layers: Sequence[nn.Module], stop: bool = False
) -> list[Tensor | None]:
    """X^T X of the inputs X of each layer over all calls of a module.

    Args:
        module: holds the layers.
        calls: of the module.
        layers: whose inputs are taken.
        stop: whether a forward pass ends at the first input of a layer.

    Returns:
        float32 [K, K] by layer; None of a layer that saw no input.
    """
    grams: list[Tensor | None] = [None] * len(layers)

    def hook(index: int) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            x = x.reshape(-1, x.shape[-1]).float()
            if grams[index] is None:
                grams[index] = x.new_zeros(x.shape[1], x.shape[1])
            grams[index].addmm_(x.T, x)
            if stop:
                raise StopForward

        return add

    with watching_inputs((layer, hook(index)) for index, layer in enumerate(layers)):
        for call in calls:
            with suppress(StopForward):
                run_call(module, call)
    return grams


def check_all_reached(model: nn.Module, unseen: Mapping[str, nn.Module]) -> list[str]:
    """Raise ValueError if there are layers that saw no input; but for those of experts, whose names are returned."""
    experts = expert_groups(model)
    names = [name for name, layer in unseen.items() if layer not in experts]
    if names:
        raise ValueError(f"calibration: expected batches that reach every layer, {names} saw no input")
    return list(unseen)
