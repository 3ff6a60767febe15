"""How much memory the steps of a run will take: found before the first one, on the dense model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..pattern import NMPattern
from .estimator import Estimator
from .step import LossFn, modes_of_step

# Rows that are computed to know of all
FEW = 4


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that the steps of a run take at once, over all devices of a process.

    Attributes:
        weights: of the model, with its buffers.
        logits: of the masks.
        masks: group codes of all layers, where a step draws them once.
        optimizer: what the estimator holds from step to step.
        gradients: what a step holds of slopes and of gradients of weights.
        activations: all else that a forward, and its backward where there is one, hold at once.
        teacher: what the dense model says of a batch.
    """

    weights: int
    logits: int
    masks: int
    optimizer: int
    gradients: int
    activations: int
    teacher: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def memory_need(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    estimator: Estimator,
    *,
    pattern: str | NMPattern,
    logits_dtype: torch.dtype,
    alone: bool,
    activations: int,
    teacher: int = 0,
) -> MemoryNeed:
    """What the steps of a run take.

    Args:
        model: not converted yet.
        layers: that will get masks, by name; each with a ``weight`` [out, K].
        estimator: of the run.
        pattern: of the masks.
        logits_dtype: of the logits.
        alone: whether a step takes a single batch on a single rank: by straight-through no slopes are held then.
        activations: see ``activation_bytes``.
        teacher: bytes that the dense model's logits take.
    """
    weights = [layer.weight for layer in layers.values()]
    held, pattern = estimator.memory(weights, alone), NMPattern(pattern)
    # each product makes the weight under its mask
    largest = max(weight.nbytes for weight in weights)
    return MemoryNeed(
        weights=bytes_of(chain(model.parameters(), model.buffers())),
        logits=sum(weight.numel() for weight in weights) * logits_dtype.itemsize,
        masks=sum(weight.numel() // pattern.m for weight in weights) * pattern.code_dtype.itemsize,
        optimizer=held.optimizer,
        gradients=held.gradients,
        activations=activations + largest,
        teacher=teacher,
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of all storages, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def activation_bytes(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    loss_fn: LossFn,
    batch_of: Callable[[int], object],
    rows: int,
    gradients: bool,
) -> int:
    """Most bytes that a forward of a batch holds at once beside the weights, and its backward where there is one.

    A batch of a few rows is computed, and one of half as many tells what each further row adds. Gradients of weights
    are not among them. Nothing of the model changes.

    Args:
        model: not converted yet; its modules are in eval mode meanwhile, but for blocks that are checkpointed.
        layers: that will get masks, by name.
        loss_fn: ``loss_fn(model, batch)``.
        batch_of: gives a batch of so many rows; their content has no effect.
        rows: of a batch.
        gradients: whether there is a backward.
    """
    weights, few = [layer.weight for layer in layers.values()], min(rows, FEW)
    with modes_of_step(model, {}, drawing=False, checkpointing=gradients), _requiring_gradients(weights, gradients):
        peak = _peak(model, weights[0], loss_fn, batch_of(few), gradients)
        if few == rows:
            return peak
        half = _peak(model, weights[0], loss_fn, batch_of(few // 2), gradients)
    return peak + (rows - few) * (peak - half) // (few - few // 2)


@contextmanager
def _requiring_gradients(weights: Iterable[nn.Parameter], wanted: bool):
    before = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in before:
            weight.requires_grad_(wanted)
        yield
    finally:
        for weight, requires_grad in before:
            weight.requires_grad_(requires_grad)


def _peak(model: nn.Module, first: nn.Parameter, loss_fn: LossFn, batch: object, gradients: bool) -> int:
    known = chain(
        model.parameters(), model.buffers(), (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    )
    # only the first layer's gradient is asked for: backward passes all others, and theirs are counted apart
    with torch.set_grad_enabled(gradients), Allocations(known) as allocations:
        loss = loss_fn(model, batch)
        if gradients:
            torch.autograd.grad(loss, first)
    return allocations.peak


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while the mode is on, until they are freed.

    Args:
        known: tensors that are there already.

    Attributes:
        live: bytes now.
        peak: the most there were.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
