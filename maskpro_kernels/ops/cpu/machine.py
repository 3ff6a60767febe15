"""Compilation of LLVM assembly to this machine's object code, and loading of it as a function on OpenMP's threads."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Sequence

from llvmlite import binding

from .codegen import ENTRY, LAYERS, SHARED, SHARED_LAYERS, THREAD, THREADS


@functools.cache
def _initialize() -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()


# Linux's system call with which a process requests the tiles of AMX, its request, and the number of their state
_ARCH_PRCTL = 158
_REQUEST_PERMISSION = 0x1023
_TILE_STATE = 18


@functools.cache
def features() -> dict[str, bool]:
    """Features of this machine's processor that the system allows, by LLVM's names."""
    host_features = dict(binding.get_host_cpu_features())
    if host_features.get("amx-tile") and not _tiles_permitted():
        host_features = {name: has and not name.startswith("amx") for name, has in host_features.items()}
    return host_features


def _tiles_permitted() -> bool:
    """Request tiles for this process; return whether the system allows them."""
    linux = sys.platform == "linux"
    return linux and ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_STATE) == 0


@functools.cache
def machine() -> binding.TargetMachine:
    """Target machine of LLVM for this processor, with all its features."""
    _initialize()
    target = binding.Target.from_default_triple()
    flags = ",".join(f"{'+' if has else '-'}{name}" for name, has in sorted(features().items()))
    return target.create_target_machine(binding.get_host_cpu_name(), flags, opt=3, reloc="pic", codemodel="default")


def object_code(assembly: str) -> bytes:
    """Compile the assembly of a module to an object file."""
    module = binding.parse_assembly(assembly)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    builder = binding.create_pass_builder(machine(), options)
    builder.getModulePassManager().run(module, builder)
    return machine().emit_object(module)


def loaded_loop(code: bytes, addresses: int) -> Callable[..., None]:
    """Load ``loop(count, threads, *addresses)`` of an object file: all groups, in the threads of torch's loops."""
    (loop,) = _loaded(code, ((ENTRY, SHARED, addresses),))
    return loop


def loaded_loop_and_layers(code: bytes, addresses: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """(``loaded_loop``, ``layers(count of all groups, threads, layers, address of a table)``)."""
    return _loaded(code, ((ENTRY, SHARED, addresses), (LAYERS, SHARED_LAYERS, 2)))


def _loaded(code: bytes, entries: Sequence[tuple[str, str, int]]) -> tuple[Callable[..., None], ...]:
    """Load functions (count, threads, *arguments) of an object file; entries are (name, shared name, arguments)."""
    _initialize()
    jit = binding.create_lljit_compiler()
    builder = binding.JITLibraryBuilder().add_object_img(code)
    for name, shared_name, _ in entries:
        builder.export_symbol(name).export_symbol(shared_name)
    openmp = _openmp()
    for name in (THREAD, THREADS):
        # without OpenMP nothing calls them, but the symbols need an address
        builder.import_symbol(name, ctypes.cast(getattr(openmp, name, _NO_THREAD), ctypes.c_void_p).value)
    library = builder.link(jit, entries[0][0])

    def function_of(name: str, shared_name: str, arguments: int) -> Callable[..., None]:
        loop = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * arguments)(library[name])
        shared_loop = ctypes.c_void_p(library[shared_name])
        data_type = ctypes.c_int64 * (1 + arguments)

        def function(count: int, threads: int, *values: int) -> None:
            # ctypes would accept any number of arguments
            assert len(values) == arguments
            if threads > 1 and openmp:
                openmp.GOMP_parallel(shared_loop, data_type(count, *values), threads, 0)
            else:
                loop(0, count, *values)

        # the code exists as long as these
        function.references = jit, library
        return function

    return tuple(function_of(*entry) for entry in entries)


_NO_THREAD = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP library if torch's loops use its threads; no second one is loaded."""
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
    except (OSError, AttributeError):
        return None
    library.GOMP_parallel.restype = None
    return library
