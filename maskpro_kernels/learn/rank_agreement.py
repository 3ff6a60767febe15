"""What ranks have to have alike beside the settings of a run: the rest of the model, and the code of the loss.

No run is told from another by these: they are compared among ranks alone.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from functools import partial
from types import CodeType

import torch
from torch import Tensor, nn

from ..digests import digest
from ..fsdp import is_distributed
from ..modules import MaskedLinear
from ..ranks import Ranks
from .step import LossFn


def check_alike(
    ranks: Ranks, settings: Mapping[str, object], model: nn.Module, layers: Mapping[str, MaskedLinear], loss_fn: LossFn
) -> None:
    """Raise ValueError on all ranks unless they have all of this alike; what is on meta has no values to compare.

    Args:
        ranks: that are connected.
        settings: of the run, as ``Ranks.agree`` takes them.
        model: whose tensors are compared, but for weights and logits of the masked layers, which settings tell.
        layers: its masked layers.
        loss_fn: whose code is compared. What it calls is not, nor what it holds: that may be of the rank.
    """
    if ranks.world == 1:
        return
    told = {id(tensor) for layer in layers.values() for tensor in (layer.weight, layer.logits)}
    counters = {id(tensor) for layer in layers.values() for tensor in layer.counter_state.buffers()}
    named = [*model.named_parameters(), *model.named_buffers()]
    rest = {name: tensor for name, tensor in named if id(tensor) not in told | counters and not tensor.is_meta}
    others = {
        **{f"{name} of the model": _digest_of(tensor) for name, tensor in rest.items()},
        "loss_fn": _code_of(loss_fn),
        # its code is not alike otherwise
        "Python": list(sys.version_info[:2]),
    }
    ranks.agree({**settings, **others})


def _digest_of(tensor: Tensor) -> list:
    """Layout and shape of a tensor, and a digest of its values."""
    parts = [tensor]
    if is_distributed(tensor):
        return [str(tensor.layout), list(tensor.shape), digest(parts)]
    if tensor.layout is torch.sparse_coo:
        # the order of its indices, and twice the same one, are no difference
        tensor = tensor.coalesce()
        parts = [tensor.indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [str(tensor.layout), list(tensor.shape), digest(part.resolve_conj().resolve_neg() for part in parts)]


def _code_of(loss_fn: LossFn) -> str:
    """A digest of the code of a loss, and of the functions within it; of what has no Python code its name."""
    while isinstance(loss_fn, partial):
        loss_fn = loss_fn.func
    kind = type(loss_fn)
    candidates = loss_fn, kind.forward if isinstance(loss_fn, nn.Module) else kind.__call__
    code = next((part.__code__ for part in candidates if hasattr(part, "__code__")), None)
    if code is None:
        return f"{kind.__module__}.{kind.__qualname__}"
    return hashlib.blake2b(repr(_described(code)).encode(), digest_size=16).hexdigest()


def _described(constant: object) -> object:
    """A constant of code, such as code within it: equal ones have equal ``repr``, wherever they stand."""
    if isinstance(constant, CodeType):
        return constant.co_code, constant.co_names, [_described(part) for part in constant.co_consts]
    if isinstance(constant, tuple):
        return [_described(part) for part in constant]
    # of a set in no order of its own
    return sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)
