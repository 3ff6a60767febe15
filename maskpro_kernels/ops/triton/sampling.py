"""Kernels of draw, top-N, log-probability and score update. A program computes one or several blocks of groups.

Tensors are contiguous. ``total`` is the number of groups, ``columns`` the number in a row of the tensor. The group with
flat index p has the index offset + p in the whole layer. If rows of a shard are further apart (WHOLE false), the index
is offset + p // columns * row_stride + p % columns.

Constants of the kernels: N and M of the pattern; BLOCK, the groups of a block; KIND of the mask as in ``MaskSource``;
SHORT, whether determined groups of 2:4 use the shorter form of the score; SEVERAL, whether there are several draws.
NODES and STEP are those of the reference's quadrature.
"""

import torch
import triton
import triton.language as tl

from ..pattern import code_dtype
from ..reference.plackett_luce import NODE_COUNT, NODE_STEP
from . import device as d
from .device.arithmetic import EXACT_SCORE_MAX_N
from .launch import launch
from .tiles import INTERPRETED, architecture, scores_in_short

# Sizes and places of layers, for which kernels are not specialized
UNSPECIALIZED = ["offset", "row_stride", "columns", "total"]


@triton.jit
def group_index(offset, row_stride, columns, first, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """uint32 indices of BLOCK consecutive groups in the whole layer; first is an int64 scalar."""
    local = tl.arange(0, BLOCK)
    if WHOLE:
        index = (first + offset).to(tl.uint32) + local.to(tl.uint32)
    else:
        flat = first + local
        index = (offset + flat // columns * row_stride + flat % columns).to(tl.uint32)
    return index


@triton.jit
def tile_offsets(first, total, M: tl.constexpr, BLOCK: tl.constexpr):
    """(offsets [BLOCK, M] from the first group's first weight, mask of those within the tensor)."""
    group = tl.arange(0, BLOCK)[:, None]
    inside = first + group < total
    return group * M + tl.arange(0, M)[None, :], inside


@triton.jit
def load_columns(pointer, first, total, M: tl.constexpr, BLOCK: tl.constexpr):
    """Load the M columns of a block of groups, float32."""
    offsets, inside = tile_offsets(first, total, M, BLOCK)
    return d.split_columns(tl.load(pointer + first * M + offsets, mask=inside, other=0.0).to(tl.float32), M)


@triton.jit
def store_columns(pointer, columns, first, total, M: tl.constexpr, BLOCK: tl.constexpr):
    offsets, inside = tile_offsets(first, total, M, BLOCK)
    tile = d.join_columns(columns, M)
    tl.store(pointer + first * M + offsets, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_codes(pointer, first, total, N: tl.constexpr, BLOCK: tl.constexpr):
    local = tl.arange(0, BLOCK)
    # beyond the end keep N as well: the score of another number would divide by zero
    return tl.load(pointer + first + local, mask=first + local < total, other=(1 << N) - 1).to(tl.int32)


@triton.jit
def store_codes(pointer, codes, first, total, BLOCK: tl.constexpr):
    local = tl.arange(0, BLOCK)
    tl.store(pointer + first + local, codes.to(pointer.dtype.element_ty), mask=first + local < total)


@triton.jit
def store_masked(out, weight, code, first, total, M: tl.constexpr, BLOCK: tl.constexpr):
    """Store the weight under int32 group codes, with exact zeros for dropped weights."""
    offsets, inside = tile_offsets(first, total, M, BLOCK)
    w = tl.load(weight + first * M + offsets, mask=inside, other=0.0)
    masked = tl.where(d.decode_tile(code, M), w, 0.0)
    tl.store(out + first * M + offsets, masked.to(out.dtype.element_ty), mask=inside)


@triton.jit
def codes_of_run(
    logits, inv_temperature, key, offset, row_stride, columns, total, first,
    N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """int32 group codes of a draw of a block of groups."""
    x = load_columns(logits, first, total, M, BLOCK)
    group = group_index(offset, row_stride, columns, first, BLOCK, WHOLE)
    return d.drawn_code(x, group, inv_temperature, N, M, key)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sample_mask_kernel(
    logits, codes, inv_temperature, seed, step, layer, draw, offset: tl.int64, row_stride: tl.int64, columns: tl.int64,
    total: tl.int64,
    N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Group codes [rows, K / M] of a draw from logits [rows, K]."""
    key = d.load_key(seed, step, layer, draw)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, total, tl.num_programs(0).to(tl.int64) * BLOCK):
        code = codes_of_run(logits, inv_temperature, key, offset, row_stride, columns, total, first, N, M, BLOCK, WHOLE)
        store_codes(codes, code, first, total, BLOCK)


@triton.jit(do_not_specialize=["total"])
def top_n_mask_kernel(scores, codes, total: tl.int64, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    """Group codes [rows, K / M] of the N largest scores [rows, K]."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    kept = d.top_n(load_columns(scores, first, total, M, BLOCK), N, M)
    store_codes(codes, d.encode(kept, M), first, total, BLOCK)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def masked_weight_kernel(
    source, weight, out, inv_temperature, seed, step, layer, draw, offset: tl.int64, row_stride: tl.int64,
    columns: tl.int64, total: tl.int64,
    KIND: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the weight under the mask of ``source`` to out [rows, K], with exact zeros for dropped weights.

    By KIND, ``source`` has logits [rows, K] or codes [rows, K / M].
    """
    if KIND == "drawn":
        key = d.load_key(seed, step, layer, draw)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, total, tl.num_programs(0).to(tl.int64) * BLOCK):
        if KIND == "drawn":
            code = codes_of_run(source, inv_temperature, key, offset, row_stride, columns, total, first,
                                N, M, BLOCK, WHOLE)  # fmt: skip
        else:
            code = load_codes(source, first, total, N, BLOCK)
        store_masked(out, weight, code, first, total, M, BLOCK)


@triton.jit(do_not_specialize=["total"])
def mask_log_prob_kernel(
    logits, codes, out, inv_temperature, total: tl.int64,
    NODES: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-probability of each group's code, float32 [rows, K / M]: exact, or for large N by quadrature."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    z = d.scaled(load_columns(logits, first, total, M, BLOCK), inv_temperature, M)
    code = load_codes(codes, first, total, N, BLOCK)
    if N <= EXACT_SCORE_MAX_N:
        log_prob = d.exact_log_prob(z, d.decode(code, M), N, M)
    else:
        log_prob = d.quadrature_log_prob(z, code, NODES, STEP, M)
    store_codes(out, log_prob, first, total, BLOCK)


@triton.jit(do_not_specialize=["total"])
def mask_score_kernel(
    logits, codes, grad, out, inv_temperature, total: tl.int64,
    NODES: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of ``mask_log_prob`` in the logits times the gradient of each log-probability, float32 [rows, K]."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    z = d.scaled(load_columns(logits, first, total, M, BLOCK), inv_temperature, M)
    code = load_codes(codes, first, total, N, BLOCK)
    if N <= EXACT_SCORE_MAX_N:
        scores = d.exact_score(z, d.decode(code, M), N, M)
    else:
        scores = d.quadrature_score(z, code, NODES, STEP, M)
    local = tl.arange(0, BLOCK)
    g = tl.load(grad + first + local, mask=first + local < total, other=0.0) * inv_temperature
    scaled = ()
    for i in tl.static_range(M):
        scaled = scaled + (scores[i] * g,)
    store_columns(out, scaled, first, total, M, BLOCK)


@triton.jit
def update_terms(x, group, inv_temperature, key, scale, N: tl.constexpr, M: tl.constexpr, SHORT: tl.constexpr):
    """Columns of scale * score(mask of a draw)."""
    if SHORT and N == 2 and M == 4:
        scores = d.drawn_score_2_of_4(x, group, inv_temperature, key)
    else:
        z = d.scaled(x, inv_temperature, M)
        if N <= EXACT_SCORE_MAX_N:
            code = d.drawn_code(x, group, inv_temperature, N, M, key)
            scores = d.exact_score(z, d.decode(code, M), N, M)
        else:
            keys = d.drawn_keys(z, group, M, key)
            scores = d.exponential_race_score(z, keys, d.top_n(keys, N, M), M)
    terms = ()
    for i in tl.static_range(M):
        terms = terms + (scores[i] * scale,)
    return terms


@triton.jit
def first_draw(coef, inv_temperature, seed, step, layer, draws):
    """(key, scale of the score) of the first draw."""
    return d.load_key(seed, step, layer, draws), tl.load(coef) * inv_temperature


@triton.jit
def summed_terms(
    x, group, inv_temperature, key, factor, coef, count, seed, step, layer, draws,
    SEVERAL: tl.constexpr, SHORT: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """``update_terms`` of the first draw, with given key and factor, or with SEVERAL the sum over all draws."""
    if SEVERAL:
        delta = ()
        for _ in tl.static_range(M):
            # start at -0.0, so that an added zero keeps its sign; made of bits, since Triton 3.6 turns the literal into
            # 0.0
            delta = delta + (tl.full(x[0].shape, -(1 << 31), tl.int32).to(tl.float32, bitcast=True),)
        # the first draw is in the loop too: twice the code would take twice as long to compile
        for k in range(count):
            scale = tl.load(coef + k) * inv_temperature
            other = d.load_key(seed, step, layer, draws + k)
            terms = update_terms(x, group, inv_temperature, other, scale, N, M, SHORT)
            total_terms = ()
            for i in tl.static_range(M):
                total_terms = total_terms + (delta[i] + terms[i],)
            delta = total_terms
    else:
        delta = update_terms(x, group, inv_temperature, key, factor, N, M, SHORT)
    return delta


@triton.jit
def store_less(logits, x, delta, group, key, first, total, M: tl.constexpr, BLOCK: tl.constexpr):
    """Store columns of logits less those of delta; logits of 16 bits are rounded once."""
    new = ()
    for i in tl.static_range(M):
        new = new + (x[i] - delta[i],)
    if logits.dtype.element_ty != tl.float32:
        new = d.round_group(new, group, M, key, logits.dtype.element_ty)
    store_columns(logits, new, first, total, M, BLOCK)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "count"])
def score_update_kernel(
    logits, coef, inv_temperature, seed, step, layer, draws, offset: tl.int64, row_stride: tl.int64, columns: tl.int64,
    total: tl.int64, count: tl.int64,
    SEVERAL: tl.constexpr, SHORT: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Subtract from logits [rows, K] the sum of coef * score over ``count`` draws with the ids ``draws``."""
    key, factor = first_draw(coef, inv_temperature, seed, step, layer, draws)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, total, tl.num_programs(0).to(tl.int64) * BLOCK):
        x = load_columns(logits, first, total, M, BLOCK)
        group = group_index(offset, row_stride, columns, first, BLOCK, WHOLE)
        delta = summed_terms(x, group, inv_temperature, key, factor,
                             coef, count, seed, step, layer, draws, SEVERAL, SHORT, N, M)  # fmt: skip
        store_less(logits, x, delta, group, key, first, total, M, BLOCK)


def counter_arguments(counter, rows, m):
    """(counter arguments of a kernel over the groups of a matrix [rows, K], whether rows of groups are adjacent)."""
    columns = rows.shape[1] // m
    return (*counter, columns, rows.numel() // m), counter.group_row_stride == columns


def sample_mask(logits, n, m, inv_temperature, counter):
    """``reference.sample_mask`` as one kernel."""
    codes = torch.empty(logits.shape[0], logits.shape[1] // m, dtype=code_dtype(m), device=logits.device)
    arguments, whole = counter_arguments(counter, logits, m)
    launch(sample_mask_kernel, "sample_mask", m, codes.numel(), logits.device,
           logits, codes, inv_temperature, *arguments, N=n, WHOLE=whole)  # fmt: skip
    return codes


def masked_weight(weight, mask, dtype=None):
    """``reference.masked_weight`` as one kernel, rounded to ``dtype``, by default the weight's."""
    mask = mask.by_codes
    if dtype is not None and INTERPRETED:
        # the interpreter truncates, hardware rounds
        weight = weight.to(dtype)
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    arguments, whole = counter_arguments(mask.counter, weight, mask.m)
    launch(masked_weight_kernel, "masked_weight", mask.m, arguments[-1], weight.device,
           mask.tensor, weight, out, mask.inv_temperature, *arguments,
           KIND=mask.kind, N=mask.n, WHOLE=whole)  # fmt: skip
    return out


def top_n_mask(scores, n, m):
    """``reference.top_n_mask`` as one kernel."""
    codes = torch.empty(scores.shape[0], scores.shape[1] // m, dtype=code_dtype(m), device=scores.device)
    launch(top_n_mask_kernel, "top_n_mask", m, codes.numel(), scores.device, scores, codes, codes.numel(), N=n)
    return codes


def mask_log_prob(logits, codes, n, m, inv_temperature):
    """``reference.mask_log_prob`` as one kernel."""
    out = torch.empty(codes.shape, dtype=torch.float32, device=logits.device)
    launch(mask_log_prob_kernel, "mask_log_prob", m, codes.numel(), logits.device,
           logits, codes, out, inv_temperature, codes.numel(), NODES=NODE_COUNT, STEP=NODE_STEP, N=n)  # fmt: skip
    return out


def mask_score(logits, codes, grad, n, m, inv_temperature):
    """``reference.mask_score`` as one kernel."""
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    launch(mask_score_kernel, "mask_score", m, codes.numel(), logits.device,
           logits, codes, grad, out, inv_temperature, codes.numel(), NODES=NODE_COUNT, STEP=NODE_STEP, N=n)  # fmt: skip
    return out


def score_update_(logits, coef, n, m, inv_temperature, counter):
    """``reference.score_update_`` as one kernel, which reads and writes logits once, for any number of draws."""
    arguments, whole = counter_arguments(counter, logits, m)
    several = coef.numel() > 1
    launch(score_update_kernel, "score_updates" if several else "score_update", m, arguments[-1], logits.device,
           logits, coef, inv_temperature, *arguments, coef.numel(), SEVERAL=several,
           SHORT=scores_in_short(architecture(logits.device)), N=n, WHOLE=whole)  # fmt: skip
