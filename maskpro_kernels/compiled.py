"""The reference as native code: its functions again, with its arguments, through compiled graphs.

One graph serves all shapes and all dtypes of logits: tensors are taken in pieces, 16-bit logits are
widened a piece at a time. Draws whose outcome no noise can change are found first, without logarithms
(``certain``); the rest are gathered and drawn in full. What finds them, a byte
a group, is kept until another step needs the room: the update then makes no noise but for the rest.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from . import certain, reference
from .graphs import Places, graph
from .pattern import code_dtype, codes_of

# Most groups in one call of a graph
PIECE = 1 << 18

# Bytes of results that such a call leaves of full draws. They stand beside the masked weight, an update's in its place
DRAW_BYTES = 1 << 20
UPDATE_BYTES = 1 << 21

# Bytes of noise levels that are kept: those of 268 million weights at 2:4; and what keeping any takes besides
KEPT_BYTES = 1 << 26
ENTRY_BYTES = 1 << 10

# Above, the full draw does alone: a level is that of the largest noise of all M, which settles the fewer the more
CERTAIN_MAX_M = 8


def _run(
    function: Callable,
    group_tensors: Sequence[Tensor],
    rest: Sequence[Tensor] = (),
    first: Tensor | None = None,
    target: Tensor | None = None,
    **constants,
) -> list[Tensor]:
    """The results [groups, ...] of ``function`` on tensors [groups, ...] of at least one group, as a graph.

    Args:
        first: the number of the first group, where the function takes those of consecutive groups.
        target: columns [groups, count] that the function writes: memory of their own, or the first tensor.
    """
    tensors = list(group_tensors)
    like_groups = tuple([(x.dtype, *x.shape[1:]) for x in tensors])
    like_rest = tuple([(x.dtype, *x.shape) for x in rest])
    places = None
    if target is not None:
        places = Places(target.dtype, target.shape[1], target.data_ptr() == tensors[0].data_ptr())
        tensors.append(target)
    tensors += rest
    if first is not None:
        tensors.append(first)
    return graph(function, like_groups, like_rest, first is not None, places, **constants)(tensors)


def _pieces(which: slice, size: int) -> Iterator[slice]:
    """Consecutive groups, at most ``size`` of them at a time."""
    for start in range(which.start, which.stop, size):
        yield slice(start, min(start + size, which.stop))


def _slices(out: Tensor, limit: int = DRAW_BYTES, which: slice | None = None) -> Iterator[slice]:
    """The pieces in which results [groups, ...], or some of them, are made."""
    size = min(limit // (out.element_size() * math.prod(out.shape[1:])), PIECE)
    return _pieces(which or slice(0, out.shape[0]), size)


def _part(x: Tensor, which: slice) -> Tensor:
    """``x[which]``, at no cost where that is all of it."""
    return x if which.stop - which.start == x.shape[0] else x[which]


class _Groups:
    """Groups [groups, M] of logits that start at flat index ``start`` of a shard with ``columns`` groups a row."""

    def __init__(self, logits: Tensor, columns: int, offset: Tensor, row_stride: Tensor, start: int = 0):
        self.logits, self.columns, self.offset, self.row_stride, self.start = logits, columns, offset, row_stride, start
        self.consecutive = int(row_stride) == columns
        # the number of the first, where they are consecutive
        self.first = offset + start if start else offset

    def part(self, which: slice) -> _Groups:
        """Those groups alone."""
        return _Groups(self.logits[which], self.columns, self.offset, self.row_stride, self.start + which.start)

    def run(
        self,
        function: Callable,
        which: slice,
        counter: Sequence[Tensor],
        others: Sequence[Tensor] = (),
        target: Tensor | None = None,
        **constants,
    ) -> list[Tensor]:
        """``_run`` on (others, numbers in the whole layer) of some groups, and on those of ``target``."""
        tensors = [_part(x, which) for x in others]
        if target is not None:
            target = _part(target, which)
        if self.consecutive:
            first = self.first + which.start if which.start else self.first
            return _run(function, tensors, counter, first, target, **constants)
        tensors.append(self._numbers(torch.arange(which.start, which.stop)))
        return _run(function, tensors, counter, None, target, **constants)

    def run_numbered(
        self,
        function: Callable,
        which: slice | Tensor,
        counter: Sequence[Tensor],
        others: Sequence[Tensor] = (),
        **constants,
    ) -> list[Tensor]:
        """``_run`` on (logits in float32, others, numbers) of consecutive groups or of some indices, by one graph."""
        if isinstance(which, Tensor):
            tensors, local = [x.index_select(0, which) for x in (self.logits, *others)], which
        else:
            tensors, local = [x[which] for x in (self.logits, *others)], torch.arange(which.start, which.stop)
        tensors[0] = tensors[0].float()
        return _run(function, [*tensors, self._numbers(local)], counter, **constants)

    def _numbers(self, which: Tensor) -> Tensor:
        if self.consecutive:
            return which + self.first
        local = self.start + which
        return local // self.columns * self.row_stride + local % self.columns + self.offset


class _KeptLevels:
    """Noise levels of the draws of a step, kept for what draws them again: the update, a backward, the next batch.

    What came first in a step stays, for others ask in the same order; levels of other steps give way where there is no
    room.
    """

    def __init__(self):
        # by what else than the seed and the step decides them: (seed and step, levels)
        self.levels: dict[tuple, tuple[tuple, Tensor]] = {}
        self.bytes = 0
        self.changing = threading.Lock()

    def find(self, where: tuple, when: tuple) -> Tensor | None:
        kept_of, levels = self.levels.get(where, (None, None))
        return levels if kept_of == when else None

    def add(self, where: tuple, when: tuple, levels: Tensor) -> None:
        size = levels.nbytes + ENTRY_BYTES
        with self.changing:
            self._remove(where)
            if size > KEPT_BYTES:
                return
            if self.bytes + size > KEPT_BYTES:
                for other in [other for other, (kept_of, _) in self.levels.items() if kept_of != when]:
                    self._remove(other)
            if self.bytes + size <= KEPT_BYTES:
                self.levels[where] = when, levels
                self.bytes += size

    def _remove(self, where: tuple) -> None:
        if where in self.levels:
            self.bytes -= self.levels.pop(where)[1].nbytes + ENTRY_BYTES


_kept_levels = _KeptLevels()


def _kept_by(groups: _Groups, seed: Tensor, step: Tensor, layer: Tensor, draw: Tensor) -> tuple[tuple, tuple]:
    """(where, when) of the noise of these groups, for ``_KeptLevels``."""
    count, m = groups.logits.shape
    shard = (int(groups.offset), int(groups.row_stride), groups.columns, groups.start)
    return (count, m, *shard, int(layer), int(draw)), (int(seed), int(step))


def _made_levels(groups: _Groups, where: tuple, when: tuple) -> Tensor:
    """``certain.group_noise_levels``, uint8 [groups], of the step that they are kept by."""
    # not by the tensors of the caller, which another thread may advance in the meantime
    counter = [torch.tensor(value, device="cpu") for value in (*when, *where[-2:])]
    count, m = groups.logits.shape
    levels = torch.empty(count, dtype=torch.uint8)
    column = levels.view(-1, 1)
    for which in _pieces(slice(0, count), PIECE):
        groups.run(_noise_levels_, which, counter, [column], column, m=m)
    return levels


def _noise_levels(groups: _Groups, seed: Tensor, step: Tensor, layer: Tensor, draw: Tensor) -> Tensor | None:
    """Levels of all groups, kept from now on; None where the full draw has to do alone."""
    if groups.logits.shape[-1] > CERTAIN_MAX_M:
        return None
    where, when = _kept_by(groups, seed, step, layer, draw)
    levels = _kept_levels.find(where, when)
    if levels is None:
        levels = _made_levels(groups, where, when)
        _kept_levels.add(where, when, levels)
    return levels


def _draw_into(
    out: Tensor,
    settle: Callable,
    full: Callable,
    groups: _Groups,
    levels: Tensor | None,
    known: Sequence[Tensor],
    counter: Sequence[Tensor],
    others: Sequence[Tensor] = (),
    limit: int = DRAW_BYTES,
    **constants,
) -> None:
    """out [groups, ...] = ``full`` of (logits, others, numbers, counter), where ``settle`` has not decided it.

    ``settle`` takes (logits, levels, others, known), writes into the words of ``out``, and gives the ``certain.flags``
    of what it left open; it is left out where there are no levels. ``out`` may be the logits themselves: what is open
    stays as it was.
    """

    def draw_all(which: slice) -> None:
        for part in _slices(out, limit, which):
            (out[part],) = groups.run_numbered(full, part, counter, others, **constants)

    if levels is None:
        draw_all(slice(0, len(out)))
        return

    def draw_open(which: np.ndarray) -> None:
        for start in range(0, len(which), PIECE):
            part = torch.from_numpy(which[start : start + PIECE])
            (result,) = groups.run_numbered(full, part, counter, others, **constants)
            out.index_copy_(0, part, result)

    target = out if out.dim() == 2 else out.unsqueeze(-1)
    open_groups = []
    # all that it leaves are flags
    for which in _pieces(slice(0, out.shape[0]), PIECE):
        tensors = [_part(x, which) for x in (groups.logits, levels, *others)]
        tensors[0] = tensors[0].float()
        (undecided,) = _run(settle, tensors, known, target=_part(target, which), **constants)
        again = _ones(undecided.numpy())
        if which.start:
            again += which.start
        if 16 * len(again) <= undecided.shape[0]:
            # those of all pieces make one call; more of them would not do, for their indices take 8 bytes each
            open_groups.append(again)
        elif 2 * len(again) <= undecided.shape[0] or out is groups.logits:
            draw_open(again)
        else:
            draw_all(which)
    if open_groups:
        draw_open(np.concatenate(open_groups) if len(open_groups) > 1 else open_groups[0])


def _ones(flags: np.ndarray) -> np.ndarray:
    """The indices of the ones among zeros: of eight at a time first, for they are few."""
    whole = len(flags) - len(flags) % 8
    (words,) = (flags[:whole].view(np.int64) != 0).nonzero()
    word, byte = flags[:whole].reshape(-1, 8)[words].view(np.bool_).nonzero()
    (rest,) = flags[whole:].view(np.bool_).nonzero()
    return np.concatenate([words[word] * 8 + byte, rest + whole])


def _write(places: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
    """Fill the places of groups with columns."""
    for place, column in zip(places, columns, strict=True):
        place.copy_(column)


def _weight_words(weight: Tensor, m: int) -> Tensor:
    """A matrix [rows, K] as integers [groups, words] of up to 8 bytes: masks apply to whole words."""
    size = min(m * weight.element_size(), 8)
    if weight.storage_offset() * weight.element_size() % size:
        weight = weight.clone()
    # rows of a single one may lie at any stride
    words = weight.view(-1).view(torch.int64 if size == 8 else torch.int32)
    return words.view(-1, m * weight.element_size() // size)


def _mask_words(words, kept):
    """The columns of groups as ``_weight_words`` packs them, zeros where weights are not kept."""
    columns = reference.columns(words)
    fields = len(kept) // len(columns)
    bits = 8 * words.element_size() // fields
    masked = []
    for i, word in enumerate(columns):
        mask = None
        for field, k in enumerate(kept[i * fields : (i + 1) * fields]):
            # the last field holds the sign
            ones = -1 << bits * field if field == fields - 1 else (1 << bits) - 1 << bits * field
            here = torch.where(k, ones, 0).to(word.dtype)
            mask = here if mask is None else mask | here
        masked.append(word & mask)
    return masked


def _noise_levels_(_, group, *counter, places, m):
    _write(places, [certain.group_noise_levels(group, *counter, m=m)])


def _certain_mask_(logits, levels, inv_temperature, *, places, n):
    kept, undecided = certain.group_expected_mask(logits, levels, inv_temperature, n)
    _write(places, [reference.encode(kept, places[0].dtype)])
    return undecided


def _certain_masked_weight_(logits, levels, words, inv_temperature, *, places, n):
    kept, undecided = certain.group_expected_mask(logits, levels, inv_temperature, n)
    _write(places, _mask_words(words, kept))
    return undecided


def _certain_update_(logits, levels, coef, inv_temperature, *, places, n):
    new, undecided = certain.group_expected_update(logits, levels, coef, inv_temperature, n=n)
    _write(places, new)
    return undecided


def _certain_terms_(logits, levels, coef, inv_temperature, *, places, n):
    terms, undecided = certain.group_expected_terms(logits, levels, coef, inv_temperature, n=n)
    _write(places, terms)
    return undecided


def _drawn_masked_weight(logits, words, group, *counter, n):
    return torch.stack(_mask_words(words, reference.group_drawn(logits, group, *counter, n)), dim=-1)


def _top_n_masked_weight_(scores, words, *, places, n):
    _write(places, _mask_words(words, reference.top_n(reference.columns(scores), n)))


def _code_masked_weight_(codes, words, *, places, m):
    _write(places, _mask_words(words, reference.decode(codes, m)))


def sample_mask(logits, seed, step, inv_temperature, layer, draw, group_offset, group_row_stride, *, n, m):
    """``reference.sample_mask``."""
    codes = torch.empty(logits.shape[0], logits.shape[1] // m, dtype=code_dtype(m))
    groups = _Groups(logits.view(-1, m), codes.shape[1], group_offset, group_row_stride)
    levels = _noise_levels(groups, seed, step, layer, draw)
    counter = (seed, step, inv_temperature, layer, draw)
    full = reference.group_sample_mask
    _draw_into(codes.view(-1), _certain_mask_, full, groups, levels, (inv_temperature,), counter, n=n)
    return codes


def sample_masked_weight(
    weight, logits, seed, step, inv_temperature, layer, draw, group_offset, group_row_stride, *, n, m
):
    """``reference.sample_masked_weight``."""
    out = torch.empty_like(weight)
    groups = _Groups(logits.view(-1, m), logits.shape[1] // m, group_offset, group_row_stride)
    levels = _noise_levels(groups, seed, step, layer, draw)
    counter = (seed, step, inv_temperature, layer, draw)
    words, masked = [_weight_words(weight, m)], _weight_words(out, m)
    settle, full = _certain_masked_weight_, _drawn_masked_weight
    _draw_into(masked, settle, full, groups, levels, (inv_temperature,), counter, words, n=n)
    return out


def top_n_mask(scores, *, n, m):
    """``reference.top_n_mask``."""
    codes = torch.empty(scores.shape[0], scores.shape[1] // m, dtype=code_dtype(m))
    groups, flat = scores.view(-1, m), codes.view(-1)
    for which in _slices(flat):
        (flat[which],) = _run(reference.group_top_n_mask, [groups[which].float()], (), n=n)
    return codes


def top_n_masked_weight(weight, scores, *, n, m):
    """``reference.top_n_masked_weight``."""
    out = torch.empty_like(weight)
    words, masked, groups = _weight_words(weight, m), _weight_words(out, m), scores.view(-1, m)
    for which in _slices(masked):
        tensors = [groups[which].float(), words[which]]
        _run(_top_n_masked_weight_, tensors, target=masked[which], n=n)
    return out


def code_masked_weight(weight, codes, *, n, m):
    """``reference.code_masked_weight``."""
    out = torch.empty_like(weight)
    words, masked, flat = _weight_words(weight, m), _weight_words(out, m), codes.view(-1)
    for which in _slices(masked):
        _run(_code_masked_weight_, [flat[which], words[which]], target=masked[which], m=m)
    return out


def _unpacked_bytes(words, byte):
    """2:4 values of 16 bits, two in an int32 word [..., 2], at the places that a byte of the bitmask keeps."""
    kept, out = reference.decode(byte, 8), []
    for group, word in enumerate(words.unbind(-1)):
        k = kept[4 * group : 4 * group + 4]
        low, high = word & 0xFFFF, word >> 16 & 0xFFFF
        out.append(torch.where(k[0], low, 0) | torch.where(k[1], torch.where(k[0], high, low) << 16, 0))
        out.append(torch.where(k[2], torch.where(k[3], low, high), 0) | torch.where(k[3], high << 16, 0))
    return torch.stack(out, dim=-1)


def unpack_nm(values, bitmask, *, n, m):
    """``reference.unpack_nm``."""
    out = torch.empty(values.shape[0], values.shape[1] // n * m, dtype=values.dtype)
    if (n, m, values.itemsize) == (2, 4, 2) and out.shape[1] % 8 == 0:
        if values.storage_offset() % 2:
            values = values.clone()
        words, places = (x.view(-1).view(torch.int32).view(-1, size) for x, size in ((values, 2), (out, 4)))
        for which in _slices(places):
            (places[which],) = _run(_unpacked_bytes, [words[which], bitmask.view(-1)[which]])
        return out
    groups, flat = (x.view(reference.INTEGERS[x.itemsize]).view(-1, size) for x, size in ((values, n), (out, m)))
    codes = codes_of(bitmask, out.shape[1], m).reshape(-1)
    for which in _slices(flat):
        (flat[which],) = _run(reference.group_unpacked, [groups[which], codes[which]], m=m)
    return out


def mask_log_prob(logits, codes, inv_temperature, *, n, m):
    """``reference.mask_log_prob``."""
    out = torch.empty(codes.shape, dtype=torch.float32)
    groups, flat = logits.view(-1, m), codes.view(-1)
    for which in _slices(out.view(-1)):
        tensors = [groups[which].float(), flat[which]]
        (out.view(-1)[which],) = _run(reference.group_mask_log_prob, tensors, (inv_temperature,), n=n)
    return out


def mask_score(logits, codes, grad, inv_temperature, *, n, m):
    """``reference.mask_score``."""
    out = torch.empty(logits.shape, dtype=torch.float32)
    groups = logits.view(-1, m)
    for which in _slices(groups):
        tensors = [groups[which].float(), codes.view(-1)[which], grad.view(-1)[which]]
        (out.view(-1, m)[which],) = _run(reference.group_mask_score, tensors, (inv_temperature,), n=n)
    return out


def score_update_(logits, coef, seed, step, draws, inv_temperature, layer, group_offset, group_row_stride, *, n, m):
    """``reference.score_update_``."""
    flat = logits.view(-1, m)
    whole = _Groups(flat, logits.shape[1] // m, group_offset, group_row_stride)
    levels = [None] * len(draws)
    # the estimate of the score by arrival times needs the keys of all groups
    exact = n <= reference.EXACT_SCORE_MAX_N and m <= CERTAIN_MAX_M
    if exact and len(draws) == 1:
        levels = [_noise_levels(whole, seed, step, layer, draws[0])]
    elif exact:
        # levels that no draw has kept are made a piece at a time
        levels = [_kept_levels.find(*_kept_by(whole, seed, step, layer, draw)) for draw in draws]
    in_place = logits.dtype == torch.float32
    for part in [slice(0, flat.shape[0])] if in_place else _slices(flat, UPDATE_BYTES):
        groups = whole.part(part)
        groups.logits = groups.logits.float()
        here = [None if x is None else _part(x, part) for x in levels]
        _update(groups, exact, here, (seed, step), coef, draws, (inv_temperature, layer), n)
        if not in_place:
            all_of_them, counter = slice(0, len(groups.logits)), (seed, step, draws[:1], layer)
            (flat[part],) = groups.run(
                reference.group_round_logits, all_of_them, counter, [groups.logits], dtype=logits.dtype
            )


def _update(groups: _Groups, exact: bool, levels, seed_and_step, coef, draws, rest, n: int) -> None:
    """``reference.group_updated_logits``, in place; all numbers of draws above one by the same graphs."""
    inv_temperature, layer = rest
    if coef.shape[0] == 1:
        counter, known = (*seed_and_step, coef, draws, *rest), (coef, inv_temperature)
        full = reference.group_updated_logits
        _draw_into(groups.logits, _certain_update_, full, groups, levels[0], known, counter, limit=UPDATE_BYTES, n=n)
        return
    for which in _slices(groups.logits, DRAW_BYTES):
        piece = groups.part(which)
        terms = torch.empty_like(piece.logits)
        delta = None
        for k in range(len(coef)):
            counter, known = (*seed_and_step, coef[k], draws[k], *rest), (coef[k], inv_temperature)
            here = None if levels[k] is None else _part(levels[k], which)
            if exact and here is None:
                here = _made_levels(piece, *_kept_by(piece, *seed_and_step, layer, draws[k]))
            _draw_into(terms, _certain_terms_, reference.group_score_terms, piece, here, known, counter, n=n)
            delta = terms.clone() if delta is None else delta.add_(terms)
        piece.logits.sub_(delta)


def straight_through_grad(weight, grad, square, codes, *, m):
    """``reference.straight_through_grad``."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    flat, tensors = out.view(-1, m), [*(x.view(-1, m) for x in (weight, grad, square)), codes.view(-1)]
    for which in _slices(flat, UPDATE_BYTES):
        (flat[which],) = _run(reference.group_mask_slope, [x[which] for x in tensors])
    return out


def straight_through_update_(logits, weight, grad, square, codes, rate, seed, step, largest, *shard, m):
    """``reference.straight_through_update_``."""
    tensors = [*(x.view(-1, m) for x in (weight, grad, square)), codes.view(-1)]
    return _descend(reference.group_straight_through_logits, tensors, logits, rate, seed, step, largest, *shard, m)


def descend_(logits, gradient, rate, seed, step, largest, *shard, m):
    """``reference.descend_``."""
    tensors = [gradient.view(-1, m)]
    return _descend(reference.group_descended_logits, tensors, logits, rate, seed, step, largest, *shard, m)


def _descend(function, tensors, logits, rate, seed, step, largest, layer, group_offset, group_row_stride, m):
    flat = logits.view(-1, m)
    total = torch.zeros((), dtype=torch.float32)
    for part in _slices(flat, UPDATE_BYTES):
        new, squares = _run(function, [*(x[part] for x in tensors), flat[part].float()], (rate, largest))
        total += squares.sum()
        if logits.dtype != torch.float32:
            groups = _Groups(new, logits.shape[1] // m, group_offset, group_row_stride, part.start)
            counter = (seed, step, torch.zeros(1, dtype=torch.int64), layer)
            whole = slice(0, len(new))
            (new,) = groups.run(reference.group_round_logits, whole, counter, [new], dtype=logits.dtype)
        flat[part] = new
    return total / max(logits.numel(), 1)
