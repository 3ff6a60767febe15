"""The reference under torch.compile: its functions again, with its arguments, as compiled graphs.

One graph serves all shapes: groups are laid out in rows of ROW, and what is left over runs eagerly.
One serves all dtypes of logits too: 16-bit logits are widened before it, a layer at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import philox, reference

# A multiple of every vector width, so that the loop needs no scalar tail: compiling one takes minutes
ROW = 32

# Groups in one call of the score update, whose graph holds a copy of the logits it writes
PIECE = 1 << 15


@functools.cache
def graph(name: str, consecutive_at: int | None, **constants: int | torch.dtype) -> Callable:
    """``reference.group_<name>`` as a graph for groups [rows, ROW, ...].

    Where ``consecutive_at`` is given, the argument at that place is the 0-dim index of the first of
    consecutive groups, in place of the indices of all.
    """
    function = getattr(reference, f"group_{name}")

    def bound(*args):
        if consecutive_at is not None:
            rows = args[0].shape[0]
            local = torch.arange(rows * ROW, dtype=torch.int64, device=args[0].device).view(rows, ROW)
            args = (*args[:consecutive_at], args[consecutive_at] + local, *args[consecutive_at + 1 :])
        return function(*args, **constants)

    # Without the heuristics inductor falls back to scalar code for the strided reads of a group
    traced = torch.compile(bound, dynamic=True, fullgraph=True, options={"cpp.enable_tiling_heuristics": False})

    def run(*args):
        # Module-level float constants must be constants of the graph, and every pattern is a graph
        limits = {"recompile_limit": 512, "accumulated_recompile_limit": 4096}
        with torch._dynamo.config.patch(specialize_float=True, **limits), torch.no_grad():
            return traced(*args)

    return run


def _apply(
    name: str,
    matrices: Sequence[Tensor],
    by_group: Sequence[Tensor],
    rest: Sequence[Tensor],
    m: int,
    shard: tuple[Tensor, Tensor] | None = None,
    **constants: int | torch.dtype,
) -> Tensor | None:
    """Run ``reference.group_<name>`` on matrices [rows, K] and tensors by group [rows, K / M]; flat result.

    ``shard`` is (group offset, group row stride) where the function takes indices of groups.
    """
    rows, groups = matrices[0].shape[0], matrices[0].shape[1] // m
    count = rows * groups // ROW * ROW
    flat = [x.view(-1, m) for x in matrices] + [x.view(-1) for x in by_group]
    in_rows = [x[:count].view(-1, ROW, *x.shape[1:]) for x in flat]
    left_over = [x[count:] for x in flat]
    consecutive_at = None
    if shard is not None:
        offset, row_stride = shard
        if row_stride == groups:
            consecutive_at = len(flat)
            in_rows.append(offset)
            left_over.append(offset + torch.arange(count, rows * groups))
        else:
            index = philox.group_index(rows, groups, offset, row_stride, matrices[0].device).view(-1)
            in_rows.append(index[:count].view(-1, ROW))
            left_over.append(index[count:])
    results = []
    if count:
        results.append(graph(name, consecutive_at, **constants)(*in_rows, *rest))
    if count < rows * groups or not count:
        results.append(getattr(reference, f"group_{name}")(*left_over, *rest, **constants))
    if results[0] is None:
        return None
    return results[0] if len(results) == 1 else torch.cat([result.flatten() for result in results])


def _pieces(logits, group_offset, group_row_stride, m) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(matrix, group offset, group row stride) of parts of a matrix, so that temporaries stay in cache.

    Where rows of a shard lie apart, the one part is the whole matrix.
    """
    if group_row_stride != logits.shape[1] // m:
        yield logits, group_offset, group_row_stride
        return
    groups = logits.view(-1, m)
    for start in range(0, len(groups), PIECE):
        part = groups[start : start + PIECE]
        yield part.view(1, -1), group_offset + start, torch.tensor(len(part))


def sample_mask(logits, seed, step, inv_temperature, layer, draw, group_offset, group_row_stride, *, n, m):
    """``reference.sample_mask``."""
    rest = (seed, step, inv_temperature, layer, draw)
    codes = _apply("sample_mask", [logits.float()], [], rest, m, (group_offset, group_row_stride), n=n)
    return codes.view(logits.shape[0], logits.shape[1] // m)


def sample_masked_weight(
    weight, logits, seed, step, inv_temperature, layer, draw, group_offset, group_row_stride, *, n, m
):
    """``reference.sample_masked_weight``."""
    rest = (seed, step, inv_temperature, layer, draw)
    shard = (group_offset, group_row_stride)
    return _apply("sample_masked_weight", [weight, logits.float()], [], rest, m, shard, n=n).view(weight.shape)


def top_n_mask(scores, *, n, m):
    """``reference.top_n_mask``."""
    return _apply("top_n_mask", [scores.float()], [], (), m, n=n).view(scores.shape[0], scores.shape[1] // m)


def mask_weight(weight, codes, *, m):
    """``reference.mask_weight``."""
    return _apply("mask_weight", [weight], [codes], (), m).view(weight.shape)


def mask_log_prob(logits, codes, *, n, m):
    """``reference.mask_log_prob``."""
    return _apply("mask_log_prob", [logits.float()], [codes], (), m, n=n).view(codes.shape)


def mask_score(logits, codes, grad, *, n, m):
    """``reference.mask_score``."""
    return _apply("mask_score", [logits.float()], [codes, grad], (), m, n=n).view(logits.shape)


def score_update_(logits, coef, seed, step, draws, inv_temperature, layer, group_offset, group_row_stride, *, n, m):
    """``reference.score_update_``."""
    rest = (seed, step, coef, draws, inv_temperature, layer)
    for piece, offset, row_stride in _pieces(logits, group_offset, group_row_stride, m):
        wide = piece.float()
        _apply("score_update_", [wide], [], rest, m, (offset, row_stride), n=n)
        if piece.dtype != torch.float32:
            shard = (offset, row_stride)
            rounded = _apply("round_logits", [wide], [], (seed, step, draws, layer), m, shard, dtype=piece.dtype)
            piece.copy_(rounded.view(piece.shape))
