"""``ModelMasks``: the masks of all layers of a model, drawn and updated together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..functional.checks import Scalar, check_scalar, coefs_and_draws, describe, on_device, readable_value, stacked
from ..functional.masks import mask_log_prob, score_update_, top_n_mask
from ..modules import MaskedLinear, masked_layers
from ..ops import sample_mask
from ..ops.counter import CachedMask, Place, version_of
from ..ops.layer_groups import GroupedLayer, LayerGroup, Uses, draw_layers_, draws_once, kind_of, update_layers_
from ..ops.pattern import NMPattern
from ..ops.philox import MAX_DRAWS, MAX_STEPS
from ..ops.reference.plackett_luce import EXACT_SCORE_MAX_N
from .offload import OffloadedLogits, offloaded

PLAIN = (Tensor, nn.Parameter)
# Rows of logits that ``least_margin`` takes at a time: for most runs the first rows suffice
ROWS = 1024
# Groups of a layer by which its flips are estimated, for patterns whose probabilities need quadrature
SAMPLED_GROUPS = 64


@dataclass(frozen=True)
class ReplayedLayer:
    """The parts of a MaskedLinear that an update needs: logits, layer id, and place of a shard."""

    logits: Tensor
    pattern: NMPattern
    layer: int
    group_offset: int = 0
    group_row_stride: int | None = None

    @property
    def own_logits(self) -> Tensor:
        return self.logits

    @property
    def place(self) -> Place:
        groups = self.logits.shape[1] // self.pattern.m
        return Place(self.group_offset, self.group_row_stride or groups)


class ModelMasks:
    """Masks of all layers of a model: one launch draws them, and one updates the logits.

    Each kind of layers needs a launch of its own: device, pattern, dtype of the logits, whole layer or shard. On a CPU
    a launch is a call of machine code. Layers with logits on another device than their weight, or with logits that are
    not contiguous, are processed one after the other. The bits are those that each layer computes by itself.

    Args:
        layers: a model with MaskedLinear layers, or a mapping of layers by name.

    Raises:
        TypeError, ValueError: if ``layers`` are not masked layers, or one has two names.
    """

    def __init__(self, layers: nn.Module | Mapping[str, MaskedLinear | ReplayedLayer]):
        self.layers = _checked(masked_layers(layers) if isinstance(layers, nn.Module) else layers)
        self._places: list[tuple] | None = None
        self._groups: list[tuple[list[str], LayerGroup]] = []
        self._alone: list[str] = []
        self._inside = False
        # for groups with codes, by index: seed, step, draw and versions of the logits; None if only the device has a
        # value
        self._last: dict[int, list[int | None]] = {}

    @contextmanager
    def drawn(self, draw: int | None = None, uses: Uses | None = None) -> Iterator[None]:
        """Draw the masks of all layers at their current step; each forward and backward inside this context uses them.

        Codes take a byte for each group, 4 bytes for M = 16; the next context reuses their memory. Inside, step, draw
        and logits must not change, with two exceptions: a layer's logits may move after its last backward, and
        ``score_update_`` may move all; after that each layer draws by itself. A mask used after any other change raises
        RuntimeError.

        Args:
            draw: id of the draw to make. None: the current one.
            uses: the uses of each mask inside, see ``ops.layer_groups``; if drawing again costs less, each use draws by
                itself. None: draw all together.

        Raises:
            TypeError, ValueError: if ``draw`` is not an id.
            RuntimeError: inside of another such context of these layers.
        """
        layers = list(self.layers.values())
        if draw is not None:
            check_scalar("draw", draw, 0, MAX_DRAWS)
        if self._inside or any(layer.cached_mask is not None for layer in layers):
            raise RuntimeError("masks: expected layers outside of any `drawn`, got some inside of one")
        states = {id(layer.counter_state): layer.counter_state for layer in layers}.values()
        before = [state.draw.clone() for state in states] if draw is not None else []
        self._inside = True
        try:
            if draw is not None:
                for state in states:
                    state.draw.fill_(draw)
            self._draw(uses)
            yield
        finally:
            self._inside = False
            self._free_codes()
            for state, draw_before in zip(states, before, strict=bool(before)):
                state.draw.copy_(draw_before)

    def _free_codes(self) -> None:
        for layer in self.layers.values():
            if isinstance(layer, MaskedLinear):
                layer.cached_mask = None

    @torch.no_grad()
    def _draw(self, uses: Uses | None) -> None:
        self._last = {}
        drawn = {}
        for i, (names, group) in enumerate(self._grouped()):
            counter = self.layers[names[0]].counter()
            # ranks exchange the kept values of a draw, so no use draws again
            gathered = self.layers[names[0]].shard is not None
            if uses is not None and not gathered and not draws_once(group.device, group.n, uses):
                continue
            draw_layers_(group, 1.0, counter.seed, counter.step, counter.draw)
            drawn[i] = _key_of(group, counter.seed, counter.step, counter.draw)
            for name, codes in zip(names, group.codes, strict=True):
                self._cache(name, codes)
        # drawn here: otherwise each use would copy the logits, or make them contiguous
        alone = [self.layers[name] for name in self._alone]
        with OffloadedLogits(alone) as copies:
            for name, layer in zip(self._alone, alone, strict=True):
                with copies.reading(layer) as logits:
                    n = layer.pattern.n
                    m = layer.pattern.m
                    self._cache(name, sample_mask(logits.contiguous(), n, m, 1.0, layer.counter()))
        self._last = drawn

    def _cache(self, name: str, codes: Tensor) -> None:
        layer = self.layers[name]
        layer.cached_mask = CachedMask(codes, layer.own_logits, layer.counter_state)

    @torch.no_grad()
    def flip_rate(self, name: str) -> float:
        """Share of a layer's groups whose draw differs from the top-N mask; ValueError if no layer has that name.

        For a layer that is cut over ranks it is the share of the whole layer, and all its ranks must call this.
        """
        if name not in self.layers:
            raise ValueError(f"name: expected that of a layer, got {describe(name)}")
        layer = self.layers[name]
        flips = self._flips(name, layer)
        groups = layer.own_logits.numel() // layer.pattern.m
        if layer.shard is not None:
            flips, groups = layer.shard.summed(torch.tensor([flips, groups], device=layer.own_logits.device)).tolist()
        return flips / max(groups, 1)

    @torch.no_grad()
    def expected_flips(self) -> float:
        """Mean number of groups whose draw differs from the top-N mask, by the probabilities of the top-N masks.

        For layers that are cut over ranks it counts the rows of all ranks, which must all call this.
        """
        flips = 0.0
        for layer in self.layers.values():
            pattern = layer.pattern
            groups = layer.own_logits.reshape(-1, pattern.m)
            count = len(groups)
            if pattern.m > 8 or pattern.n > EXACT_SCORE_MAX_N:
                # quadrature takes seconds for a million weights, and most gaps are equal
                groups = groups[:: max(count // SAMPLED_GROUPS, 1)]
            log_prob = mask_log_prob(groups, top_n_mask(groups, pattern), pattern)
            of_layer = -torch.expm1(log_prob.double()).sum() * (count / max(len(groups), 1))
            flips += float(of_layer if layer.shard is None else layer.shard.summed(of_layer))
        return flips

    def _flips(self, name: str, layer: MaskedLinear) -> int:
        for i, (names, group) in enumerate(self._grouped()):
            if name not in names:
                continue
            index = names.index(name)
            if self._inside and layer.cached_mask is not None and i in self._last:
                return group.flips_of(index)
            # the kernel that draws counts them
            alone = LayerGroup([group.layers[index]], group.n, group.m)
            counter = layer.counter()
            draw_layers_(alone, 1.0, counter.seed, counter.step, counter.draw)
            return alone.flips_of(0)
        codes = layer.drawn_codes()
        kept = top_n_mask(layer.logits_on_device(), layer.pattern)
        return int((codes != kept).sum())

    def score_update_(self, coef: float | Tensor | Sequence[float | Tensor], *,
                      draw: Scalar | Sequence[Scalar] | None = None, seed: Scalar | None = None,
                      step: Scalar | None = None) -> None:  # fmt: skip
        """Update the logits of all layers in place, as ``score_update_`` does: logits -= sum of coef * score.

        Masks of the last ``drawn`` are not drawn again if the logits have not changed since.

        Args:
            coef: as for ``score_update_``. A 0-dim tensor on the device is read there, so a captured CUDA graph reads
                its value at each replay.
            draw: as for ``score_update_``; default: the current draw of the layers.
            seed, step: of the draws; default: the current ones of the layers.

        Raises:
            TypeError, ValueError: an argument is not as above. The logits are then unchanged.
        """
        coefs, draws = coefs_and_draws(coef, 0 if draw is None else draw, 1.0)
        for name, value, low, high in (("seed", seed, -(1 << 63), 1 << 63), ("step", step, 0, MAX_STEPS)):
            if value is not None:
                check_scalar(name, value, low, high)
        with torch.no_grad():
            updates = [
                self._update_of(i, coefs, None if draw is None else draws, seed, step)
                for i in range(len(self._grouped()))
            ]
            # if an update is interrupted, no codes of other logits remain
            self._last = {}
            self._free_codes()
            for update in updates:
                update_layers_(*update)
            with OffloadedLogits([self.layers[name] for name in self._alone]) as copies:
                for name in self._alone:
                    layer = self.layers[name]
                    key = self._counter(name, seed, step, draw)
                    where = dict(zip(("seed", "step", "draw"), key, strict=True), layer=layer.layer)
                    with copies.moving(layer) as logits:
                        score_update_(logits, coef, pattern=layer.pattern, **where, **layer.place._asdict())

    def _update_of(self, i: int, coefs: list, draws: list | None, seed: Scalar | None, step: Scalar | None) -> tuple:
        names, group = self._groups[i]
        key = self._counter(names[0], seed, step, draws)
        ids = [key[2]] if draws is None else draws
        if self._inside and seed is step is draws is None:
            # raises if the codes are not of this draw
            by_codes = all(self.layers[name].cached_codes is not None for name in names)
        else:
            now = _key_of(group, *key[:2], ids[0])
            by_codes = len(ids) == 1 and None not in now and self._last.get(i) == now
        scalars = [on_device(x, torch.int64, group.device) for x in key[:2]]
        factors = stacked(coefs, torch.float32, group.device)
        ids = stacked(ids, torch.int64, group.device)
        return group, factors, 1.0, *scalars, ids, by_codes

    def _counter(self, name: str, *values) -> tuple:
        """(seed, step, draw) as given, or else those of the layer."""
        if all(value is not None for value in values):
            return values
        counter = self.layers[name].counter()
        defaults = counter.seed, counter.step, counter.draw
        return tuple(default if value is None else value for value, default in zip(values, defaults, strict=True))

    def _grouped(self) -> list[tuple[list[str], LayerGroup]]:
        """(Names of layers, LayerGroup) of each kind; made again if tensors have moved in memory."""
        places = [_place_of(layer) for layer in self.layers.values()]
        if places == self._places:
            return self._groups
        # new groups have no codes yet
        self._last = {}
        kinds: dict[tuple, list[tuple[str, GroupedLayer]]] = {}
        self._alone = []
        for name, layer in self.layers.items():
            logits = layer.own_logits
            if type(logits) not in PLAIN or logits.is_meta or not logits.is_contiguous() or offloaded(layer):
                self._alone.append(name)
                continue
            grouped = GroupedLayer(logits, layer.layer, *layer.place)
            of_model = id(getattr(layer, "counter_state", None)), getattr(layer, "shard", None) is not None
            kind = (*kind_of(grouped, layer.pattern.n, layer.pattern.m), *of_model)
            kinds.setdefault(kind, []).append((name, grouped))
        self._groups = []
        for (_, _, n, m, *_), members in kinds.items():
            names, layers = zip(*members, strict=True)
            self._groups.append((list(names), LayerGroup(layers, n, m)))
        self._places = places
        return self._groups


def _place_of(layer: MaskedLinear | ReplayedLayer) -> tuple:
    logits = layer.own_logits
    device = getattr(getattr(layer, "weight", None), "device", None)
    where = layer.layer, *layer.place, id(getattr(layer, "counter_state", None))
    address = logits.data_ptr() if type(logits) in PLAIN else 0
    return id(logits), address, logits.shape, logits.stride(), logits.dtype, logits.device, device, *where


def _key_of(group: LayerGroup, *counter: Scalar) -> list[int | None]:
    return [*map(readable_value, counter), *(version_of(layer.logits) for layer in group.layers)]


def _checked(layers: Mapping[str, MaskedLinear | ReplayedLayer]) -> dict[str, MaskedLinear | ReplayedLayer]:
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers: expected a model, or MaskedLinear layers by name, got {describe(layers)}")
    if not layers:
        raise ValueError("layers: expected at least one MaskedLinear, got none")
    names: dict[int, str] = {}
    spans = []
    for name, layer in layers.items():
        if not isinstance(layer, MaskedLinear | ReplayedLayer):
            raise TypeError(f"layers: expected MaskedLinear layers, got {type(layer).__name__} for {name!r}")
        first = names.setdefault(id(layer.logits), name)
        logits = layer.own_logits
        if first != name:
            raise ValueError(f"layers: expected logits with one name each, got the same for {first!r} and {name!r}")
        if type(logits) in PLAIN and logits.is_contiguous() and logits.nbytes and not logits.is_meta:
            spans.append((str(logits.device), logits.data_ptr(), logits.nbytes, name))
    # one launch updates all of them at once
    for (device, start, nbytes, first), (other, next_start, _, name) in pairwise(sorted(spans)):
        if device == other and next_start < start + nbytes:
            raise ValueError(f"layers: expected logits that share no memory, got the same for {first!r} and {name!r}")
    return dict(layers)


def margins(logits: Tensor, pattern: NMPattern) -> Tensor:
    """Lowest kept less highest dropped logit of each group: float32 [groups] of finite logits [rows, columns]."""
    ordered = logits.detach().float().reshape(-1, pattern.m).topk(pattern.n + 1, dim=1).values
    return ordered[:, pattern.n - 1] - ordered[:, pattern.n]


def least_margin(layers: Mapping[str, MaskedLinear], enough: float = -math.inf) -> float:
    """Smallest of the ``margins`` of this rank's logits; stops early at one of at most ``enough``."""
    least = math.inf
    for layer in layers.values():
        for logits in layer.own_logits.detach().split(ROWS):
            least = min(least, float(margins(logits, layer.pattern).min()) if len(logits) else math.inf)
            if least <= enough:
                return least
    return least
