"""Draw and score update of many layers by one launch: a table on the device has their addresses.

A row of the table, int64, describes a layer: addresses of logits and codes, number of groups, groups in a row, offset
and row stride of their index in the whole layer, and the layer's id. The number of a layer's programs depends on its
size. A second list maps every SHARE programs to their layer.

Constants of the kernels, in addition to those in ``sampling``: ELEMENT and CODE, the dtypes of logits and codes; BYTES,
the alignment of all addresses. KIND "codes" reads the codes that ``sample_masks`` wrote; "drawn" draws again.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import device as d
from .launch import launch_layers, programs_of_layers
from .sampling import first_draw, group_index, load_codes, load_columns, store_codes, store_less, summed_terms
from .tiles import INTERPRETED, architecture, configuration, scores_in_short

FIELDS = tl.constexpr(7)
ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Alignment for vector loads, as Triton derives it for arguments
VECTOR_BYTES = 16
# Programs of one layer that share an entry of the list; a layer's last ones may have no group. In the interpreter each
# program takes time
SHARE = tl.constexpr(1 if INTERPRETED else 64)


@triton.jit
def pointer(row, FIELD: tl.constexpr, element: tl.constexpr, BYTES: tl.constexpr):
    """Pointer from a field of a row: address of elements, a multiple of BYTES."""
    address = tl.load(row + FIELD).to(tl.pointer_type(element))
    return tl.multiple_of(address, BYTES)


@triton.jit
def layer_of(table, owners, BLOCK: tl.constexpr):
    """(row of this program's layer, its first group, stride to its next groups)."""
    program = tl.program_id(0)
    # the layer's row, its first entry, and its number of entries
    owner = owners + program // SHARE * 3
    row = tl.load(owner)
    first = tl.load(owner + 1)
    entries = tl.load(owner + 2)
    own = (program - first * SHARE).to(tl.int64)
    return table + row.to(tl.int64) * FIELDS, own * BLOCK, entries.to(tl.int64) * SHARE * BLOCK


@triton.jit
def score_of_code(x, code, inv_temperature, SHORT: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """``exact_score`` of columns of logits; faster for a block of 2:4 that keeps its largest logits."""
    kept = d.decode(code, M)
    if SHORT and N == 2 and M == 4:
        ordered = d.descending(x, 4)
        # with a tie more than two would be the largest
        expected = ordered[2] < ordered[1]
        for i in tl.static_range(4):
            expected = expected & (kept[i] == (x[i] >= ordered[1]))
        if tl.min(expected.to(tl.int32), 0) == 0:
            scores = d.exact_score(d.scaled(x, inv_temperature, 4), kept, 2, 4)
        else:
            scores = d.score_of_largest_2_of_4(x, ordered, inv_temperature)
    else:
        scores = d.exact_score(d.scaled(x, inv_temperature, M), kept, N, M)
    return scores


@triton.jit
def sample_masks_kernel(
    table, owners, flips, inv_temperature, seed, step, draw,
    ELEMENT: tl.constexpr, CODE: tl.constexpr, BYTES: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Draw codes of each layer; ``flips`` counts each program's groups that differ from their N largest logits."""
    row, start, apart = layer_of(table, owners, BLOCK)
    logits = pointer(row, 0, ELEMENT, BYTES)
    codes = pointer(row, 1, CODE, BYTES)
    total = tl.load(row + 2)
    columns = tl.load(row + 3)
    offset = tl.load(row + 4)
    row_stride = tl.load(row + 5)
    key = d.load_key(seed, step, row + 6, draw)
    flipped = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, total, apart):
        x = load_columns(logits, first, total, M, BLOCK)
        group = group_index(offset, row_stride, columns, first, BLOCK, WHOLE)
        code, differs = d.drawn_code_and_flips(x, group, inv_temperature, N, M, key)
        store_codes(codes, code, first, total, BLOCK)
        flipped += tl.where(first + tl.arange(0, BLOCK) < total, differs, 0)
    tl.store(flips + tl.program_id(0), tl.sum(flipped, 0))


@triton.jit(do_not_specialize=["count"])
def score_update_of_layers_kernel(
    table, owners, coef, inv_temperature, seed, step, draws, count: tl.int64,
    ELEMENT: tl.constexpr, CODE: tl.constexpr, BYTES: tl.constexpr, KIND: tl.constexpr, SEVERAL: tl.constexpr,
    SHORT: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``score_update_kernel`` for each layer; for a single draw also by its codes."""
    row, start, apart = layer_of(table, owners, BLOCK)
    logits = pointer(row, 0, ELEMENT, BYTES)
    total = tl.load(row + 2)
    columns = tl.load(row + 3)
    offset = tl.load(row + 4)
    row_stride = tl.load(row + 5)
    layer = row + 6
    key, factor = first_draw(coef, inv_temperature, seed, step, layer, draws)
    if KIND == "codes":
        codes = pointer(row, 1, CODE, BYTES)
    for first in range(start, total, apart):
        x = load_columns(logits, first, total, M, BLOCK)
        group = group_index(offset, row_stride, columns, first, BLOCK, WHOLE)
        if KIND == "codes":
            scores = score_of_code(x, load_codes(codes, first, total, N, BLOCK), inv_temperature, SHORT, N, M)
            delta = ()
            for i in tl.static_range(M):
                delta = delta + (scores[i] * factor,)
        else:
            delta = summed_terms(x, group, inv_temperature, key, factor,
                                 coef, count, seed, step, layer, draws, SEVERAL, SHORT, N, M)  # fmt: skip
        store_less(logits, x, delta, group, key, first, total, M, BLOCK)


class Spread(NamedTuple):
    """Programs of one launch over layers.

    Attributes:
        owners: int32 [entries, 3]: for every ``SHARE`` programs the layer's row, first entry and number of entries.
        flips: int32 for each layer, one number a program; views of ``memory``.
        memory: of all flips.
    """

    owners: torch.Tensor
    flips: tuple[torch.Tensor, ...]
    memory: torch.Tensor


def spread_of(group, name):
    """Spread of a launch over a ``LayerGroup``; made once, since a captured graph reads it again."""
    config = configuration(name, group.m, group.largest, architecture(group.device))
    if config not in group.spreads:
        entries = [-(-count // SHARE.value) for count in programs_of_layers(config, group.counts, group.device)]
        firsts = itertools.accumulate(entries, initial=0)
        owners = [[i, *own] for i, own in enumerate(zip(firsts, entries, strict=False)) for _ in range(own[1])]
        # inference tensors would be useless to a later step with autograd
        with torch.inference_mode(False):
            memory = torch.empty(len(owners) * SHARE.value, dtype=torch.int32, device=group.device)
            flips = memory.split([count * SHARE.value for count in entries])
            owners = torch.tensor(owners, dtype=torch.int32, device=group.device).view(-1, 3)
        group.spreads[config] = Spread(owners, flips, memory)
    return group.spreads[config]


def draw_layers_(group, inv_temperature, seed, step, draw):
    """``layer_groups.draw_layers_`` by one launch, which counts flips."""
    spread = spread_of(group, "sample_masks")
    launch_on_group(sample_masks_kernel, "sample_masks", group, spread.memory, inv_temperature, seed, step, draw)
    group.flips = spread.flips


def update_layers_(group, coef, inv_temperature, seed, step, draws, by_codes):
    """``layer_groups.update_layers_`` by one launch."""
    count = coef.numel()
    name = "score_updates_of_layers" if count > 1 else "score_update_of_layers"
    how = {"count": count, "SEVERAL": count > 1, "KIND": "codes" if by_codes else "drawn"}
    how["SHORT"] = scores_in_short(architecture(group.device))
    launch_on_group(score_update_of_layers_kernel, name, group, coef, inv_temperature, seed, step, draws, **how)


def launch_on_group(kernel, name, group, *args, **how):
    """Launch a kernel over all layers of a ``LayerGroup``, by the group's table."""
    constants = {
        "ELEMENT": ELEMENTS[group.dtype],
        "CODE": tl.uint8 if group.m <= 8 else tl.int32,
        "BYTES": VECTOR_BYTES if group.aligned else group.dtype.itemsize,
        "N": group.n,
        "WHOLE": group.whole,
    }
    owners = spread_of(group, name).owners
    grid = len(owners) * SHARE.value
    operands = group.addresses(), owners, *args
    launch_layers(kernel, name, group.m, grid, group.largest, group.device, *operands, **how, **constants)
