"""Kernels run under Triton's interpreter where there is no GPU; set before triton is imported anywhere."""

from __future__ import annotations

import functools
import os
import resource
from contextlib import contextmanager

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest

from maskpro_kernels.ops import dispatch
from maskpro_kernels.ops.cpu import kernels
from maskpro_kernels.ops.triton.launch import launches

hypothesis.settings.register_profile("default", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("default")


# CPython keeps frames in chunks of 16 KiB; a call that enters the next one maps it, and unmaps it on return. A loop of
# calls across such an end spends most of its time there, as Triton's interpreter does where pytest happens to call it
# that deep. A frame of so many variables gets a chunk of its own, with room for the frames of all that it calls.
VARIABLES = 5 << 13
_names = " = ".join(f"v{i}" for i in range(VARIABLES))
_defined = {}
exec(f"def with_room_for_frames(call, **arguments):\n return call(**arguments)\n {_names} = None", _defined)
with_room_for_frames = _defined["with_room_for_frames"]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    pyfuncitem.obj = functools.partial(with_room_for_frames, pyfuncitem.obj)
    return (yield)


# Elements behind what a kernel may write
MARGIN = 1 << 12
# Bytes of outputs that are kept to be checked together, and how many of the newest may not be written yet
MOST_KEPT = 1 << 30
NEWEST = 8


def poison_of(dtype):
    """NaN, or the integer with all bits set."""
    return torch.nan if dtype.is_floating_point else -1 if dtype.is_signed else 255


class PoisonedTorch:
    """torch with allocations that hold poison, and more of it behind them."""

    def __init__(self):
        self.buffers, self.bytes = [], 0

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *size, dtype=None, device=None):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        buffer = torch.empty(shape.numel() + MARGIN, dtype=dtype, device=device)
        buffer.fill_(poison_of(buffer.dtype))
        self.buffers.append(buffer)
        self.bytes += buffer.nbytes
        if self.bytes > MOST_KEPT:
            self.check_margins(but=NEWEST)
        return buffer[: shape.numel()].view(shape)

    def empty_like(self, tensor):
        return self.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def check_margins(self, but=0):
        """Of all but the newest, which are then let go."""
        checked = self.buffers[: len(self.buffers) - but]
        for buffer in checked:
            margin = buffer[-MARGIN:]
            intact = margin.isnan() if buffer.dtype.is_floating_point else margin == poison_of(buffer.dtype)
            assert intact.all(), f"a kernel wrote beyond the end of its output in {buffer.dtype}"
        del self.buffers[: len(checked)]
        self.bytes = sum(buffer.nbytes for buffer in self.buffers)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the ops allocate is poisoned: an element left unwritten shows, as does one written beyond the end."""
    from maskpro_kernels.ops.triton import masked_gemm, packed, sampling, straight_through, swaps

    poisoned_torch = PoisonedTorch()
    for module in (kernels, sampling, masked_gemm, packed, straight_through, swaps):
        monkeypatch.setattr(module, "torch", poisoned_torch)
    yield poisoned_torch
    poisoned_torch.check_margins()


@pytest.fixture
def launched():
    """The launch counter, cleared: proof that a kernel ran."""
    launches.clear()
    return launches


def route_to_the_eager_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(dispatch, "compiler_available", lambda: False)


@pytest.fixture
def eager_reference(monkeypatch):
    """CPU tensors go to the eager reference: for tests of what is built on the operations."""
    route_to_the_eager_reference(monkeypatch)


@contextmanager
def files_of_at_most(size):
    """A disk that is full, as far as a file can tell: none grows beyond that many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
