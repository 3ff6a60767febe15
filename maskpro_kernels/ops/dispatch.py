"""The one rule of dispatch: which code runs an operation, by device.

All routes give the same bits for draws, scores and updates by a given score or slope. Products, and the
straight-through slopes of products, agree within an error budget, since each route sums in its own order.

CUDA tensors use the kernels. CPU tensors use the kernels under Triton's interpreter (``TRITON_INTERPRET=1``). Otherwise
they use the reference: as machine code if LLVM compiles for the machine, else eager.

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
# Namespace of the torch operations. The hub of kernels loads a copy of the package under another name, which then needs
# another namespace
NAMESPACE = "maskpro" if ROOT == "maskpro_kernels" else re.sub(r"\W", "_", ROOT)


def interpreting() -> bool:
    """Return whether CPU tensors use the kernels, by Triton's interpreter."""
    return tiles.ON_CPU is not None


@functools.cache
def compiler_available() -> bool:
    """Return whether LLVM compiles for this machine."""
    try:
        importlib.import_module("llvmlite.binding").get_host_cpu_name()
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("LLVM does not compile here (%s): maskpro_kernels runs eagerly on CPU, which is slower", error)
        return False
    return True


@functools.cache
def kernels(file: str) -> ModuleType:
    """Import a module of Triton kernels; the first call imports Triton."""
    return importlib.import_module(f"{__package__}.triton.{file}")


@functools.cache
def machine_code(file: str) -> ModuleType:
    """Import a module of machine code; the first call imports llvmlite, which may be missing."""
    return importlib.import_module(f"{__package__}.cpu.{file}")


def uses_kernels(tensor: Tensor) -> bool:
    """Return whether operations on a tensor use the Triton kernels."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and interpreting())


@functools.cache
def holds_metadata(device: torch.device) -> bool:
    """Return whether 2:4 weights of 16 bits on a device have metadata, for sparse tensor cores, and not a bitmask."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        kernels("sparse_mma")
    except (ImportError, AttributeError) as error:
        logger.warning(
            "triton lacks the Gluon that sparse tensor cores need (%s): 2:4 products run without them", error
        )
        return False
    return True


def uses_machine_code(tensor: Tensor) -> bool:
    """Return whether operations on a tensor without a kernel run as machine code, not eagerly."""
    return tensor.device.type == "cpu" and compiler_available()


def run_reference(name: str, *args, **constants: int):
    """Run a function of the reference: as machine code if possible, else eagerly."""
    module = machine_code("kernels") if uses_machine_code(args[0]) else reference
    return getattr(module, name)(*args, **constants)


def packed_products(tensor: Tensor) -> ModuleType:
    """Module of packed products without a Triton kernel: machine code, or torch on unpacked weights."""
    return machine_code("packed.products") if uses_machine_code(tensor) else reference


def scalar(value: float, like: Tensor) -> Tensor:
    """Make a 0-dim float32 tensor of a number, on a tensor's device, so that no compiled loop contains its value."""
    return _scalar(value, like.device)


@functools.lru_cache(maxsize=1 << 12)
def _scalar(value: float, device: torch.device) -> Tensor:
    # cached and only read: a layer needs the same few numbers at each step
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device=device)


def operation(schema: str, fake: Callable):
    """Register a function as the torch op of its name; ``fake`` returns tensors like its results, without content.

    Like ``torch.library.custom_op`` without its wrapper, which is slow for a small layer. So an operation that changes
    an argument must increment its version itself.
    """

    def register(function: Callable) -> Callable:
        name = function.__name__.removeprefix("_")
        torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"{NAMESPACE}::{name}", ("cpu", "cuda"))(function)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Disable autocast, so that products keep the dtype of their operands, also in a backward inside of autocast."""
    device = tensor.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


def in_onnx_export() -> bool:
    """Return whether ``torch.onnx.export`` traces: no ONNX runtime has the operations of this package."""
    # the first check is fast and imports nothing
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
