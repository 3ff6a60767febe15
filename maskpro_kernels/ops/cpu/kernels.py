"""The reference as native code: its functions again, with its arguments, through compiled loops.

One loop serves all shapes. Draws whose outcome no noise can change are determined first, without logarithms
(``bounds``); the rest are drawn in full, in the same pass. What determines them, a byte a group, is kept until another
step needs the room: the update then makes no noise but for the rest.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...pattern import code_dtype, codes_of
from .. import bounds, reference
from .compiled_loop import compiled_loop

# Most groups whose numbers, 8 bytes each, are made at a time
PIECE = 1 << 18

# Bytes of float32 that stand beside the logits at a time: copies of those of 16 bits, or terms of an update
COPIED_BYTES = 1 << 21

# Bytes of noise levels that are kept: those of 268 million weights at 2:4; and what keeping any takes besides
KEPT_BYTES = 1 << 26
ENTRY_BYTES = 1 << 10


def _run(
    function: Callable,
    tensors: Sequence[Tensor],
    rest: Sequence[Tensor] = (),
    *,
    out: Tensor,
    first: Tensor | None = None,
    shard: Tensor | None = None,
    full: Callable | None = None,
    **constants,
) -> list[Tensor]:
    """The results [groups, ...] of ``function`` on tensors [groups, ...], by a compiled loop; of no groups the first.

    Args:
        out: memory for the first result: of its own, or that of one of the tensors.
        first: the number of the first group, where the function takes those of consecutive groups.
        full, shard: what draws the groups that the function leaves open, and where these lie, as ``CompiledLoop`` says.
    """
    if not tensors[0].shape[0]:
        return [out]
    like_groups = tuple([(x.dtype, *x.shape[1:]) for x in tensors])
    like_rest = tuple([(x.dtype, *x.shape) for x in rest])
    like_out, address, in_place = (out.dtype, *out.shape[1:]), out.data_ptr(), None
    for i, x in enumerate(tensors):
        if x.data_ptr() == address:
            in_place = i
    made = compiled_loop(function, like_groups, like_rest, first is not None, like_out, in_place, full, **constants)
    return made([*tensors, *rest, *(x for x in (first, shard) if x is not None)], out)


def _pieces(count: int, size: int = PIECE) -> Iterator[slice]:
    """Consecutive groups, at most ``size`` of them at a time."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _copied(logits: Tensor) -> Iterator[slice]:
    """The pieces in which float32 values stand beside logits [groups, M]."""
    return _pieces(logits.shape[0], COPIED_BYTES // (4 * logits.shape[1]))


@functools.lru_cache(maxsize=1 << 12)
def _integers(*values: int) -> Tensor:
    """int64, only read: kept, for a layer needs the same few at every step."""
    with torch.inference_mode(False):
        return torch.tensor(values, device="cpu")


class _Groups:
    """Groups [groups, M] of logits that start at flat index ``start`` of a shard with ``columns`` groups a row."""

    def __init__(self, logits: Tensor, columns: int, offset: Tensor | int, row_stride: Tensor | int, start: int = 0):
        self.logits = logits
        # as ``CompiledLoop`` takes it
        self.shard = start, columns, int(row_stride), int(offset)

    def part(self, which: slice, logits: Tensor) -> _Groups:
        """Some of them, with other logits."""
        start, columns, row_stride, offset = self.shard
        return _Groups(logits, columns, offset, row_stride, start + which.start)

    def run(
        self, function: Callable, tensors: Sequence[Tensor], counter: Sequence[Tensor], out: Tensor, **constants
    ) -> None:
        """``_run`` on (tensors, numbers in the whole layer) of all groups, into ``out``."""
        start, columns, row_stride, offset = self.shard
        if row_stride == columns:
            (first,) = _integers(offset + start)
            _run(function, tensors, counter, first=first, out=out, **constants)
            return
        for which in _pieces(len(out)):
            local = torch.arange(start + which.start, start + which.stop)
            number = local // columns * row_stride + local % columns + offset
            _run(function, [*(x[which] for x in tensors), number], counter, out=out[which], **constants)


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
    return (count, m, *groups.shard, int(layer), int(draw)), (int(seed), int(step))


def _made_levels(groups: _Groups, where: tuple, when: tuple) -> Tensor:
    """``bounds.group_noise_levels``, uint8 [groups], of the step that they are kept by."""
    # not by the tensors of the caller, which another thread may advance in the meantime
    counter = torch.tensor([*when, *where[-2:]], device="cpu").unbind()
    levels = torch.empty(groups.logits.shape[0], dtype=torch.uint8)
    groups.run(_group_noise_levels, [groups.logits], counter, levels)
    return levels


def _noise_levels(groups: _Groups, seed: Tensor, step: Tensor, layer: Tensor, draw: Tensor) -> Tensor:
    """Levels of all groups, kept from now on."""
    where, when = _kept_by(groups, seed, step, layer, draw)
    levels = _kept_levels.find(where, when)
    if levels is None:
        levels = _made_levels(groups, where, when)
        _kept_levels.add(where, when, levels)
    return levels


def _draw_into(
    out: Tensor,
    by_bounds: Callable,
    full: Callable,
    groups: _Groups,
    levels: Tensor | None,
    counter: Sequence[Tensor],
    others: Sequence[Tensor] = (),
    **constants,
) -> None:
    """out [groups, ...] = ``full`` of (logits, others, numbers, counter), where ``by_bounds`` has not decided it.

    ``by_bounds`` takes (logits, others, levels, counter) and gives the ``bounds.Expected.flags`` as well; it is left
    out where there are no levels. ``out`` may be the logits themselves.
    """
    tensors = [groups.logits, *others]
    if levels is None:
        groups.run(full, tensors, counter, out, **constants)
    else:
        _run(by_bounds, [*tensors, levels], counter, shard=_integers(*groups.shard), out=out, full=full, **constants)


def _weight_words(weight: Tensor, m: int) -> Tensor:
    """A matrix [rows, K] as int32 [groups, words], of one weight or two: masks apply to whole words."""
    if weight.storage_offset() * weight.element_size() % 4:
        weight = weight.clone()
    # rows of a single one may lie at any stride
    return weight.view(-1).view(torch.int32).view(-1, m * weight.element_size() // 4)


def _mask_words(words, kept):
    """Groups as ``_weight_words`` packs them, zeros where weights are not kept."""
    columns = reference.columns(words)
    masked = []
    if len(columns) == len(kept):
        masked = [torch.where(k, word, 0) for word, k in zip(columns, kept, strict=True)]
    else:
        for word, low, high in zip(columns, kept[::2], kept[1::2], strict=True):
            masked.append(word & (torch.where(low, 0xFFFF, 0) | torch.where(high, -0x10000, 0)).to(torch.int32))
    return reference.uncolumns(masked)


def _group_noise_levels(logits, group, *counter):
    return bounds.group_noise_levels(group, *counter, m=logits.shape[-1])


def _determined_mask(logits, levels, seed, step, inv_temperature, layer, draw, *, n):
    kept, undecided = bounds.group_expected_mask(logits, levels, inv_temperature, n)
    return reference.encode(kept, code_dtype(len(kept))), undecided


def _determined_masked_weight(logits, words, levels, seed, step, inv_temperature, layer, draw, *, n):
    kept, undecided = bounds.group_expected_mask(logits, levels, inv_temperature, n)
    return _mask_words(words, kept), undecided


def _determined_update(logits, levels, seed, step, coef, draws, inv_temperature, layer, *, n):
    return bounds.group_expected_update(logits, levels, coef, inv_temperature, n=n)


def _determined_terms(logits, levels, seed, step, coef, draw, inv_temperature, layer, *, n):
    return bounds.group_expected_terms(logits, levels, coef, inv_temperature, n=n)


def _drawn_masked_weight(logits, words, group, *counter, n):
    return _mask_words(words, reference.group_drawn(logits, group, *counter, n))


def _top_n_mask(scores, *, n):
    return reference.group_top_n_mask(scores.float(), n=n)


def _top_n_masked_weight(scores, words, *, n):
    return _mask_words(words, reference.top_n(reference.columns(scores.float()), n))


def _code_masked_weight(codes, words, *, m):
    return _mask_words(words, reference.decode(codes, m))


def sample_mask(logits, seed, step, inv_temperature, layer, draw, group_offset, group_row_stride, *, n, m):
    """``reference.sample_mask``."""
    codes = torch.empty(logits.shape[0], logits.shape[1] // m, dtype=code_dtype(m))
    groups = _Groups(logits.view(-1, m), codes.shape[1], group_offset, group_row_stride)
    levels = _noise_levels(groups, seed, step, layer, draw)
    counter = (seed, step, inv_temperature, layer, draw)
    _draw_into(codes.view(-1), _determined_mask, reference.group_sample_mask, groups, levels, counter, n=n)
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
    _draw_into(masked, _determined_masked_weight, _drawn_masked_weight, groups, levels, counter, words, n=n)
    return out


def top_n_mask(scores, *, n, m):
    """``reference.top_n_mask``."""
    codes = torch.empty(scores.shape[0], scores.shape[1] // m, dtype=code_dtype(m))
    _run(_top_n_mask, [scores.view(-1, m)], out=codes.view(-1), n=n)
    return codes


def top_n_masked_weight(weight, scores, *, n, m):
    """``reference.top_n_masked_weight``."""
    out = torch.empty_like(weight)
    _run(_top_n_masked_weight, [scores.view(-1, m), _weight_words(weight, m)], out=_weight_words(out, m), n=n)
    return out


def code_masked_weight(weight, codes, *, n, m):
    """``reference.code_masked_weight``."""
    out = torch.empty_like(weight)
    _run(_code_masked_weight, [codes.view(-1), _weight_words(weight, m)], out=_weight_words(out, m), m=m)
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
        _run(_unpacked_bytes, [words, bitmask.view(-1)], out=places)
        return out
    groups, flat = (x.view(reference.INTEGERS[x.itemsize]).view(-1, size) for x, size in ((values, n), (out, m)))
    codes = codes_of(bitmask, out.shape[1], m).reshape(-1)
    _run(reference.group_unpacked, [groups, codes], out=flat, m=m)
    return out


def mask_log_prob(logits, codes, inv_temperature, *, n, m):
    """``reference.mask_log_prob``."""
    out = torch.empty(codes.shape, dtype=torch.float32)
    tensors = [logits.view(-1, m), codes.view(-1)]
    _run(reference.group_mask_log_prob, tensors, (inv_temperature,), out=out.view(-1), n=n)
    return out


def mask_score(logits, codes, grad, inv_temperature, *, n, m):
    """``reference.mask_score``."""
    out = torch.empty(logits.shape, dtype=torch.float32)
    tensors = [logits.view(-1, m), codes.view(-1), grad.view(-1)]
    _run(reference.group_mask_score, tensors, (inv_temperature,), out=out.view(-1, m), n=n)
    return out


def score_update_(logits, coef, seed, step, draws, inv_temperature, layer, group_offset, group_row_stride, *, n, m):
    """``reference.score_update_``."""
    flat = logits.view(-1, m)
    whole = _Groups(flat, logits.shape[1] // m, group_offset, group_row_stride)
    levels = [None] * len(draws)
    # the estimate of the score by arrival times needs the keys of all groups
    exact = n <= reference.EXACT_SCORE_MAX_N
    if exact and len(draws) == 1:
        levels = [_noise_levels(whole, seed, step, layer, draws[0])]
    elif exact:
        # levels that no draw has kept are made a piece at a time
        levels = [_kept_levels.find(*_kept_by(whole, seed, step, layer, draw)) for draw in draws]
    if logits.dtype == torch.float32:
        _update(whole, exact, levels, (seed, step), coef, draws, (inv_temperature, layer), n)
        return
    for part in _copied(flat):
        groups, here = whole.part(part, flat[part].float()), [None if x is None else x[part] for x in levels]
        _update(groups, exact, here, (seed, step), coef, draws, (inv_temperature, layer), n)
        _round_into(flat[part], groups, (seed, step, draws[:1], layer))


def _round_into(out: Tensor, groups: _Groups, counter: Sequence[Tensor]) -> None:
    """16-bit logits from those of float32."""
    groups.run(reference.group_round_logits, [groups.logits], counter, out, dtype=out.dtype)


def _update(groups: _Groups, exact: bool, levels, seed_and_step, coef, draws, rest, n: int) -> None:
    """``reference.group_updated_logits``, in place; all numbers of draws above one by the same loops."""
    if coef.shape[0] == 1:
        counter = (*seed_and_step, coef, draws, *rest)
        full = reference.group_updated_logits
        _draw_into(groups.logits, _determined_update, full, groups, levels[0], counter, n=n)
        return
    for which in _copied(groups.logits):
        piece = groups.part(which, groups.logits[which])
        terms = torch.empty_like(piece.logits)
        delta = None
        for k in range(len(coef)):
            here = None if levels[k] is None else levels[k][which]
            if exact and here is None:
                here = _made_levels(piece, *_kept_by(piece, *seed_and_step, rest[1], draws[k]))
            counter = (*seed_and_step, coef[k], draws[k], *rest)
            _draw_into(terms, _determined_terms, reference.group_score_terms, piece, here, counter, n=n)
            delta = terms.clone() if delta is None else delta.add_(terms)
        piece.logits.sub_(delta)


def straight_through_grad(weight, grad, square, codes, *, m):
    """``reference.straight_through_grad``."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    tensors = [*(x.view(-1, m) for x in (weight, grad, square)), codes.view(-1)]
    _run(reference.group_mask_slope, tensors, out=out.view(-1, m))
    return out


def straight_through_update_(logits, weight, grad, square, codes, rate, seed, step, max_update, *shard, m):
    """``reference.straight_through_update_``."""
    tensors = [*(x.view(-1, m) for x in (weight, grad, square)), codes.view(-1)]
    return _descend(reference.group_straight_through_logits, tensors, logits, rate, seed, step, max_update, *shard, m)


def descend_(logits, gradient, rate, seed, step, max_update, *shard, m):
    """``reference.descend_``."""
    tensors = [gradient.view(-1, m)]
    return _descend(reference.group_descended_logits, tensors, logits, rate, seed, step, max_update, *shard, m)


def _descend(function, tensors, logits, rate, seed, step, max_update, layer, group_offset, group_row_stride, m):
    flat = logits.view(-1, m)
    whole = _Groups(flat, logits.shape[1] // m, group_offset, group_row_stride)
    total = torch.zeros((), dtype=torch.float32)
    for part in _copied(flat):
        given, out = [*(x[part] for x in tensors), flat[part]], flat[part]
        if logits.dtype != torch.float32:
            out = torch.empty(out.shape, dtype=torch.float32)
        _, squares = _run(function, given, (rate, max_update), out=out)
        total += squares.sum()
        if logits.dtype != torch.float32:
            counter = (seed, step, torch.zeros(1, dtype=torch.int64), layer)
            _round_into(flat[part], whole.part(part, out), counter)
    return total / max(logits.numel(), 1)
