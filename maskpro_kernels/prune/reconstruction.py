"""Masks that reconstruct the outputs of every layer, by swap descent on the Gram matrices of the layers' inputs.

With a refit also weights: kept values make up for what a layer has dropped, before the next layer's inputs are taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..fsdp import is_distributed
from ..modules import evaluating
from ..pattern import NMPattern
from .blocks import calls_by_block, layers_in_order
from .calibration import Call, calls_of, gram_matrices
from .layer_masks import LayerMasks
from .least_squares import FITS, check_damping, refit_rows
from .refitted_swaps import conditional_blocks, swap_and_refit
from .sharded_masks import ShardedMasks
from .swap_descent import SWEEPS, by_place, descend_rows, from_places, kept_of, to_places

# In how many parts the online schedule takes the batches, and what a Gram matrix keeps of those before
ROUNDS = 8
DECAY = 0.5

# How much memory the Gram matrices of a mixture's experts may take together: each further part is a forward pass more
GRAM_BYTES = 1 << 30

# What is added to the diagonal of a Gram matrix, as a share of its mean
DAMPING = 0.01

# Improves layers with the same input on its Gram matrix
Visit = Callable[[Sequence[str], Tensor], None]


class Reconstruction(NamedTuple):
    """What ``reconstruct`` has found.

    Attributes:
        codes: group codes [out, K / M] by name.
        weights: refitted weights [out, K] by name, as tensors of their own; none without a refit.
    """

    codes: dict[str, Tensor]
    weights: dict[str, Tensor]


class Told:
    """A progress function, if there is one, told of how many layers are done: of none at first."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int):
        self._progress, self._total = progress, total
        self._tell(0)

    def _tell(self, done: int) -> None:
        self._done = done
        if self._progress is not None:
            self._progress(done, self._total)

    def one_more(self) -> None:
        self._tell(self._done + 1)

    def all_done(self) -> None:
        """Where experts were left out, of the rest."""
        if self._done < self._total:
            self._tell(self._total)


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    codes: Mapping[str, Tensor],
    pattern: str | NMPattern,
    calibration: Iterable,
    *,
    refit: str = "none",
    schedule: str = "sequential",
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    progress: Callable[[int, int], None] | None = None,
) -> Reconstruction:
    """Masks under which the layers' outputs come near to those of the whole weights, on the inputs that they see.

    Layers that are given the same tensor share its Gram matrix.

    Args:
        model: holds ``layers``; its weights stay as they are.
        layers: nn.Linear or alike, by name.
        codes: group codes to start from, by the same names.
        pattern: "N:M" or NMPattern.
        calibration: batches for the model, each a tensor, a tuple or a mapping.
        refit: "scales" or "weights" refit each layer behind its swaps; the layers behind see inputs of the refitted
            ones. With "weights" more swaps follow, which count on the refit (``prune/refitted_swaps.py``).
        schedule: "sequential", see ``layer_by_layer``, or "online", see ``all_together``, without a refit.
        damping: what is added to the diagonal of a Gram matrix, as a share of its mean.
        sweeps: most sweeps of a row each time, see ``swap_descent``.
        progress: called with how many layers are done, and of how many, before the first and after each.

    Warns:
        UserWarning: of experts that no token reaches, which keep their codes and weights.

    Raises:
        TypeError, ValueError: an argument is not as above, there is no batch, or another layer sees none of them.
    """
    pattern = NMPattern(pattern)
    _check_options(refit, schedule, damping)
    calls = calls_of(calibration)
    visits = min(ROUNDS, len(calls)) if schedule == "online" else 1
    told = Told(progress, len(layers) * visits)
    masks = masks_of(model, layers, codes, dict.fromkeys(layers, pattern))

    def descend(names: Sequence[str], gram: Tensor) -> None:
        ordered, own = by_place(gram.to(layers[names[0]].weight.device), pattern.m, damping)
        swapped = partial(descend_rows, gram=ordered, blocks=own, pattern=pattern, sweeps=sweeps)
        for name in names:
            weight, refitted = masks.dense(name), None
            found, _ = masks.by_rows(swapped, weight, masks.whole_codes(name))
            if refit != "none":
                found, refitted = _refitted(weight, found, ordered, pattern, refit, masks)
            masks.put(name, found, refitted)
            told.one_more()

    with evaluating(model), without_cache(model), masks.running():
        unvisited = SCHEDULES[schedule](model, layers, calls, descend, masks)
    tell_unvisited(unvisited, "keep their masks and weights")
    told.all_done()
    return Reconstruction(masks.codes, masks.weights)


def masks_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    codes: Mapping[str, Tensor],
    patterns: Mapping[str, NMPattern],
) -> LayerMasks:
    """Those of layers that one process has, or of layers that ranks share, whose codes are those of this rank."""
    if any(is_distributed(layer.weight) for layer in layers.values()):
        return ShardedMasks(model, layers, codes, patterns)
    return LayerMasks(layers, codes, patterns)


def _refitted(
    weight: Tensor, codes: Tensor, gram: Tensor, pattern: NMPattern, refit: str, masks: LayerMasks
) -> tuple[Tensor, Tensor]:
    """(group codes, weight) of a layer after its swaps; the Gram matrix is one of ``by_place``."""
    if refit == "weights":
        blocks = conditional_blocks(codes, gram, pattern)
        codes, refitted, _ = masks.by_rows(
            lambda weight, codes: swap_and_refit(weight, codes, gram, blocks, pattern), weight, codes
        )
        return codes, refitted

    def fitted(weight: Tensor, codes: Tensor) -> list[Tensor]:
        kept = kept_of(codes, pattern.m).view(weight.shape) > 0
        return [from_places(refit_rows(to_places(weight, pattern.m), kept, gram, FITS[refit])[0], pattern.m)]

    return codes, *masks.by_rows(fitted, weight, codes)


def check_refit(refit: str) -> None:
    """Raise ValueError unless ``refit`` is "none" or names a refit."""
    if refit != "none" and (not isinstance(refit, str) or refit not in FITS):
        raise ValueError(f"refit: expected one of {('none', *FITS)}, got {refit!r}")


def _check_options(refit: str, schedule: str, damping: float) -> None:
    check_refit(refit)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {tuple(SCHEDULES)}, got {schedule!r}")
    if refit != "none":
        check_damping(damping)
        if schedule != "sequential":
            raise ValueError(f'schedule: expected "sequential" with a refit, got {schedule!r}')


def layer_by_layer(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calls: list[Call],
    visit: Visit,
    masks: LayerMasks,
) -> list[str]:
    """Visit the layers in the order in which they run, on all batches; those before have been visited.

    In a chain of blocks only the inputs of one block and one Gram matrix are held; of the experts of a mixture as many
    as fit into GRAM_BYTES. Else the whole model runs for every layer.

    Args:
        masks: under which the model runs, told which block is entered.

    Returns:
        names of the experts that no token has reached.
    """
    visited: set[str] = set()
    for module, block_calls in calls_by_block(model, layers, calls):
        masks.enter_block(module)
        for stage in layers_in_order(module, block_calls, layers):
            for groups in _held_together(stage.groups, layers):
                # a layer that runs once needs nothing of the forward pass behind its input
                stop, first = stage.once and masks.may_stop, [layers[names[0]] for names in groups]
                grams = gram_matrices(module, block_calls, first, stop)
                for names, gram in zip(groups, grams, strict=True):
                    # masks before may have routed an expert's last token away from it
                    if gram is not None:
                        visit(names, gram)
                        visited.update(names)
    return [name for name in layers if name not in visited]


def tell_unvisited(names: Sequence[str], what: str) -> None:
    """Warn of experts that no token has reached, and tell what becomes of them."""
    if names:
        warnings.warn(
            f"calibration: {len(names)} matrices of experts saw no token, such as {names[0]}, and {what}; more batches "
            "reach more experts",
            stacklevel=4,
        )


def _held_together(groups: list[list[str]], layers: Mapping[str, nn.Module]) -> Iterator[list[list[str]]]:
    """Groups of a stage in parts whose Gram matrices take at most GRAM_BYTES, and at least one."""
    part, held = [], 0
    for names in groups:
        own = 4 * layers[names[0]].weight.shape[1] ** 2
        if part and held + own > GRAM_BYTES:
            yield part
            part, held = [], 0
        part.append(names)
        held += own
    yield part


def all_together(
    model: nn.Module, layers: Mapping[str, nn.Module], calls: list[Call], visit: Visit, masks: LayerMasks
) -> list[str]:
    """Visit all layers together, after every eighth of the batches, on Gram matrices that decay by half each time.

    A batch takes one forward pass. The Gram matrices of all layers are held. Returns the names of the experts that no
    token has reached.
    """
    masks.enter_block(model)
    stages = [names for groups, _ in layers_in_order(model, calls, layers) for names in groups]
    grams: list[Tensor | None] = [None] * len(stages)
    for first in range(min(ROUNDS, len(calls))):
        found = gram_matrices(model, calls[first::ROUNDS], [layers[names[0]] for names in stages])
        for index, gram in enumerate(found):
            if gram is not None:
                grams[index] = gram if grams[index] is None else DECAY * grams[index] + gram
        for names, gram in zip(stages, grams, strict=True):
            if gram is not None:
                visit(names, gram)
    visited = {name for names in stages for name in names}
    return [name for name in layers if name not in visited]


SCHEDULES = {"sequential": layer_by_layer, "online": all_together}


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """With a language model that keeps no keys and values: a block that runs again would append to them."""
    config = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True
