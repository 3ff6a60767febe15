"""Layers that are drawn and updated together: by one launch, or one call of machine code, instead of one a layer.

The bits are those of ``sample_mask`` and ``score_update_`` for each layer. Numbers that change from step to step are
read from tensors on the device, so that a captured CUDA graph reads the current ones.

``draws_once`` decides whether a step draws its masks once, into codes, or at each use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .counter import Counter
from .definitions import top_n_mask
from .dispatch import table, uses_triton
from .pattern import code_dtype
from .triton import tiles

# Alignment of loads of 16 bytes
ALIGNED = 16


class GroupedLayer(NamedTuple):
    """Layer in a group of layers: contiguous logits [rows, K], and parts of a ``Counter``."""

    logits: Tensor
    layer: int
    group_offset: int
    group_row_stride: int


def kind_of(layer: GroupedLayer, n: int, m: int) -> tuple:
    """Key of a compiled kernel; layers with the same key form a ``LayerGroup``."""
    logits = layer.logits
    whole = layer.group_row_stride == logits.shape[1] // m
    return logits.device, logits.dtype, n, m, whole, logits.data_ptr() % ALIGNED == 0


class LayerGroup:
    """Layers with the same ``kind_of``, their addresses, and the codes of their masks.

    A group is valid for the given memory of the logits. If logits move to other memory, make another group.

    Args:
        layers: layers with the same ``kind_of``, at least one.
        n, m: of the pattern.

    Attributes:
        whole: whether rows of groups are adjacent in the whole layer.
        aligned: whether all logits begin at a multiple of 16 bytes.
        largest: number of groups of the largest layer.
        codes: group codes [rows, K / M] of each layer after ``draw_layers_``; else None.
        flips: int32 for each layer: numbers of groups, by parts of the layer, whose draw differs from the N largest
            logits; None if no kernel has counted them.
        spreads: distribution of programs over the layers, by launch configuration.
    """

    def __init__(self, layers: Sequence[GroupedLayer], n: int, m: int):
        self.layers = tuple(layers)
        self.n = n
        self.m = m
        self.device, self.dtype, _, _, self.whole, self.aligned = kind_of(layers[0], n, m)
        self.counts = [layer.logits.numel() // m for layer in layers]
        self.largest = max(self.counts)
        self.codes: list[Tensor] | None = None
        self.flips: Sequence[Tensor] | None = None
        self.spreads: dict = {}
        self._addresses: Tensor | None = None

    def allocate_codes(self) -> None:
        """Allocate memory for codes, once."""
        if self.codes is not None:
            return
        # each layer's codes begin at an aligned address
        sizes = [-(-count // ALIGNED) * ALIGNED for count in self.counts]
        # inference tensors would be useless to a later step with autograd
        with torch.inference_mode(False):
            memory = torch.empty(sum(sizes), dtype=code_dtype(self.m), device=self.device)
            self.codes = [
                part[:count].view(len(layer.logits), layer.logits.shape[1] // self.m)
                for part, count, layer in zip(memory.split(sizes), self.counts, self.layers, strict=True)
            ]
        if self._addresses is not None:
            # in place, since a captured graph may read it
            self._addresses.copy_(self._current_addresses())

    def addresses(self) -> Tensor:
        """Table of the layers, int64 [layers, 7] on the device, made once; ``triton.grouped`` has its fields."""
        if self._addresses is None:
            # inference tensors would be useless to a later step with autograd
            with torch.inference_mode(False):
                self._addresses = self._current_addresses()
        return self._addresses

    def _current_addresses(self) -> Tensor:
        rows = []
        for i, (logits, layer, offset, row_stride) in enumerate(self.layers):
            codes = 0 if self.codes is None else self.codes[i].data_ptr()
            columns = logits.shape[1] // self.m
            rows.append((logits.data_ptr(), codes, self.counts[i], columns, offset, row_stride, layer))
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def flips_of(self, i: int) -> int:
        """Number of groups of the i-th layer whose codes differ from those of the N largest logits."""
        if self.flips is not None:
            return int(self.flips[i].sum())
        return int((self.codes[i] != top_n_mask(self.layers[i].logits.detach(), self.n, self.m)).sum())

    def counter_of(self, layer: GroupedLayer, seed: Tensor, step: Tensor, draw: Tensor) -> Counter:
        id_ = torch.full((), layer.layer, dtype=torch.int64, device=self.device)
        return Counter(seed, step, id_, draw, layer.group_offset, layer.group_row_stride)


def draw_layers_(group: LayerGroup, inv_temperature: float, seed: Tensor, step: Tensor, draw: Tensor) -> None:
    """Set the codes of a group of layers to those of ``sample_mask``; seed, step and draw are 0-dim int64."""
    group.allocate_codes()
    table(seed.device.type).draw_layers_(group, inv_temperature, seed, step, draw)
    for codes in group.codes:
        # inference tensors would be useless to a later step with autograd
        torch.autograd.graph.increment_version(codes)


def update_layers_(
    group: LayerGroup, coef: Tensor, inv_temperature: float, seed: Tensor, step: Tensor, draws: Tensor, by_codes=False
) -> None:
    """Update the logits of a group of layers like ``score_update_``.

    Args:
        coef: float32 [draws].
        draws: int64 [draws].
        by_codes: whether the group's codes are those of this single draw. For N up to 4 it is then not made again;
            above, the score needs the noise of the draw.
    """
    by_codes = by_codes and len(coef) == 1 and group.n <= reference.EXACT_SCORE_MAX_N
    table(seed.device.type).update_layers_(group, coef, inv_temperature, seed, step, draws, by_codes)
    for layer in group.layers:
        if not layer.logits.is_inference():
            # invalidates logits that autograd has saved
            torch.autograd.graph.increment_version(layer.logits)


class Uses(NamedTuple):
    """Uses of a layer's mask in a step.

    Attributes:
        tokens: most tokens of a product.
        products: number of products with the masked weight, forwards and gradients of inputs.
        slopes: number of straight-through slopes, or updates by them.
        updates: number of updates by the score of this draw alone.
    """

    tokens: int
    products: int
    slopes: int = 0
    updates: int = 0


class Costs(NamedTuple):
    """Picoseconds a weight: for a draw into codes, and for each use (if it draws, if it reads codes).

    Attributes:
        draw: a draw into codes.
        one_pass: a product that masks the weight itself.
        weight: a masked weight, written to memory for a product.
        slope: the masking in a slope, or in an update by it.
        update: an update by an exact score.
    """

    draw: float
    one_pass: tuple[float, float]
    weight: tuple[float, float]
    slope: tuple[float, float]
    update: tuple[float, float]


# For 2:4, float32 logits, weights of 16 bits and a gap of 10. Costs of GPUs are from the model of
# benchmarks/modelled_costs.py, those of a CPU were measured on one core of an Intel Xeon. The model does not cover
# gfx942, which has the costs of an H100: only ratios matter, and most of these uses are bound by memory.
COSTS = {
    "sm_80": Costs(draw=2.1, one_pass=(2.9, 1.2), weight=(3.9, 2.1), slope=(2.1, 0.1), update=(3.9, 4.0)),
    "sm_90": Costs(draw=1.4, one_pass=(1.8, 0.8), weight=(2.4, 1.3), slope=(1.4, 0.1), update=(2.4, 2.5)),
    "sm_100": Costs(draw=1.1, one_pass=(1.2, 0.7), weight=(1.1, 0.5), slope=(1.1, 0.0), update=(1.8, 1.6)),
    "cpu": Costs(draw=1200, one_pass=(1630, 580), weight=(1630, 580), slope=(1200, 0), update=(2440, 1250)),
}
COSTS["gfx942"] = COSTS["sm_90"]


def draws_once(device: torch.device, n: int, uses: Uses) -> bool:
    """Return whether a step with these uses of each mask costs less if it draws all masks once, into codes."""
    row = tiles.architecture(device) if uses_triton(device.type) else "cpu"
    costs = COSTS[row]
    one_pass = [row != "cpu" and 0 < uses.tokens <= tiles.one_pass_tokens(kind, row) for kind in ("drawn", "codes")]
    of_product = [(costs.one_pass if whole else costs.weight)[way] for way, whole in enumerate(one_pass)]
    # for larger N, the score needs the noise of the draw
    of_update = costs.update if n <= reference.EXACT_SCORE_MAX_N else (0.0, 0.0)
    each = (uses.products, of_product), (uses.slopes, costs.slope), (uses.updates, of_update)
    drawn, by_codes = (sum(count * cost[way] for count, cost in each) for way in (0, 1))
    return costs.draw + by_codes < drawn
