"""Triton's interpreter, mended where it differs from hardware in what the kernels do, and where it wastes time."""

from __future__ import annotations

import functools
import inspect
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def widen_bfloat16_exactly() -> None:
    """Casts of bfloat16 to float32 keep every value, as they do on all hardware.

    As Triton ships the interpreter (3.6 to 3.9), its cast takes subnormal numbers for zeros or for others.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    shipped = interpreter._convert_float

    def convert(values, before, after, rounding):
        if before == tl.bfloat16 and after == tl.float32:
            return values.view(np.uint16).astype(np.uint32) << 16
        return shipped(values, before, after, rounding)

    interpreter._convert_float = convert


def patch_the_language_once() -> None:
    """Patch it at a launch, not again in each device function, and cache dtypes: half of the interpreter's time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, dtype = interpreter._patch_lang, interpreter._get_np_dtype

    @functools.cache
    def languages(fn):
        return [x for x in fn.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]

    def patch_once(fn):
        done = languages(fn) and not any(tl.core.is_builtin(x.load) for x in languages(fn))
        return interpreter._LangPatchScope() if done else patch(fn)

    of_number = functools.cache(dtype)
    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = lambda kind: dtype(kind) if kind.scalar.is_ptr() else of_number(kind.scalar)


def launch_in_a_thread() -> None:
    """Run each launch in a new thread, whose stack of frames is empty.

    CPython 3.11 keeps frames in chunks of 16 KiB: a call that enters the next one maps it, and unmaps it on return.
    Where a loop of calls happens to cross such an end, as deep as pytest calls a test, it takes half as long again.
    """
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_in_thread(executor, *args, **kwargs):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(launch, executor, *args, **kwargs).result()

    GridExecutor.__call__ = launch_in_thread
