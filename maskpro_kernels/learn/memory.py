"""How much memory the steps of a run will take: found before the first one, on the dense model.

A model of shapes alone, on the meta device or of fake tensors, tells the same.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..pattern import NMPattern
from .amounts import NOTHING, Amount
from .estimator import Estimator
from .offloaded_logits import COPIES
from .step import LossFn, modes_of_step

# Rows that are computed to know of all
FEW = 4


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that the steps of a run take at once, over all devices of a process. Each is an ``Amount``.

    Attributes:
        weights: of the model, with its buffers.
        logits: of the masks.
        masks: group codes of all layers, where a step draws them once.
        optimizer: what the estimator holds from step to step.
        gradients: what a step holds of slopes and of gradients of weights.
        activations: all else that a forward, and its backward where there is one, hold at once.
        teacher: what the dense model says of a batch.
        copies: of logits that live elsewhere, on the devices of their weights.
        gathered: whole weights, where ranks hold shards of them.
    """

    weights: Amount
    logits: Amount
    masks: Amount
    optimizer: Amount
    gradients: Amount
    activations: Amount
    teacher: Amount
    copies: Amount
    gathered: Amount

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


class Activations(NamedTuple):
    """What a batch holds at once.

    Attributes:
        rows: of the batch that was computed.
        size: its bytes.
        further: bytes of each further row; None where no other batch was computed.
    """

    rows: int
    size: int
    further: int | None

    def of(self, rows: int) -> Amount:
        """Those of a batch of so many rows."""
        found, more = Amount(self.size, f"{self.size:,} bytes of a computed batch"), rows - self.rows
        if not more:
            return found
        told = f"{found.formula} {'+' if more > 0 else '-'} {abs(more):,} rows of it x {self.further:,} bytes"
        return Amount(found + more * self.further, told)


def memory_need(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    estimator: Estimator,
    *,
    pattern: str | NMPattern,
    logits_dtype: torch.dtype,
    alone: bool,
    activations: Amount,
    teacher: Amount = NOTHING,
    logits_device: torch.device | None = None,
    shards: int = 1,
    gathered: Amount = NOTHING,
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
        teacher: what the dense model's logits take.
        logits_device: where the logits live; None: with their weights.
        shards: over how many ranks each parameter is shared out by rows. The last rank may have fewer; the first one is
            told.
        gathered: what a rank holds of whole weights beside its shards.
    """
    weights, pattern = [layer.weight for layer in layers.values()], NMPattern(pattern)
    own = [shard(weight, shards) for weight in weights]
    largest = max(weights, key=lambda weight: weight.nbytes)
    held = estimator.memory(own, alone)
    # each rank sends the whole slope of a layer, in float32, and gets that of its own rows from all
    summed = Amount.of(2 * largest.numel(), "slopes of the largest layer, sent and received", 4)
    whole = summed if shards > 1 and estimator.needs_gradients else NOTHING
    elsewhere = [
        shard.numel()
        for shard, weight in zip(own, weights, strict=True)
        if logits_device is not None and weight.device != logits_device
    ]
    return MemoryNeed(
        weights=_bytes_by_dtype(model.parameters(), "weights", shards)
        + _bytes_by_dtype(model.buffers(), "numbers in buffers"),
        logits=Amount.of(sum(map(Tensor.numel, own)), "logits", logits_dtype.itemsize),
        masks=Amount.of(sum(map(Tensor.numel, own)) // pattern.m, "groups", pattern.code_dtype.itemsize),
        optimizer=NOTHING + held.optimizer,
        gradients=NOTHING + held.gradients + whole,
        # each product makes the weight under its mask
        activations=activations + Amount.of(largest.numel(), "weights of the largest layer", largest.itemsize),
        teacher=teacher,
        copies=_copies(elsewhere, logits_dtype.itemsize),
        gathered=gathered,
    )


def _copies(counts: Sequence[int], each: int) -> Amount:
    """Of logits that live elsewhere: those of ``COPIES`` layers that follow each other."""
    if not counts:
        return NOTHING
    neighbours = [counts[at : at + COPIES] for at in range(max(len(counts) - COPIES, 0) + 1)]
    most = max(neighbours, key=sum)
    told = " + ".join(f"{count:,}" for count in most)
    return Amount(sum(most) * each, f"({told}) logits of layers in a row x {each} bytes")


def gathered_bytes(model: nn.Module, blocks: Sequence[nn.Module]) -> Amount:
    """What a rank gathers at once of a model whose parameters are sharded, block by block.

    Two blocks that follow each other: one computes while the next one comes. What is in no block stays for the whole
    of a forward and a backward, as under torch's FSDP2.
    """
    within = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in within]
    pairs = [chain.from_iterable(block.parameters() for block in blocks[at : at + 2]) for at in range(len(blocks) or 1)]
    two = max((_bytes_by_dtype(pair, "weights of two blocks") for pair in pairs), default=NOTHING)
    return two + _bytes_by_dtype(outside, "weights outside of blocks")


def snapshot_bytes(weights: Sequence[Tensor], estimator: Estimator, logits_dtype: torch.dtype) -> Amount:
    """The tensors of a snapshot.

    Args:
        weights: of all layers with masks, [out, K].
        estimator: of the run.
        logits_dtype: of the logits.
    """
    logits = Amount.of(sum(map(Tensor.numel, weights)), "logits", logits_dtype.itemsize)
    return logits + estimator.memory(weights, True).stored


def _bytes_by_dtype(tensors: Iterable[Tensor], what: str, shards: int = 1) -> Amount:
    """Of tensors, or of a rank's shards of them; memory that several share counts once."""
    counts = Counter()
    for tensor in _distinct(tensors):
        counts[tensor.itemsize] += shard(tensor, shards).numel()
    return sum((Amount.of(count, what, each) for each, count in counts.items()), NOTHING)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Without those whose memory another one has as well."""
    return list({(t.untyped_storage()._cdata, t.storage_offset()): t for t in tensors}.values())


def shard(tensor: Tensor, shards: int) -> Tensor:
    """The shape of the part that the first rank holds: rows rounded up, as torch's FSDP2 pads them."""
    if shards == 1 or not tensor.dim():
        return tensor
    rows, *others = tensor.shape
    return torch.empty(-(-rows // shards), *others, dtype=tensor.dtype, device="meta")


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of all storages, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def activation_bytes(
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    loss_fn: LossFn,
    batch_of: Callable[[int], object],
    rows: int,
    gradients: bool,
) -> Activations:
    """Most bytes that a forward of a batch holds at once beside the weights, and its backward where there is one.

    A batch of a few rows is computed, and one of half as many tells what each further row adds. Gradients of weights
    are not among them. Nothing of the model changes.

    Args:
        model: not converted yet; its modules are in eval mode meanwhile, but for blocks that are checkpointed.
        weights: of the layers that will get masks; the first one is the first that the model uses.
        loss_fn: ``loss_fn(model, batch)``.
        batch_of: gives a batch of so many rows; their content has no effect.
        rows: of a batch. Where there are more than ``FEW``, what is found tells of other batches as well.
        gradients: whether there is a backward.
    """
    few = min(rows, FEW)
    with modes_of_step(model, {}, drawing=False, checkpointing=gradients), _requiring_gradients(weights, gradients):
        peak = _peak(model, weights[0], loss_fn, batch_of(few), gradients)
        if few == rows:
            return Activations(few, peak, None)
        half = _peak(model, weights[0], loss_fn, batch_of(few // 2), gradients)
    return Activations(few, peak, (peak - half) // (few - few // 2))


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
