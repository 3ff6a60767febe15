"""Layers that are drawn and updated together: by one launch, or one call of machine code, instead of one a layer.

Bits are those of ``sample_mask`` and ``score_update_`` of each layer by itself. Numbers that change from step to step
are read from tensors on the device, so that a captured CUDA graph goes on with those that are there.

``draws_once`` is the rule by which a step draws its masks once, into codes, or at each use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .counter import Counter
from .dispatch import kernels, machine_code, run_reference, scalar, uses_kernels, uses_machine_code
from .pattern import code_dtype
from .registry import top_n_mask
from .triton import tiles

# What vectors of 16 bytes are loaded from
ALIGNED = 16


class GroupedLayer(NamedTuple):
    """A layer as operations on groups of layers take it: contiguous logits [rows, K], and parts of a ``Counter``."""

    logits: Tensor
    layer: int
    group_offset: int
    group_row_stride: int


def kind_of(layer: GroupedLayer, n: int, m: int) -> tuple:
    """Key by which a kernel is compiled: layers of one kind make a ``LayerGroup``."""
    logits = layer.logits
    whole = layer.group_row_stride == logits.shape[1] // m
    return logits.device, logits.dtype, n, m, whole, logits.data_ptr() % ALIGNED == 0


class LayerGroup:
    """Layers of one kind, where they lie, and the codes of their masks.

    It stands for the memory of the logits as they were given: who moves them elsewhere makes another one.

    Args:
        layers: of one ``kind_of``, at least one.
        n, m: of the pattern.

    Attributes:
        whole: whether rows of groups lie side by side in the whole layer.
        aligned: whether all logits begin at a multiple of 16 bytes.
        largest: groups of the largest layer.
        codes: group codes [rows, K / M] of each layer, once ``draw_layers_`` has drawn them; else None.
        flips: of each layer int32, how many groups in parts of it left the N largest logits in that draw; None where no
            kernel has counted them.
        spreads: how launches spread over the layers, by their configuration.
    """

    def __init__(self, layers: Sequence[GroupedLayer], n: int, m: int):
        self.layers, self.n, self.m = tuple(layers), n, m
        self.device, self.dtype, _, _, self.whole, self.aligned = kind_of(layers[0], n, m)
        self.counts = [layer.logits.numel() // m for layer in layers]
        self.largest = max(self.counts)
        self.codes: list[Tensor] | None = None
        self.flips: Sequence[Tensor] | None = None
        self.spreads: dict = {}
        self._table: Tensor | None = None

    def allocate_codes(self) -> None:
        """Memory for codes, which then stays where it is."""
        if self.codes is not None:
            return
        # each layer's begin where vectors may
        sizes = [-(-count // ALIGNED) * ALIGNED for count in self.counts]
        # a later step may be one of autograd
        with torch.inference_mode(False):
            memory = torch.empty(sum(sizes), dtype=code_dtype(self.m), device=self.device)
            self.codes = [
                part[:count].view(len(layer.logits), layer.logits.shape[1] // self.m)
                for part, count, layer in zip(memory.split(sizes), self.counts, self.layers, strict=True)
            ]
        if self._table is not None:
            # in place, for a captured graph may read it
            self._table.copy_(kernels("grouped").table_of(self))

    def table(self) -> Tensor:
        """As the kernels find the layers; on the device, and made once."""
        if self._table is None:
            # a later step may be one of autograd
            with torch.inference_mode(False):
                self._table = kernels("grouped").table_of(self)
        return self._table

    def flips_of(self, i: int) -> int:
        """How many groups of the i-th layer have codes that are not those of the N largest logits."""
        if self.flips is not None:
            return int(self.flips[i].sum())
        return int((self.codes[i] != top_n_mask(self.layers[i].logits.detach(), self.n, self.m)).sum())

    def counter_of(self, layer: GroupedLayer, seed: Tensor, step: Tensor, draw: Tensor) -> Counter:
        id_ = torch.full((), layer.layer, dtype=torch.int64, device=self.device)
        return Counter(seed, step, id_, draw, layer.group_offset, layer.group_row_stride)


def draw_layers_(group: LayerGroup, inv_temperature: float, seed: Tensor, step: Tensor, draw: Tensor) -> None:
    """The codes of a group of layers become those of ``sample_mask``; seed, step and draw are 0-dim int64."""
    group.allocate_codes()
    inverse = scalar(inv_temperature, seed)
    if uses_kernels(seed):
        group.flips = kernels("grouped").draw_layers_(group, inv_temperature, seed, step, draw)
    elif not (uses_machine_code(seed) and machine_code("kernels").draw_layers_(group, inverse, seed, step, draw)):
        for layer, codes in zip(group.layers, group.codes, strict=True):
            where = group.counter_of(layer, seed, step, draw.view(()))
            codes.copy_(run_reference("sample_mask", layer.logits, where, inverse, n=group.n, m=group.m))
    for codes in group.codes:
        # a later step may be one of autograd
        torch.autograd.graph.increment_version(codes)


def update_layers_(
    group: LayerGroup, coef: Tensor, inv_temperature: float, seed: Tensor, step: Tensor, draws: Tensor, by_codes=False
) -> None:
    """The logits of a group of layers become those of ``score_update_``.

    Args:
        coef: float32 [draws].
        draws: int64 [draws].
        by_codes: whether the codes of the group are those of this draw, a single one: it is then not made again, where
            N is at most 4. Above, the score takes the noise of the draw.
    """
    by_codes = by_codes and len(coef) == 1 and group.n <= reference.EXACT_SCORE_MAX_N
    inverse = scalar(inv_temperature, seed)
    if uses_kernels(seed):
        kernels("grouped").update_layers_(group, coef, inv_temperature, seed, step, draws, by_codes)
    elif not (uses_machine_code(seed) and _update_compiled_(group, coef, inv_temperature, seed, step, draws, by_codes)):
        for layer in group.layers:
            where = group.counter_of(layer, seed, step, draws)
            run_reference("score_update_", layer.logits, coef, where, inverse, n=group.n, m=group.m)
    for layer in group.layers:
        if not layer.logits.is_inference():
            # what autograd has saved of them is no longer theirs
            torch.autograd.graph.increment_version(layer.logits)


def _update_compiled_(group: LayerGroup, coef, inv_temperature, seed, step, draws, by_codes) -> bool:
    # codes determine the score of one draw up to an N; numbers that round 16 bits are consecutive here
    exact = len(coef) == 1 and group.n <= reference.EXACT_SCORE_MAX_N
    if not (exact and (group.dtype == torch.float32 or group.whole)):
        return False
    if not by_codes:
        # no loop of machine code for draws and updates at once: what is drawn takes less time than what is computed.
        # Codes of its own, for a while: those of the group are another draw's
        group = LayerGroup(group.layers, group.n, group.m)
        draw_layers_(group, inv_temperature, seed, step, draws)
    return machine_code("kernels").update_layers_(group, coef, scalar(inv_temperature, seed), seed, step, draws)


class Uses(NamedTuple):
    """Uses of a layer's mask in a step.

    Attributes:
        tokens: most that a product has.
        products: of a weight under the mask, forwards and gradients of inputs.
        slopes: of straight-through, or updates by them.
        updates: by the score of this draw alone.
    """

    tokens: int
    products: int
    slopes: int = 0
    updates: int = 0


class Costs(NamedTuple):
    """Picoseconds a weight: of a draw into codes, and of each use (where it draws, where it reads codes).

    Attributes:
        draw: into codes.
        one_pass: a product that takes the mask while it runs.
        weight: a masked weight, which is written for a product.
        slope: the part of a slope, or an update by it, that takes the mask.
        update: by a score that is exact.
    """

    draw: float
    one_pass: tuple[float, float]
    weight: tuple[float, float]
    slope: tuple[float, float]
    update: tuple[float, float]


# At 2:4, with logits of float32 and weights of 16 bits at a gap of 10: of GPUs by the model that
# benchmarks/modelled_costs.py prints, on a CPU measured on one core of an Intel Xeon. The model does not cover gfx942,
# which takes the costs of an H100: the ratios alone matter, and bytes bound most of these.
COSTS = {
    "sm_80": Costs(draw=2.1, one_pass=(2.9, 1.2), weight=(3.9, 2.1), slope=(2.1, 0.1), update=(3.9, 4.0)),
    "sm_90": Costs(draw=1.4, one_pass=(1.8, 0.8), weight=(2.4, 1.3), slope=(1.4, 0.1), update=(2.4, 2.5)),
    "sm_100": Costs(draw=1.1, one_pass=(1.2, 0.7), weight=(1.1, 0.5), slope=(1.1, 0.0), update=(1.8, 1.6)),
    "cpu": Costs(draw=1200, one_pass=(1630, 580), weight=(1630, 580), slope=(1200, 0), update=(2440, 1250)),
}
COSTS["gfx942"] = COSTS["sm_90"]


def draws_once(device: torch.device, n: int, uses: Uses) -> bool:
    """Say whether a step with these uses of each mask costs less if it draws the masks into codes; N of a group."""
    row = tiles.architecture(device) if uses_kernels(torch.empty(0, device=device)) else "cpu"
    costs = COSTS[row]
    one_pass = [row != "cpu" and 0 < uses.tokens <= tiles.one_pass_tokens(kind, row) for kind in ("drawn", "codes")]
    of_product = [(costs.one_pass if whole else costs.weight)[way] for way, whole in enumerate(one_pass)]
    # by an N above, the score takes the noise of the draw
    of_update = costs.update if n <= reference.EXACT_SCORE_MAX_N else (0.0, 0.0)
    each = (uses.products, of_product), (uses.slopes, costs.slope), (uses.updates, of_update)
    drawn, by_codes = (sum(count * cost[way] for count, cost in each) for way in (0, 1))
    return costs.draw + by_codes < drawn
