"""Packed checkpoints in vLLM, as a quantization that is not part of it: ``vllm serve FOLDER``.

vLLM finds ``register`` by the entry point in pyproject.toml and calls it in each of its processes, for any model.
"""

from __future__ import annotations

from .releases import TRIED, logger


def register() -> None:
    """Register the quantization of packed checkpoints with vLLM; all else is imported for such a checkpoint.

    If this fails, it reports the error in one line instead of raising it: vLLM then serves other models, and refuses
    packed checkpoints by the name of their quantization, "maskpro".
    """
    from vllm import __version__

    # vLLM calls this unguarded, and the errors of another release of vLLM may be any
    try:
        from vllm.platforms import current_platform

        from .registered import register_config

        if current_platform.is_cpu():
            show_empty_dict_of_llvmlite()
        register_config()
    except Exception as error:
        logger.warning(
            "maskpro_kernels: packed checkpoints need vLLM %s, got %s: %s", " or ".join(TRIED), __version__, error
        )


def show_empty_dict_of_llvmlite() -> None:
    """Give llvmlite's library, which compiles products on a CPU, an empty ``__dict__``.

    Where a worker starts on a CPU without Triton, vLLM calls ``vars(value).get`` for each value in each module
    (``vllm.triton_utils.dispatcher``). The library takes any name for that of a function, also ``__dict__``, and a
    function has no ``get``. It is a value of llvmlite's own module, so no import of this package can hide it once a
    product has run: with transformers before vLLM, or in a process's first engine before its second. vLLM calls
    ``register`` once in a process, before either, so llvmlite is imported here.
    """
    from llvmlite.binding import ffi

    ffi.lib._fntab.setdefault("__dict__", {})
