"""This machine: LLVM's assembly as its object code, and object code as a function that threads share."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from llvmlite import binding

from .loops import ENTRY


@functools.cache
def _initialize() -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()


@functools.cache
def machine() -> binding.TargetMachine:
    """This one, with all that its processor has."""
    _initialize()
    target = binding.Target.from_default_triple()
    features = binding.get_host_cpu_features().flatten()
    return target.create_target_machine(binding.get_host_cpu_name(), features, opt=3, reloc="pic", codemodel="default")


def object_code(assembly: str) -> bytes:
    """The object file of a module."""
    module = binding.parse_assembly(assembly)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    builder = binding.create_pass_builder(machine(), options)
    builder.getModulePassManager().run(module, builder)
    return machine().emit_object(module)


def loaded_loop(code: bytes, addresses: int) -> Callable[..., None]:
    """``loop(count, threads, *addresses)`` of an object file: all groups, without the GIL."""
    _initialize()
    jit = binding.create_lljit_compiler()
    library = binding.JITLibraryBuilder().add_object_img(code).export_symbol(ENTRY).link(jit, ENTRY)
    part = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * addresses)(library[ENTRY])

    def loop(count: int, threads: int, *tensors: int) -> None:
        ends = [count * i // threads for i in range(threads + 1)]
        others = [_pool(threads - 1).submit(part, *ends[i : i + 2], *tensors) for i in range(threads - 1)]
        part(*ends[-2:], *tensors)
        for other in others:
            other.result()

    # the code lives as long as these
    loop.kept = jit, library
    return loop


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="maskpro_kernels")


# a child of fork has none of the threads
os.register_at_fork(after_in_child=_pool.cache_clear)
