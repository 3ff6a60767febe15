"""Bytes of a process's tensors, counted by their storages while operations run."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counting(TorchDispatchMode):
    """Adds the bytes of all live storages after each operation; FSDP2 empties storages and fills them again."""

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0
        for tensor in known:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        tensor = tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = weakref.ref(storage)

    def now(self) -> int:
        alive = {key: storage for key, of in self.storages.items() if (storage := of()) is not None}
        self.storages = {key: self.storages[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        self.peak = max(self.peak, self.now())
        return result


@contextmanager
def counting_held():
    """Counts, from the tensors that are there on: ``peak``, and ``now()``.

    What no operation of torch makes is not seen, such as what gloo copies to send.
    """
    gc.collect()
    with warnings.catch_warnings():
        # of objects that a look keeps alive
        warnings.simplefilter("ignore")
        known = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    with _Counting(known) as counting:
        yield counting
