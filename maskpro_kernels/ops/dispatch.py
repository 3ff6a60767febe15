"""How a call of an operation reaches its code.

``definitions`` defines each operation once, as an operation of torch. torch's dispatcher calls the function of the same
name and arguments in the table of the tensors' device:

    ``tables.triton``: Triton kernels, on CUDA and ROCm; on a CPU under Triton's interpreter (``TRITON_INTERPRET=1``).
    ``tables.cpu``: machine code, on a CPU for which LLVM compiles.
    ``tables.reference``: plain torch, on another CPU.

All tables give the same bits for draws, scores and updates by a given score or slope. Products, and straight-through
slopes, which contain one, agree within an error budget, since each table sums in its own order.

A new device gets a table of its own, a line in ``table``, and its type in ``DEVICES``. If Triton compiles for it, it
needs instead a target in ``triton.tiles`` and its current-device context in ``triton.launch``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from .counter import Counter, MaskSource
from .triton import tiles

logger = logging.getLogger(__name__)

ROOT = __name__.removesuffix(".ops.dispatch")
# Namespace of the torch operations. The hub of kernels loads a copy of the package under another name, which then needs
# another namespace
NAMESPACE = "maskpro" if ROOT == "maskpro_kernels" else re.sub(r"\W", "_", ROOT)

# Devices with a table
DEVICES = ("cpu", "cuda")


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
def _imported(name: str) -> ModuleType:
    # at the first call: Triton and LLVM take long to import, and may be missing
    return importlib.import_module(f"{__package__}.tables.{name}")


def uses_triton(device_type: str) -> bool:
    """Return whether operations on a device use the Triton kernels."""
    return device_type == "cuda" or (device_type == "cpu" and interpreting())


def table(device_type: str) -> ModuleType:
    """Table of the operations' functions on a device."""
    if uses_triton(device_type):
        return _imported("triton")
    if device_type == "cpu" and compiler_available():
        return _imported("cpu")
    return _imported("reference")


@functools.cache
def holds_metadata(device: torch.device) -> bool:
    """Return whether 2:4 weights of 16 bits on a device have metadata, for sparse tensor cores, and not a bitmask."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        importlib.import_module(f"{__package__}.triton.sparse_mma")
    except (ImportError, AttributeError) as error:
        logger.warning(
            "triton lacks the Gluon that sparse tensor cores need (%s): 2:4 products run without them", error
        )
        return False
    return True


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Disable autocast, so that products keep the dtype of their operands, also in a backward inside of autocast."""
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext()


def operation(schema: str, last: type[Counter] | type[MaskSource] | None = None) -> Callable[[Callable], Callable]:
    """Define a torch operation, which the function of its name in the device's table runs.

    The decorated function returns tensors like the results, without content: from it compilers learn their shapes.

    Like ``torch.library.custom_op`` without its wrapper, which takes longer than a small product.

    Args:
        schema: of torch.library.
        last: type of one more argument, the last. Schemas have no tuples of tensors and numbers, so the operation takes
            its parts; the functions take the tuple.
    """

    def define(function: Callable) -> Callable:
        name = function.__name__.removeprefix("_")
        qualified_name = f"{NAMESPACE}::{name}"
        arguments, results = schema.split(" -> ")
        if last is not None:
            arguments = f"{arguments.removesuffix(')')}, {last.SCHEMA})"
        changed = [i for i, argument in enumerate(arguments.split(", ")) if "!" in argument]
        torch.library.define(qualified_name, f"{arguments} -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified_name, _joining(function, last))
        for device_type in DEVICES:
            torch.library.impl(qualified_name, device_type)(_implementation(name, device_type, last, changed))
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        if last is None:
            return overload

        @functools.wraps(function)
        def call(*arguments):
            return overload(*arguments[:-1], *arguments[-1].flat())

        return call

    return define


def _joining(function: Callable, last: type[Counter] | type[MaskSource] | None) -> Callable:
    """Make of a function whose last argument is a tuple a function of the tuple's parts."""
    if last is None:
        return function
    count = last.SCHEMA.count(",") + 1
    return lambda *arguments: function(*arguments[:-count], last.unflat(*arguments[-count:]))


def _implementation(
    name: str, device_type: str, last: type[Counter] | type[MaskSource] | None, changed: Sequence[int]
) -> Callable:
    """Make the function that torch's dispatcher calls on a device; ``changed`` are the arguments that it writes to."""

    def run(*arguments):
        function = getattr(table(device_type), name)
        if torch.is_autocast_enabled(device_type):
            # products keep the dtype of their operands
            with torch.autocast(device_type, enabled=False):
                return function(*arguments)
        return function(*arguments)

    run_on_parts = _joining(run, last)
    if not changed:
        return run_on_parts

    def run_in_place(*arguments):
        results = run_on_parts(*arguments)
        for i in changed:
            if arguments[i] is not None and not arguments[i].is_inference():
                # what autograd has saved of it is no longer valid
                torch.autograd.graph.increment_version(arguments[i])
        return results

    return run_in_place


def in_onnx_export() -> bool:
    """Return whether ``torch.onnx.export`` traces: no ONNX runtime has the operations of this package."""
    # the first check is fast and imports nothing
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
