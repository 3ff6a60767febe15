"""Kernels run under Triton's interpreter where there is no GPU; set before triton is imported anywhere."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest

from maskpro_kernels import ops
from maskpro_kernels.kernels.launch import launches

hypothesis.settings.register_profile("default", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """torch.empty as the kernels call it holds NaN or all ones, so that an element left unwritten shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(torch.nan if tensor.dtype.is_floating_point else -1 if tensor.dtype.is_signed else 255)

    from maskpro_kernels.kernels import sampling

    class Poisoned:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *args, **kwargs):
            return poison(empty(*args, **kwargs))

        def empty_like(self, *args, **kwargs):
            return poison(empty_like(*args, **kwargs))

    monkeypatch.setattr(sampling, "torch", Poisoned())


@pytest.fixture
def launched():
    """The launch counter, cleared: proof that a kernel ran."""
    launches.clear()
    return launches


@pytest.fixture
def eager_reference(monkeypatch):
    """CPU tensors go to the eager reference: for tests of what is built on the operations."""
    monkeypatch.setattr(ops, "interpreting", lambda: False)
    monkeypatch.setattr(ops, "compiler_available", lambda: False)
