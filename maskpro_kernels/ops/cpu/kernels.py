"""The reference as machine code: its functions again, with its arguments, through compiled loops.

One loop serves all shapes. A loop takes tensors alone, so a counter is flattened where one is called. Draws whose
outcome no noise can change are determined first, without logarithms (``bounds``); the rest are drawn in full, in the
same pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...counter import Counter
from ...pattern import code_dtype, codes_of
from .. import bounds, reference
from .compiled_loop import compiled_loop
from .packed.kind import RUN, Packed
from .packed.unpacking import unpacker

# Most groups whose numbers, 8 bytes each, are made at a time
PIECE = 1 << 18

# Bytes of float32 that stand beside the logits at a time: copies of those of 16 bits, or terms of an update
COPIED_BYTES = 1 << 21


def _run(
    function: Callable,
    tensors: Sequence[Tensor],
    rest: Sequence[Tensor] = (),
    *,
    out: Tensor,
    first: Tensor | None = None,
    shard: Tensor | None = None,
    levels: Callable | None = None,
    full: Callable | None = None,
    **constants,
) -> list[Tensor]:
    """The results [groups, ...] of ``function`` on tensors [groups, ...], by a compiled loop; of no groups the first.

    Args:
        out: memory for the first result: of its own, or that of one of the tensors.
        first: the number of the first group, where the function takes those of consecutive groups.
        levels, full, shard: what draws the groups that the function leaves open, and where these lie, as
            ``CompiledLoop`` says.
    """
    if not tensors[0].shape[0]:
        return [out]
    like_groups = tuple([(x.dtype, *x.shape[1:]) for x in tensors])
    like_rest = tuple([(x.dtype, *x.shape) for x in rest])
    like_out, address, in_place = (out.dtype, *out.shape[1:]), out.data_ptr(), None
    for i, x in enumerate(tensors):
        if x.data_ptr() == address:
            in_place = i
    how = first is not None, like_out, in_place, levels, full
    made = compiled_loop(function, like_groups, like_rest, *how, **constants)
    return made([*tensors, *rest, *(x for x in (first, shard) if x is not None)], out)


def _pieces(count: int, size: int = PIECE) -> Iterator[slice]:
    """Consecutive groups, at most ``size`` of them at a time."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _copied(logits: Tensor) -> Iterator[slice]:
    """The pieces in which float32 values stand beside logits [groups, M]."""
    return _pieces(logits.shape[0], COPIED_BYTES // (4 * logits.shape[1]))


@functools.lru_cache(maxsize=1 << 12)
def integers(*values: int) -> Tensor:
    """int64, only read: kept, for a layer needs the same few at every step."""
    with torch.inference_mode(False):
        return torch.tensor(values, device="cpu")


class _Groups:
    """Groups [groups, M] of logits and the counter of their draw, from flat index ``start`` of a shard on.

    Attributes:
        logits: [groups, M].
        counter: of the draw.
        shard: (start, groups in a row, group_row_stride, group_offset), as ``CompiledLoop`` takes it.
    """

    def __init__(self, logits: Tensor, columns: int, counter: Counter, start: int = 0):
        self.logits, self.counter = logits, counter
        self.shard = start, columns, counter.group_row_stride, counter.group_offset

    def part(self, which: slice, logits: Tensor) -> _Groups:
        """Some of them, with other logits."""
        start, columns, *_ = self.shard
        return _Groups(logits, columns, self.counter, start + which.start)

    def by_draw(self, draw: Tensor) -> _Groups:
        """The same groups in another draw."""
        start, columns, *_ = self.shard
        return _Groups(self.logits, columns, self.counter._replace(draw=draw), start)

    def run(
        self, function: Callable, tensors: Sequence[Tensor], rest: Sequence[Tensor], out: Tensor, **constants
    ) -> None:
        """``_run`` on (tensors, numbers in the whole layer) of all groups and (key, rest), into ``out``."""
        start, columns, row_stride, offset = self.shard
        rest = (*self.counter.key, *rest)
        if row_stride == columns:
            (first,) = integers(offset + start)
            _run(function, tensors, rest, first=first, out=out, **constants)
            return
        for which in _pieces(len(out)):
            local = torch.arange(start + which.start, start + which.stop)
            number = local // columns * row_stride + local % columns + offset
            _run(function, [*(x[which] for x in tensors), number], rest, out=out[which], **constants)


def _draw_into(
    out: Tensor,
    by_bounds: Callable,
    full: Callable,
    groups: _Groups,
    rest: Sequence[Tensor],
    others: Sequence[Tensor] = (),
    **constants,
) -> None:
    """out [groups, ...] = ``full`` of (logits, others, numbers, key, rest), where ``by_bounds`` has not determined it.

    ``by_bounds`` takes (logits, others, spread levels, key, rest) and gives ``Expected.flags`` as well. ``out`` may be
    the logits themselves.
    """
    rest = (*groups.counter.key, *rest)
    how = {"shard": integers(*groups.shard), "levels": spread_levels, "full": full}
    _run(by_bounds, [groups.logits, *others], rest, out=out, **how, **constants)


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


def spread_levels(group, seed, step, layer, draw, *rest, m):
    # an update has them in a row
    return bounds.group_spread_levels(group, (seed, step, layer, draw if draw.dim() == 0 else draw[0]), m=m)


def determined_mask(logits, levels, seed, step, layer, draw, inv_temperature, *, n):
    kept, undetermined = bounds.group_expected_mask(logits, levels, inv_temperature, n)
    return reference.encode(kept, code_dtype(len(kept))), undetermined


def drawn_mask(logits, group, *key_and_temperature, n):
    *key, inv_temperature = key_and_temperature
    return reference.group_sample_mask(logits, group, key, inv_temperature, n=n)


def _determined_masked_weight(logits, words, levels, seed, step, layer, draw, inv_temperature, *, n):
    kept, undetermined = bounds.group_expected_mask(logits, levels, inv_temperature, n)
    return _mask_words(words, kept), undetermined


def _drawn_masked_weight(logits, words, group, *key_and_temperature, n):
    *key, inv_temperature = key_and_temperature
    return _mask_words(words, reference.group_drawn(logits, group, key, inv_temperature, n))


def _determined_update(logits, levels, seed, step, layer, draw, coef, inv_temperature, *, n):
    return bounds.group_expected_update(logits, levels, coef, inv_temperature, n=n)


def _drawn_update(logits, group, seed, step, layer, draw, coef, inv_temperature, *, n):
    return reference.group_updated_logits(logits, group, coef, (seed, step, layer, draw), inv_temperature, n=n)


def _determined_terms(logits, levels, seed, step, layer, draw, coef, inv_temperature, *, n):
    return bounds.group_expected_terms(logits, levels, coef, inv_temperature, n=n)


def _drawn_terms(logits, group, seed, step, layer, draw, coef, inv_temperature, *, n):
    return reference.group_score_terms(logits, group, coef, (seed, step, layer, draw), inv_temperature, n=n)


def _rounded(x, group, *key, dtype):
    return reference.group_round_logits(x, group, key, dtype=dtype)


def _top_n_mask(scores, *, n):
    return reference.group_top_n_mask(scores.float(), n=n)


def _top_n_masked_weight(scores, words, *, n):
    return _mask_words(words, reference.top_n(reference.columns(scores.float()), n))


def _code_masked_weight(codes, words, *, m):
    return _mask_words(words, reference.decode(codes, m))


def sample_mask(logits, counter, inv_temperature, *, n, m):
    """``reference.sample_mask``."""
    codes = torch.empty(logits.shape[0], logits.shape[1] // m, dtype=code_dtype(m))
    groups = _Groups(logits.view(-1, m), codes.shape[1], counter)
    _draw_into(codes.view(-1), determined_mask, drawn_mask, groups, (inv_temperature,), n=n)
    return codes


def sample_masked_weight(weight, logits, counter, inv_temperature, *, n, m):
    """``reference.sample_masked_weight``."""
    out = torch.empty_like(weight)
    groups = _Groups(logits.view(-1, m), logits.shape[1] // m, counter)
    words, masked = [_weight_words(weight, m)], _weight_words(out, m)
    _draw_into(masked, _determined_masked_weight, _drawn_masked_weight, groups, (inv_temperature,), words, n=n)
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
    """2:4 values of 16 bits, two in an int32 word [..., 2], at the places that a byte of the bitmask keeps.

    A weight [1536, 576] is unpacked in 0.04 ms, by ``group_unpacked`` in 0.17 ms (two cores of an AMD EPYC).
    """
    kept, out = reference.decode(byte, 8), []
    for group, word in enumerate(words.unbind(-1)):
        k = kept[4 * group : 4 * group + 4]
        low, high = word & 0xFFFF, word >> 16 & 0xFFFF
        out.append(torch.where(k[0], low, 0) | torch.where(k[1], torch.where(k[0], high, low) << 16, 0))
        out.append(torch.where(k[2], torch.where(k[3], low, high), 0) | torch.where(k[3], high << 16, 0))
    return torch.stack(out, dim=-1)


def unpack_nm(values, bitmask, *, n, m):
    """``reference.unpack_nm``."""
    unpacked = unpacker(Packed(n, m, values.dtype, values.dtype))
    if unpacked is not None:
        return unpacked(values, bitmask, 0, -(-(values.shape[1] // n * m) // RUN))
    out = torch.empty(values.shape[0], values.shape[1] // n * m, dtype=values.dtype)
    if (n, m, values.itemsize) == (2, 4, 2) and out.shape[1] % 8 == 0:
        if values.storage_offset() % 2:
            values = values.clone()
        words, places = (x.view(-1).view(torch.int32).view(-1, size) for x, size in ((values, 2), (out, 4)))
        _run(_unpacked_bytes, [words, bitmask.view(-1)], out=places)
        return out
    groups, flat = (x.view(reference.INTEGERS[x.itemsize]).view(-1, size) for x, size in ((values, n), (out, m)))
    # those of a single group in a row would lie apart
    codes = codes_of(bitmask, out.shape[1], m).contiguous().view(-1)
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


def score_update_(logits, coef, counter, inv_temperature, *, n, m):
    """``reference.score_update_``."""
    flat = logits.view(-1, m)
    whole = _Groups(flat, logits.shape[1] // m, counter)
    if logits.dtype == torch.float32:
        _update(whole, coef, inv_temperature, n)
        return
    for part in _copied(flat):
        groups = whole.part(part, flat[part].float())
        _update(groups, coef, inv_temperature, n)
        _round_into(flat[part], groups.by_draw(counter.draw[0]))


def _round_into(out: Tensor, groups: _Groups) -> None:
    """16-bit logits from those of float32."""
    groups.run(_rounded, [groups.logits], (), out, dtype=out.dtype)


def _update(groups: _Groups, coef: Tensor, inv_temperature: Tensor, n: int) -> None:
    """``reference.group_updated_logits``, in place; all numbers of draws above one by the same loops."""
    # the score as an exponential race needs the keys of all groups
    exact = n <= reference.EXACT_SCORE_MAX_N
    if coef.shape[0] == 1:
        rest = (coef, inv_temperature)
        if exact:
            _draw_into(groups.logits, _determined_update, _drawn_update, groups, rest, n=n)
        else:
            groups.run(_drawn_update, [groups.logits], rest, groups.logits, n=n)
        return
    for which in _copied(groups.logits):
        piece = groups.part(which, groups.logits[which])
        terms = torch.empty_like(piece.logits)
        delta = None
        for factor, draw in zip(coef, groups.counter.draw, strict=True):
            here, rest = piece.by_draw(draw), (factor, inv_temperature)
            if exact:
                _draw_into(terms, _determined_terms, _drawn_terms, here, rest, n=n)
            else:
                here.run(_drawn_terms, [here.logits], rest, terms, n=n)
            delta = terms.clone() if delta is None else delta.add_(terms)
        piece.logits.sub_(delta)


def straight_through_grad(weight, grad, square, codes, *, m):
    """``reference.straight_through_grad``."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    tensors = [*(x.view(-1, m) for x in (weight, grad, square)), codes.view(-1)]
    _run(reference.group_mask_slope, tensors, out=out.view(-1, m))
    return out


def straight_through_update_(logits, weight, grad, square, codes, rate, counter, max_update, *, m):
    """``reference.straight_through_update_``."""
    tensors = [*(x.view(-1, m) for x in (weight, grad, square)), codes.view(-1)]
    return _descend(reference.group_straight_through_logits, tensors, logits, rate, counter, max_update, m)


def descend_(logits, gradient, rate, counter, max_update, *, m):
    """``reference.descend_``."""
    return _descend(reference.group_descended_logits, [gradient.view(-1, m)], logits, rate, counter, max_update, m)


def _descend(function, tensors, logits, rate, counter, max_update, m):
    flat = logits.view(-1, m)
    whole = _Groups(flat, logits.shape[1] // m, counter)
    total = torch.zeros((), dtype=torch.float32)
    for part in _copied(flat):
        given, out = [*(x[part] for x in tensors), flat[part]], flat[part]
        if logits.dtype != torch.float32:
            out = torch.empty(out.shape, dtype=torch.float32)
        _, squares = _run(function, given, (rate, max_update), out=out)
        total += squares.sum()
        if logits.dtype != torch.float32:
            _round_into(flat[part], whole.part(part, out))
    return total / max(logits.numel(), 1)


def adamw_(weight, master, first, second, gradient, codes, scalars, *, m):
    """``reference.adamw_``."""
    groups = [x.view(-1, m) for x in (gradient, master, first, second)]
    codes, rounded = codes.view(-1), weight.view(-1, m)
    for part in _copied(groups[0]):
        given = [*(x[part] for x in groups), codes[part]]
        # the first result goes where the master is
        _, *rest = _run(reference.group_adamw, given, scalars.unbind(), out=given[1], dtype=weight.dtype)
        for held, new in zip((given[2], given[3], rounded[part]), rest, strict=True):
            held.copy_(new)
