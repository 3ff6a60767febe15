"""A second device where there is none: tensors on "far" lie in main memory, but mix with those of no other device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.utils.backend_registration
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# What a tensor on "far" holds, by its storage: that alone it shares with what Parameter and detach make of it
_held: dict[int, Tensor] = {}


def _far(near: Tensor) -> Tensor:
    tensor = torch._C._acc.create_empty_tensor(list(near.shape), near.dtype)
    # torch takes the new tensor for a contiguous one
    _held[tensor.untyped_storage()._cdata] = near.contiguous()
    return tensor


def _near(tensor: Tensor) -> Tensor:
    held = _held[tensor.untyped_storage()._cdata]
    return held if held.dtype == tensor.dtype else held.view(tensor.dtype)


def _is_far(value) -> bool:
    return isinstance(value, Tensor) and value.device.type == "far"


def _copy(source: Tensor, into: Tensor) -> Tensor:
    one, other = (_near(tensor) if _is_far(tensor) else tensor for tensor in (source, into))
    other.copy_(one)
    return into


# tensors of inference mode cannot grow
@torch.inference_mode(False)
@torch.no_grad()
def _compute(op, *args, **kwargs):
    if op is torch.ops.aten._copy_from.default:
        return _copy(*args[:2])
    if op is torch.ops.aten.as_strided.default:
        near, size, stride, *offset = _near(args[0]), *args[1:]
        return _far(near.as_strided(size, stride, near.storage_offset() + (offset[0] if offset else 0)))
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if any(tensor.dim() and not _is_far(tensor) for tensor in tensors):
        raise RuntimeError(f"{op}: expected one device, got {sorted({str(tensor.device) for tensor in tensors})}")
    nears = [(tensor, _near(tensor)) for tensor in tensors if _is_far(tensor)]

    def near(value):
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return next((inner for outer, inner in nears if outer is value), value)

    def far(value):
        if not isinstance(value, Tensor):
            return value
        outer = next((outer for outer, inner in nears if inner is value), None)
        if outer is None:
            return _far(value)
        if outer.shape != value.shape:
            # what an operation was given for its result has grown
            outer.data = _far(value)
        return outer

    # a number in the place of a tensor arrives as a number
    wanted = [str(argument.type) for argument in op._schema.arguments]
    args = [
        torch.tensor(value) if kind == "Tensor" and isinstance(value, (int, float)) else value
        for value, kind in zip(args, wanted, strict=False)
    ]
    return tree_map(far, op(*tree_map(near, args), **tree_map(near, kwargs)))


class _Stream:
    """Stream of a device whose operations end before they return."""

    def synchronize(self) -> None:
        pass


class _Backend(torch.utils.backend_registration._DummyBackendModule):
    """The module torch.far, with the state of random numbers that torch's tests need on each device."""

    def get_rng_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def current_stream(self) -> _Stream:
        return self._stream

    def stream(self, stream: _Stream) -> AbstractContextManager:
        return nullcontext()

    _stream = _Stream()


def far_device() -> torch.library.Library:
    """Make the device "far" for the rest of the process; keep a reference to the result while it is used."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("far", _Backend())
    # accelerate empties the cache of any device that a weight moves to; the allocator of a backend in Python has none
    torch.accelerator.empty_cache = lambda: None
    library = torch.library.Library("_", "IMPL")
    library.fallback(_compute, "PrivateUse1")
    return library
