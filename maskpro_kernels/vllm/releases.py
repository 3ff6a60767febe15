"""Releases of vLLM, and what is reported of others."""

from __future__ import annotations

import functools
import logging

# With which the tests have run
TRIED = ("0.32",)
# vLLM prints what loggers below its own report
logger = logging.getLogger("vllm.maskpro_kernels")


@functools.cache
def warn_of(release: str) -> None:
    """Report a release that was not tried, once in each process."""
    if ".".join(release.split(".")[:2]) not in TRIED:
        logger.warning(
            "maskpro_kernels: vLLM %s was not tried with packed checkpoints, %s was", release, " and ".join(TRIED)
        )
