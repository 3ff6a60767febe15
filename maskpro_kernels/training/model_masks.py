"""The masks of all layers of a model, drawn together and updated together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..functional.checks import Scalar, coefs_and_draws, on_device, stacked
from ..functional.masks import score_update_, top_n_mask
from ..modules import MaskedLinear, masked_layers
from ..ops.layer_groups import GroupedLayer, LayerGroup, draw_layers_, kind_of, update_layers_
from ..ops.mask_costs import Uses, draws_once
from ..pattern import NMPattern
from .offloaded_logits import OffloadedLogits, offloaded

PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class ReplayedLayer:
    """The parts of a MaskedLinear that an update needs: its logits, its layer id, and where a shard lies."""

    logits: Tensor
    pattern: NMPattern
    layer: int
    group_offset: int = 0
    group_row_stride: int | None = None


class ModelMasks:
    """The masks of all layers of a model: drawn by one launch, and updated by one.

    Layers that a kernel has to be compiled for apart take a launch each kind: those of other devices, patterns, dtypes
    of logits, and shards. On a CPU it is a call of machine code. Layers whose logits live on another device than their
    weight come one after the other. All bits are those of each layer by itself.

    Args:
        layers: a model with MaskedLinear layers, or these by name.

    Raises:
        ValueError: if the model has none.
    """

    def __init__(self, layers: nn.Module | Mapping[str, MaskedLinear | ReplayedLayer]):
        self.layers = masked_layers(layers) if isinstance(layers, nn.Module) else dict(layers)
        self._places: list[tuple] | None = None
        self._groups: list[tuple[list[str], LayerGroup]] = []
        self._alone: list[str] = []
        # Of which draw groups hold the codes, which of them do, and whether layers take them now
        self._drawn: object = None
        self._known: set[int] = set()
        self._inside = False

    @contextmanager
    def drawn(self, draw: object = None, uses: Uses | None = None) -> Iterator[None]:
        """With all layers drawn at their current step; each forward and backward inside takes these masks.

        The codes take a byte for each group, or 4 of more than 8 weights; their memory is kept for the next time.
        Neither step, nor draw, nor logits may change inside, but that the logits of a layer may once its last backward
        has come by, and those of all by ``score_update_``.

        Args:
            draw: by what a later ``score_update_`` knows these masks again.
            uses: of each mask inside. Where they cost less by draws of their own, see ``ops.mask_costs``, each of them
                draws the mask by itself. None: all masks are drawn here.
        """
        self._inside = True
        try:
            self._draw(uses)
            self._drawn = draw
            yield
        finally:
            self._release()

    def _release(self) -> None:
        if self._inside:
            self._inside = False
            for layer in self.layers.values():
                layer.held_codes = None

    @torch.no_grad()
    def _draw(self, uses: Uses | None) -> None:
        self._drawn, self._known = None, set()
        for i, (names, group) in enumerate(self._grouped()):
            if uses is not None and not draws_once(group.device, group.n, uses):
                continue
            counter = self.layers[names[0]].counter()
            draw_layers_(group, 1.0, counter.seed, counter.step, counter.draw)
            self._known.add(i)
            for name, codes in zip(names, group.codes, strict=True):
                self.layers[name].held_codes = codes
        # each use would copy the logits, which takes longer than all else
        alone = [self.layers[name] for name in self._alone]
        with OffloadedLogits(alone) as copies:
            for layer in alone:
                with copies.reading(layer) as logits:
                    layer.held_codes = layer.drawn_codes(logits)

    @torch.no_grad()
    def flip_rate(self, name: str) -> float:
        """Share of the groups of a layer whose draw leaves the top-N mask."""
        layer = self.layers[name]
        for i, (names, group) in enumerate(self._grouped()):
            if name not in names:
                continue
            at = names.index(name)
            if self._inside and i in self._known:
                return group.flip_rate(at)
            # the kernel that draws counts them
            alone, counter = LayerGroup([group.layers[at]], group.n, group.m), layer.counter()
            draw_layers_(alone, 1.0, counter.seed, counter.step, counter.draw)
            return alone.flip_rate(0)
        codes, kept = layer.drawn_codes(), top_n_mask(layer.logits_on_device(), layer.pattern)
        return int((codes != kept).sum()) / max(codes.numel(), 1)

    def score_update_(
        self,
        coef: float | Tensor | Sequence[float | Tensor],
        *,
        draw: Scalar | Sequence[Scalar] | None = None,
        seed: Scalar | None = None,
        step: Scalar | None = None,
        known: object = None,
    ) -> None:
        """The logits of all layers -= sum of coef * score, in place: ``score_update_`` of each.

        Args:
            coef: as for ``score_update_``. A 0-dim tensor on the device is read there, by a captured CUDA graph at each
                replay.
            draw: as for ``score_update_``; default: that which the layers make now.
            seed, step: of the draws; default: those at which the layers draw now.
            known: the ``draw`` of ``drawn`` whose masks these are, so that they need not be drawn again. Inside of
                ``drawn`` it is known of the current draw.

        Raises:
            TypeError, ValueError: ``coef`` or ``draw`` are not as above; the logits are then untouched.
        """
        given = draw, seed, step
        coefs, draws = coefs_and_draws(coef, 0 if draw is None else draw, 1.0)
        current = self._inside and all(x is None for x in given)
        by_codes = current or (known is not None and known == self._drawn)
        with torch.no_grad():
            for i, (names, group) in enumerate(self._grouped()):
                counter = self._counter(names[0], seed, step, draw)
                ids = [counter[2]] if draw is None else draws
                scalars = [on_device(x, torch.int64, group.device) for x in counter[:2]]
                factors, ids = stacked(coefs, torch.float32, group.device), stacked(ids, torch.int64, group.device)
                update_layers_(group, factors, 1.0, *scalars, ids, by_codes and i in self._known)
        with OffloadedLogits([self.layers[name] for name in self._alone]) as copies:
            for name in self._alone:
                self._update_alone(name, copies, coef, *self._counter(name, seed, step, draw))
        # of other logits from here on
        self._drawn = None
        self._release()

    def _counter(self, name: str, seed, step, draw) -> tuple:
        """(seed, step, draw), by the layer where they are not given."""
        if None not in (seed, step) and draw is not None:
            return seed, step, draw
        counter = self.layers[name].counter()
        own = counter.seed, counter.step, counter.draw
        return tuple(mine if given is None else given for given, mine in zip((seed, step, draw), own, strict=True))

    def _update_alone(self, name: str, copies: OffloadedLogits, coef, seed: Scalar, step: Scalar, draw) -> None:
        layer = self.layers[name]
        where = {"layer": layer.layer, "group_offset": layer.group_offset, "group_row_stride": layer.group_row_stride}
        how = {"pattern": layer.pattern, "draw": draw, "seed": seed, "step": step, **where}
        with copies.moving(layer) as logits:
            score_update_(logits, coef, **how)

    def _grouped(self) -> list[tuple[list[str], LayerGroup]]:
        """(Names of layers, these) of each kind; anew where tensors have come to lie elsewhere."""
        places = [_place_of(layer) for layer in self.layers.values()]
        if places == self._places:
            return self._groups
        # no codes are there of new groups
        self._drawn, self._known = None, set()
        kinds: dict[tuple, list[tuple[str, GroupedLayer]]] = {}
        self._alone = []
        for name, layer in self.layers.items():
            if not _can_be_grouped(layer):
                self._alone.append(name)
                continue
            stride = layer.group_row_stride or layer.logits.shape[1] // layer.pattern.m
            grouped = GroupedLayer(layer.logits, layer.layer, layer.group_offset, stride)
            kind = (*kind_of(grouped, layer.pattern.n, layer.pattern.m), id(getattr(layer, "counter_state", None)))
            kinds.setdefault(kind, []).append((name, grouped))
        self._groups = []
        for (_, _, n, m, *_), members in kinds.items():
            names, layers = zip(*members, strict=True)
            self._groups.append((list(names), LayerGroup(layers, n, m)))
        self._places = places
        return self._groups


def _place_of(layer: MaskedLinear | ReplayedLayer) -> tuple:
    """What a group's table is made from."""
    logits, weight = layer.logits, getattr(layer, "weight", None)
    where = layer.layer, layer.group_offset, layer.group_row_stride, id(getattr(layer, "counter_state", None))
    address = logits.data_ptr() if type(logits) in PLAIN else id(logits)
    return address, logits.shape, logits.stride(), logits.dtype, logits.device, getattr(weight, "device", None), where


def _can_be_grouped(layer: MaskedLinear | ReplayedLayer) -> bool:
    logits = layer.logits
    return type(logits) in PLAIN and not logits.is_meta and logits.is_contiguous() and not offloaded(layer)
