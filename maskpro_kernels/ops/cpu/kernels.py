"""The reference as machine code: functions with the reference's names and arguments that run compiled loops.

One loop serves all shapes. A loop takes only tensors, so calls flatten the counter. A pass first finds the groups that
noise cannot change, without logarithms (``bounds``), and draws the others in full.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import bounds, reference
from ..counter import Counter
from ..pattern import code_dtype
from ..reference import layers as one_by_one
from ..reference.arithmetic import scalar
from .loops import MIN_SHARED_GROUPS, compiled_loop, run

# Most groups whose indices, 8 bytes each, are made at a time
INDEXED_GROUPS = 1 << 18

# Bytes of temporary float32 values: copies of 16-bit logits, terms of an update, outer products, or blocks for swaps
COPIED_BYTES = 1 << 21


def _slices(count: int, size: int = INDEXED_GROUPS) -> Iterator[slice]:
    """Slices of at most ``size`` consecutive groups or rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _copied_slices(logits: Tensor) -> Iterator[slice]:
    """Slices of logits [groups, M] for temporary float32 values."""
    return _slices(logits.shape[0], COPIED_BYTES // (4 * logits.shape[1]))


@functools.lru_cache(maxsize=1 << 12)
def integers(*values: int) -> Tensor:
    """int64 tensor, cached and only read: a layer needs the same few at each step."""
    with torch.inference_mode(False):
        return torch.tensor(values, device="cpu")


class _Groups:
    """Groups [groups, M] of logits from flat index ``start`` of a shard, and the counter of their draw."""

    def __init__(self, logits: Tensor, columns: int, counter: Counter, start: int = 0):
        self.logits = logits
        self.counter = counter
        # the order of ``CompiledLoop``
        self.shard = start, columns, counter.group_row_stride, counter.group_offset

    def part(self, start: int, logits: Tensor) -> _Groups:
        """The groups from ``start`` on, with other logits."""
        return _Groups(logits, self.shard[1], self.counter, self.shard[0] + start)

    def by_draw(self, draw: Tensor) -> _Groups:
        """The groups with another draw id."""
        return _Groups(self.logits, self.shard[1], self.counter._replace(draw=draw), self.shard[0])

    def run(self, function: Callable, tensors: Sequence[Tensor], rest: Sequence[Tensor], out: Tensor, **constants):
        """Call ``run`` on (tensors, indices in the whole layer) of all groups and (key, rest), into ``out``."""
        start, columns, row_stride, offset = self.shard
        rest = (*self.counter.key, *rest)
        if row_stride == columns:
            (first,) = integers(offset + start)
            run(function, tensors, rest, first=first, out=out, **constants)
            return
        for part in _slices(len(out)):
            local = torch.arange(start + part.start, start + part.stop)
            number = local // columns * row_stride + local % columns + offset
            run(function, [*(x[part] for x in tensors), number], rest, out=out[part], **constants)


def _draw_into(out: Tensor, by_bounds: Callable, full: Callable, groups: _Groups, rest: Sequence[Tensor],
               operands: Sequence[Tensor] = (), **constants) -> None:  # fmt: skip
    """Write ``by_bounds`` by levels to out, where undetermined ``full`` of (logits, operands, indices, key, rest)."""
    rest = (*groups.counter.key, *rest)
    shard = integers(*groups.shard)
    run(by_bounds, [groups.logits, *operands], rest, out=out, shard=shard, levels=spread_levels, full=full, **constants)


def _weight_int32(weight: Tensor, m: int) -> Tensor:
    """View a matrix [rows, K] as int32 [groups, integers] for masks; an integer has the bits of one or two weights."""
    if weight.storage_offset() * weight.element_size() % 4:
        weight = weight.clone()
    # a single row may have any stride
    return weight.view(-1).view(torch.int32).view(-1, m * weight.element_size() // 4)


def _mask_int32(integers, kept):
    """Mask groups of ``_weight_int32``, zeros for dropped weights."""
    columns = reference.columns(integers)
    if len(columns) == len(kept):
        return reference.uncolumns([torch.where(k, column, 0) for column, k in zip(columns, kept, strict=True)])
    pairs = zip(columns, kept[::2], kept[1::2], strict=True)
    return reference.uncolumns([
        column & (torch.where(low, 0xFFFF, 0) | torch.where(high, -0x10000, 0)).to(torch.int32)
        for column, low, high in pairs
    ])  # fmt: skip


def spread_levels(group, seed, step, layer, draw, *rest, m):
    # an update has a 1-dim tensor of draws
    return bounds.group_spread_levels(group, (seed, step, layer, draw if draw.dim() == 0 else draw[0]), m=m)


def determined_mask(logits, levels, seed, step, layer, draw, inv_temperature, *, n):
    kept, undetermined = bounds.group_expected_mask(logits, levels, inv_temperature, n)
    return reference.encode(kept, code_dtype(len(kept))), undetermined


def drawn_mask(logits, group, *key, n):
    return reference.group_sample_mask(logits, group, key[:4], key[4], n=n)


def _determined_masked_weight(logits, weight_bits, levels, seed, step, layer, draw, inv_temperature, *, n):
    kept, undetermined = bounds.group_expected_mask(logits, levels, inv_temperature, n)
    return _mask_int32(weight_bits, kept), undetermined


def _drawn_masked_weight(logits, weight_bits, group, *key, n):
    return _mask_int32(weight_bits, reference.group_drawn(logits, group, key[:4], key[4], n))


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


def _code_masked_weight(codes, weight_bits, *, m):
    return _mask_int32(weight_bits, reference.decode(codes, m))


def sample_mask(logits, n, m, inv_temperature, counter):
    """``reference.sample_mask``."""
    codes = torch.empty(logits.shape[0], logits.shape[1] // m, dtype=code_dtype(m))
    groups = _Groups(logits.view(-1, m), codes.shape[1], counter)
    _draw_into(codes.view(-1), determined_mask, drawn_mask, groups, (scalar(inv_temperature, logits),), n=n)
    return codes


def masked_weight(weight, mask):
    """``reference.masked_weight``."""
    mask = mask.by_codes
    out = torch.empty_like(weight)
    weight_bits = _weight_int32(weight, mask.m)
    masked_bits = _weight_int32(out, mask.m)
    if mask.kind == "codes":
        run(_code_masked_weight, [mask.tensor.view(-1), weight_bits], out=masked_bits, m=mask.m)
        return out
    groups = _Groups(mask.tensor.view(-1, mask.m), weight.shape[1] // mask.m, mask.counter)
    rest = (scalar(mask.inv_temperature, weight),)
    operands = [weight_bits]
    _draw_into(masked_bits, _determined_masked_weight, _drawn_masked_weight, groups, rest, operands, n=mask.n)
    return out


def top_n_mask(scores, n, m):
    """``reference.top_n_mask``."""
    codes = torch.empty(scores.shape[0], scores.shape[1] // m, dtype=code_dtype(m))
    run(_top_n_mask, [scores.view(-1, m)], out=codes.view(-1), n=n)
    return codes


def mask_log_prob(logits, codes, n, m, inv_temperature):
    """``reference.mask_log_prob``."""
    if n > reference.EXACT_SCORE_MAX_N:
        # unrolled nodes of the quadrature would take minutes to compile
        return reference.mask_log_prob(logits, codes, n, m, inv_temperature)
    out = torch.empty(codes.shape, dtype=torch.float32)
    tensors = [logits.view(-1, m), codes.view(-1)]
    run(reference.group_mask_log_prob, tensors, (scalar(inv_temperature, logits),), out=out.view(-1), n=n)
    return out


def mask_score(logits, codes, grad, n, m, inv_temperature):
    """``reference.mask_score``."""
    if n > reference.EXACT_SCORE_MAX_N:
        return reference.mask_score(logits, codes, grad, n, m, inv_temperature)
    out = torch.empty(logits.shape, dtype=torch.float32)
    tensors = [logits.view(-1, m), codes.view(-1), grad.view(-1)]
    run(reference.group_mask_score, tensors, (scalar(inv_temperature, logits),), out=out.view(-1, m), n=n)
    return out


def score_update_(logits, coef, n, m, inv_temperature, counter):
    """``reference.score_update_``."""
    inverse = scalar(inv_temperature, logits)
    flat = logits.view(-1, m)
    whole = _Groups(flat, logits.shape[1] // m, counter)
    if logits.dtype == torch.float32:
        _update(whole, coef, inverse, n)
        return
    for part in _copied_slices(flat):
        groups = whole.part(part.start, flat[part].float())
        _update(groups, coef, inverse, n)
        _round_into(flat[part], groups.by_draw(counter.draw[0]))


def _round_into(out: Tensor, groups: _Groups) -> None:
    groups.run(_rounded, [groups.logits], (), out, dtype=out.dtype)


def _update(groups: _Groups, coef: Tensor, inv_temperature: Tensor, n: int) -> None:
    """``reference.group_updated_logits`` in place; the same loops serve any number of draws above one."""
    # the score as an exponential race needs the keys of all groups
    exact = n <= reference.EXACT_SCORE_MAX_N
    if coef.shape[0] == 1:
        rest = (coef, inv_temperature)
        if exact:
            _draw_into(groups.logits, _determined_update, _drawn_update, groups, rest, n=n)
        else:
            groups.run(_drawn_update, [groups.logits], rest, groups.logits, n=n)
        return
    for part in _copied_slices(groups.logits):
        part_groups = groups.part(part.start, groups.logits[part])
        terms = torch.empty_like(part_groups.logits)
        delta = None
        for factor, draw in zip(coef, groups.counter.draw, strict=True):
            drawn_groups = part_groups.by_draw(draw)
            rest = (factor, inv_temperature)
            if exact:
                _draw_into(terms, _determined_terms, _drawn_terms, drawn_groups, rest, n=n)
            else:
                drawn_groups.run(_drawn_terms, [drawn_groups.logits], rest, terms, n=n)
            delta = terms.clone() if delta is None else delta.add_(terms)
        part_groups.logits.sub_(delta)


def mask_slope(weight, first, second, codes, m):
    """``reference.mask_slope``."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    tensors = [*(x.view(-1, m) for x in (weight, first, second)), codes.view(-1)]
    run(reference.group_mask_slope, tensors, out=out.view(-1, m))
    return out


def descend_by_slope_(logits, weight, first, factors, codes, rate, max_update, m, counter):
    """``reference.descend_by_slope_``."""
    row_factors, column_factors = factors

    def tensors(rows: slice) -> list[Tensor]:
        # in slices: the whole outer product would go through memory twice
        square = torch.outer(row_factors[rows], column_factors)
        return [*(x.view(-1, m) for x in (weight[rows], first[rows], square)), codes[rows].view(-1)]

    return _descend(reference.group_straight_through_logits, tensors, logits, rate, max_update, m, counter)


def descend_(logits, gradient, rate, max_update, m, counter):
    """``reference.descend_``."""

    def tensors(rows: slice) -> list[Tensor]:
        return [gradient[rows].view(-1, m)]

    return _descend(reference.group_descended_logits, tensors, logits, rate, max_update, m, counter)


def _descend(function, tensors, logits, rate, max_update, m, counter):
    """``function`` of ``tensors(rows)`` and logits, for slices of rows; returns the mean of its squares."""
    columns = logits.shape[1] // m
    whole = _Groups(logits.view(-1, m), columns, counter)
    total = torch.zeros((), dtype=torch.float32)
    largest_update = scalar(max_update, logits)
    for rows in _slices(len(logits), max(COPIED_BYTES // (4 * logits.shape[1]), 1)):
        row_logits = logits[rows].view(-1, m)
        out = row_logits
        if logits.dtype != torch.float32:
            out = torch.empty(out.shape, dtype=torch.float32)
        _, squares = run(function, [*tensors(rows), row_logits], (rate, largest_update), out=out)
        total += squares.sum()
        if logits.dtype != torch.float32:
            _round_into(row_logits, whole.part(rows.start * columns, out))
    return total / max(logits.numel(), 1)


def adamw_(weight, master, first, second, gradient, codes, scalars, m):
    """``reference.adamw_``."""
    groups = [x.view(-1, m) for x in (gradient, master, first, second)]
    codes = codes.view(-1)
    rounded = weight.view(-1, m)
    for part in _copied_slices(groups[0]):
        tensors = [*(x[part] for x in groups), codes[part]]
        _, part_master, part_first, part_second, _ = tensors
        # the first result overwrites the master
        results = run(reference.group_adamw, tensors, scalars.unbind(), out=part_master, dtype=weight.dtype)
        for target, result in zip((part_first, part_second, rounded[part]), results[1:], strict=True):
            target.copy_(result)


def best_swaps(weight, product, codes, blocks, n, m):
    """``reference.best_swaps``."""
    codes = codes.contiguous()
    change = torch.empty(codes.shape, dtype=torch.float32)
    swap = torch.empty(codes.shape, dtype=codes.dtype)
    if not codes.numel():
        return change, swap
    columns = codes.shape[1]
    # a loop takes the block of each group: copies for some rows serve all slices, as many as stay in cache, but
    # enough for all threads
    slice_rows = min(max(COPIED_BYTES // (4 * m * m), MIN_SHARED_GROUPS) // columns + 1, len(codes))
    group_blocks = blocks.reshape(m * m, columns).T.repeat(slice_rows, 1)
    for rows in _slices(len(codes), slice_rows):
        # always copies, contiguous for one row, too
        w, r = (torch.stack(x[rows].unbind(1), -1).view(-1, m) for x in (weight, product))
        tensors = [w, r, codes[rows].view(-1), group_blocks[: len(w)]]
        _, row_swaps = run(reference.group_best_swaps, tensors, out=change[rows].view(-1))
        swap[rows] = row_swaps.view(-1, columns)
    return change, swap


# Many layers by one call of machine code: loops are compiled for one layer, and a table has the layers' addresses


# Arguments of a loop for one layer: tensors of groups, the rest, the last tensor, and memory for results
LayerArguments = tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor]


def _run_over_layers(
    function: Callable, layers: Sequence[LayerArguments], *draw_functions, in_place: bool = False, **constants
) -> bool:
    """Run the loop of a function over layers; without machine code return False, with nothing changed.

    ``draw_functions`` are ``levels`` and ``full`` of ``CompiledLoop``; without them the groups are numbered. With
    ``in_place`` the results overwrite the first tensor of groups.
    """
    groups, rest, last, out = max(layers, key=lambda arguments: len(arguments[3]))
    group_specs = tuple([(x.dtype, *x.shape[1:]) for x in groups])
    rest_specs = tuple([(x.dtype, *x.shape) for x in rest])
    out_spec = (out.dtype, *out.shape[1:])
    numbered = not draw_functions
    index = 0 if in_place else None
    loop = compiled_loop(function, group_specs, rest_specs, numbered, out_spec, index, *draw_functions, **constants)
    run = loop.over_layers([*groups, *rest, last])
    if run is None:
        return False
    rows = []
    first = 0
    for groups, rest, last, out in layers:
        rows.append([first, *(x.data_ptr() for x in (*groups, *rest, last, *([] if in_place else [out])))])
        first += len(out)
    rows.append([first, *[0] * (len(rows[0]) - 1)])
    run(torch.tensor(rows, device="cpu"))
    return True


def _key(group, i: int, seed: Tensor, step: Tensor, draw: Tensor) -> tuple[Tensor, ...]:
    """Key of the draws of the group's i-th layer."""
    return seed, step, integers(group.layers[i].layer).view(()), draw


def draw_layers_(group, inv_temperature: float, seed: Tensor, step: Tensor, draw: Tensor) -> None:
    """``layer_groups.draw_layers_`` by one call."""
    inverse = scalar(inv_temperature, seed)
    layers = []
    for i, (logits, _, offset, row_stride) in enumerate(group.layers):
        rest = *_key(group, i, seed, step, draw.view(())), inverse
        shard = integers(0, logits.shape[1] // group.m, row_stride, offset)
        layers.append(([logits.view(-1, group.m)], rest, shard, group.codes[i].view(-1)))
    if not _run_over_layers(determined_mask, layers, spread_levels, drawn_mask, n=group.n):
        one_by_one.draw_layers_(group, inv_temperature, seed, step, draw, sample_mask)


def _no_level(number, *rest, m):
    """Levels for updates by codes, which need none."""
    return (number & 0).to(torch.uint8)


def _expected_update(logits, codes, level, coef, inv_temperature, *, n):
    """Faster ``reference.group_updated_logits`` for groups whose codes keep the N largest; others are flagged."""
    xs = [x.to(torch.float32) for x in reference.columns(logits)]
    expected = bounds.Expected(xs, level, inv_temperature, n)
    # a tie at the N-th largest would keep more than N
    distinct = expected.descending[n] < expected.descending[n - 1]
    is_expected = expected.ordered & distinct & (reference.encode(expected.kept, codes.dtype) == codes)
    scale = coef[0] * inv_temperature
    new = [torch.where(is_expected, x - s * scale, x) for x, s in zip(xs, expected.score(), strict=True)]
    return reference.uncolumns(new), torch.where(is_expected, 0, 1).to(torch.uint8)


def _drawn_code_update(logits, codes, number, coef, inv_temperature, *, n):
    return _code_update(logits, codes, coef, inv_temperature, n=n)


def _code_update(logits, codes, coef, inv_temperature, *, n):
    """``reference.group_updated_logits`` by the draw of the codes, N <= EXACT_SCORE_MAX_N."""
    xs = [x.to(torch.float32) for x in reference.columns(logits)]
    score = reference.exact_score(reference.scaled(xs, inv_temperature), reference.decode(codes, len(xs)), n)
    scale = coef[0] * inv_temperature
    return reference.uncolumns([x - s * scale for x, s in zip(xs, score, strict=True)])


def _rounded_code_update(logits, codes, number, seed, step, layer, draw, coef, inv_temperature, *, n, dtype):
    """``_code_update`` for logits of 16 bits."""
    new = _code_update(logits, codes, coef, inv_temperature, n=n)
    return reference.group_round_logits(new, number, (seed, step, layer, draw[0]), dtype=dtype)


def update_layers_(
    group, coef: Tensor, inv_temperature: float, seed: Tensor, step: Tensor, draws: Tensor, by_codes: bool
) -> None:
    """``layer_groups.update_layers_`` by one call, where the codes of one draw determine the score."""
    # random numbers for rounding to 16 bits are consecutive here
    numbered = group.dtype == torch.float32 or group.whole
    if len(coef) > 1 or group.n > reference.EXACT_SCORE_MAX_N or not numbered:
        one_by_one.update_layers_(group, coef, inv_temperature, seed, step, draws, by_codes, score_update_)
        return
    drawn = group
    if not by_codes:
        # no machine code draws and updates at once, since draws take less time than updates. A temporary group, since
        # the codes of this one are another draw's
        drawn = type(group)(group.layers, group.n, group.m)
        drawn.allocate_codes()
        draw_layers_(drawn, inv_temperature, seed, step, draws)
    if not _update_by_codes_(drawn, coef, scalar(inv_temperature, seed), seed, step, draws):
        one_by_one.update_layers_(group, coef, inv_temperature, seed, step, draws, by_codes, score_update_)


def _update_by_codes_(group, coef: Tensor, inv_temperature: Tensor, seed: Tensor, step: Tensor, draws: Tensor) -> bool:
    """Update the logits of a group by its codes; without machine code return False, with nothing changed."""
    layers = []
    for i, layer in enumerate(group.layers):
        logits = layer.logits.view(-1, group.m)
        rest = (coef, inv_temperature)
        first = integers(0, 1, 1, 0)
        if group.dtype != torch.float32:
            rest = (*_key(group, i, seed, step, draws), *rest)
            first = integers(layer.group_offset)
        layers.append(([logits, group.codes[i].view(-1)], rest, first, logits))
    if group.dtype == torch.float32:
        return _run_over_layers(_expected_update, layers, _no_level, _drawn_code_update, in_place=True, n=group.n)
    return _run_over_layers(_rounded_code_update, layers, in_place=True, n=group.n, dtype=group.dtype)
