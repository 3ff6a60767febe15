"""Compiled loops on disk: one file a loop, its results and its machine code behind a digest."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import torch

# What nobody has loaded for that long is removed
KEPT_SECONDS = 90 * 24 * 3600

# (dtype, *shape) of tensors
Likes = tuple[tuple, ...]


def keep(path: Path, code: bytes, results: Likes) -> None:
    """A loop's file: a digest of the rest, a line that tells its results, and machine code."""
    told = json.dumps([[str(dtype).removeprefix("torch."), *shape] for dtype, *shape in results]).encode()
    body = told + b"\n" + code
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        unfinished.write_bytes(hashlib.sha256(body).digest() + body)
        os.replace(unfinished, path)


def intact(path: Path) -> tuple[bytes, Likes] | None:
    """(Machine code, results) of a loop's file, if it is there and whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, body = data[:32], data[32:]
    if hashlib.sha256(body).digest() != digest:
        return None
    told, code = body.split(b"\n", 1)
    return code, tuple((getattr(torch, dtype), *shape) for dtype, *shape in json.loads(told))


def remove_unused(folder: Path) -> None:
    """Remove what nobody has loaded for KEPT_SECONDS, and what killed processes left behind."""
    for path in folder.iterdir():
        # another process may have removed its own in the meantime
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime < KEPT_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


@functools.cache
def folder() -> Path:
    """Where compiled loops are kept: ``maskpro_kernels`` in ``$XDG_CACHE_HOME`` or ``~/.cache`` if nobody else may
    write there, for what lies there is run; else a folder of this process.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    shared = Path(base) / "maskpro_kernels"
    try:
        if shared.is_absolute():
            shared.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = shared.stat()
            if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(shared, os.W_OK):
                return shared
    except OSError:
        pass
    return Path(_of_this_process().name)


@functools.cache
def _of_this_process() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="maskpro_kernels-")


@functools.cache
def processor() -> str:
    """What native code may use here: a cache may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {line.split(":")[0].strip(): line for line in lines if ":" in line}
    model = [fields[name] for name in ("model name", "flags", "Features") if name in fields]
    return " ".join([platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability(), *model])


def sources() -> str:
    """Digest of what loops are compiled from."""
    package, digest = Path(__file__).parents[2], hashlib.sha256()
    folders = (package / "ops", package / "ops" / "reference", package / "ops" / "cpu")
    files = [package / "counter.py", package / "pattern.py"]
    for path in [*files, *sorted(path for folder in folders for path in folder.glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


# Now, for a file may be edited before the first loop is compiled from what this process has loaded
CODE = sources()
