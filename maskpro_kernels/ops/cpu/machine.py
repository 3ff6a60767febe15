"""This machine: LLVM's assembly as its object code, and object code as a function that threads share."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from llvmlite import binding
from torch import Tensor

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


def loaded_loop(code: bytes, addresses: int) -> Callable[[int, int, Sequence[Tensor]], None]:
    """``loop(count, threads, tensors)`` of an object file: all groups, without the GIL."""
    _initialize()
    jit = binding.create_lljit_compiler()
    library = binding.JITLibraryBuilder().add_object_img(code).export_symbol(ENTRY).link(jit, ENTRY)
    part = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * addresses)(library[ENTRY])

    def run(start: int, stop: int, tensors: Sequence[Tensor]) -> None:
        # whoever runs it holds the tensors: their memory outlives a caller that is interrupted
        part(start, stop, *(tensor.data_ptr() for tensor in tensors))

    def loop(count: int, threads: int, tensors: Sequence[Tensor]) -> None:
        *parts, own = itertools.pairwise(count * i // threads for i in range(threads + 1))
        others: list[Future] = []
        try:
            for start, stop in parts:
                others.append(_pool.submit(run, start, stop, tensors))
            run(*own, tensors)
        except RuntimeError:
            # the interpreter ends, and starts no more threads
            for start, stop in [*parts[len(others) :], own]:
                run(start, stop, tensors)
        finally:
            _wait(others)

    # the code lives as long as these
    loop.kept = jit, library
    return loop


def _wait(futures: Sequence[Future]) -> None:
    """Until all have ended, through interrupts: no result may be written once the caller goes on."""
    interrupt = None
    while not all(future.done() for future in futures):
        try:
            wait(futures)
        except BaseException as raised:
            interrupt = raised
    if interrupt is not None:
        raise interrupt


def _new_pool() -> ThreadPoolExecutor:
    # threads start when they are wanted first
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="maskpro_kernels")


def _renew_pool() -> None:
    global _pool
    _pool = _new_pool()


_pool = _new_pool()
# a child of fork has none of the threads
os.register_at_fork(after_in_child=_renew_pool)
