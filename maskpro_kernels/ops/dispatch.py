"""The one rule of dispatch: which code runs an operation, by device.

All routes give the same bits of draws, scores and updates by a given score or slope. Products, and the slopes that
straight-through takes from them, are within an error budget of each other: each route sums in its own order.

CUDA tensors go to the kernels. CPU tensors go to the kernels under Triton's interpreter (``TRITON_INTERPRET=1``), else
to the reference: as machine code where LLVM compiles for the machine, else eager.

A new device, neither CUDA nor ROCm, is added here. If Triton compiles for it: accept its tensors in ``uses_kernels``,
name its type in ``operation``, and give it a target in ``triton.tiles`` and its current-device context in
``triton.launch``. If not: write the functions of ``reference`` in a folder beside ``cpu``, and choose it in
``run_reference``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from . import reference
from .triton import tiles

logger = logging.getLogger(__name__)

ROOT = __name__.removesuffix(".ops.dispatch")
# Of torch's operations, of which a process has each once: a copy of the package under another name, as the hub of
# kernels loads it, registers its own beside these
NAMESPACE = "maskpro" if ROOT == "maskpro_kernels" else re.sub(r"\W", "_", ROOT)


def interpreting() -> bool:
    """True where CPU tensors go to the kernels, as they do through Triton's interpreter."""
    return tiles.ON_CPU is not None


@functools.cache
def compiler_available() -> bool:
    """True where LLVM compiles for this machine."""
    try:
        importlib.import_module("llvmlite.binding").get_host_cpu_name()
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("LLVM does not compile here (%s): maskpro_kernels runs eagerly on CPU, which is slower", error)
        return False
    return True


@functools.cache
def kernels(file: str) -> ModuleType:
    """A file of Triton kernels; Triton is imported when the first one is wanted."""
    return importlib.import_module(f"{__package__}.triton.{file}")


@functools.cache
def machine_code(file: str) -> ModuleType:
    """A file of what runs as machine code; llvmlite is imported when the first one is wanted, for it may be missing."""
    return importlib.import_module(f"{__package__}.cpu.{file}")


def uses_kernels(tensor: Tensor) -> bool:
    """True where operations on a tensor go to the Triton kernels."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and interpreting())


def uses_machine_code(tensor: Tensor) -> bool:
    """True where operations on a tensor that no kernel takes run as machine code, rather than eagerly."""
    return tensor.device.type == "cpu" and compiler_available()


def run_reference(name: str, *args, **constants: int):
    """Run a function of the reference: as machine code where that can be, else as it stands."""
    module = machine_code("kernels") if uses_machine_code(args[0]) else reference
    return getattr(module, name)(*args, **constants)


def packed_products(tensor: Tensor) -> ModuleType:
    """Products with packed weights where no Triton kernel has them: compiled code, or torch on what is unpacked."""
    return machine_code("packed.products") if uses_machine_code(tensor) else reference


def scalar(value: float, like: Tensor) -> Tensor:
    """A number as a 0-dim float32 tensor on a tensor's device, so that no compiled loop holds its value."""
    return _scalar(value, like.device)


@functools.lru_cache(maxsize=1 << 12)
def _scalar(value: float, device: torch.device) -> Tensor:
    # only read, and kept: a layer needs the same few at every step
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device=device)


def operation(schema: str, fake: Callable):
    """Register a function as the torch op of its name; ``fake`` gives what it would give, without content.

    As ``torch.library.custom_op``, but without its wrapper, which takes long beside a small layer: an operation that
    changes an argument increments its version itself.
    """

    def register(function: Callable) -> Callable:
        name = function.__name__.removeprefix("_")
        torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"{NAMESPACE}::{name}", ("cpu", "cuda"))(function)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Products in the dtype of their operands, also where backward runs inside of autocast."""
    device = tensor.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


def in_onnx_export() -> bool:
    """Tell whether ``torch.onnx.export`` traces: no ONNX runtime has the operations of this package."""
    # the first of the two alone is quick, and imports nothing
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
