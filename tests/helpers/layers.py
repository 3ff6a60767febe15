"""Layers of several sizes, drawn and updated as a group, and each by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from helpers.compiled import DRAW, INVERSE, SEED, STEP, Matrix, unmoved
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.counter import Counter
from maskpro_kernels.ops.layer_groups import GroupedLayer, LayerGroup, draw_layers_, update_layers_

# Rows and groups in a row: one that no block divides, a single group, one without groups
SIZES = [(19, 53), (1, 1), (3, 200), (0, 16), (16, 16)]
# By the names of the launches, of which those of "by codes" are two
OVER_LAYERS = ("sample_masks", "score_update_of_layers", "score_updates_of_layers", "by codes")
COEFS, DRAWS = [0.37, -1.2, 0.05], [DRAW, 4, 65_535]


def numbers(step: int = STEP) -> list[Tensor]:
    """Seed and step."""
    return [torch.tensor(SEED), torch.tensor(step)]


class ManyLayers:
    """Layers of one pattern and dtype.

    Args:
        shard: whether their rows are parts of longer ones.
        sizes: (rows, groups in a row) of each.
        moved: gives the memory that the logits are moved to.
        spread: of the logits, see ``Matrix``.
    """

    def __init__(
        self,
        n: int,
        m: int,
        dtype: torch.dtype = torch.float32,
        shard: bool = False,
        sizes=SIZES,
        moved: Callable[[Tensor], Tensor] = unmoved,
        spread: str = "mixed",
    ):
        self.n, self.m, self.moved = n, m, moved
        self.layers = [
            GroupedLayer(
                Matrix(n, m, dtype, rows=rows, groups=groups, spread=spread).logits,
                layer=5 + i,
                group_offset=12_345 * i,
                group_row_stride=groups + 7 if shard else groups,
            )
            for i, (rows, groups) in enumerate(sizes)
        ]

    def group(self) -> LayerGroup:
        """Group of copies of the layers."""
        layers = [layer._replace(logits=self.moved(layer.logits.clone())) for layer in self.layers]
        return LayerGroup(layers, self.n, self.m)

    def drawn(self) -> list[Tensor]:
        group = self.group()
        draw_layers_(group, INVERSE, *numbers(), torch.tensor(DRAWS[0]))
        return group.codes

    def flip_rates(self) -> list[float]:
        group = self.group()
        draw_layers_(group, INVERSE, *numbers(), torch.tensor(DRAWS[0]))
        return [group.flips_of(i) / max(count, 1) for i, count in enumerate(group.counts)]

    def updated(self, draws: int = 1, by_codes: bool = False) -> list[Tensor]:
        group = self.group()
        if by_codes:
            draw_layers_(group, INVERSE, *numbers(), torch.tensor(DRAWS[0]))
        coef, ids = torch.tensor(COEFS[:draws]), torch.tensor(DRAWS[:draws])
        update_layers_(group, coef, INVERSE, *numbers(), ids, by_codes)
        return [layer.logits for layer in group.layers]

    def drawn_alone(self) -> list[Tensor]:
        """By the reference, one layer after the other."""
        return [
            reference.sample_mask(logits, self.n, self.m, INVERSE, counter)
            for logits, counter in self._alone(torch.tensor(DRAWS[0]))
        ]

    def updated_alone(self, draws: int = 1) -> list[Tensor]:
        coef, found = torch.tensor(COEFS[:draws]), []
        for logits, counter in self._alone(torch.tensor(DRAWS[:draws])):
            reference.score_update_(logits, coef, self.n, self.m, INVERSE, counter)
            found.append(logits)
        return found

    def call(self, kernel: str) -> list[Tensor]:
        """Result of one of ``OVER_LAYERS``."""
        return {
            "sample_masks": self.drawn,
            "score_update_of_layers": self.updated,
            "score_updates_of_layers": lambda: self.updated(draws=3),
            "by codes": lambda: self.updated(by_codes=True),
        }[kernel]()

    def _alone(self, draw: Tensor) -> Iterator[tuple[Tensor, Counter]]:
        for logits, layer, *place in self.layers:
            yield logits.clone(), Counter(*numbers(), torch.tensor(layer), draw, *place)
