"""Compiled loops on disk: one file a loop, its results and its machine code behind a digest.

What lies there is run. So a file counts only if this user owns it and nobody else may write to it, which is asked of
the file that is open, not of its name; and its digest covers its name, so that no loop passes for another.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)

# What nobody has loaded for that long is removed
KEPT_SECONDS = 90 * 24 * 3600

# (dtype, *shape) of tensors
Likes = tuple[tuple, ...]


def compiled(name: str, made_of: object, make: Callable[[], tuple[bytes, Likes]]) -> tuple[bytes, Likes]:
    """(Machine code, results) of a loop: that of an earlier process, or what ``make`` gives, which is kept."""
    path = folder() / f"{name}-{digest(made_of)}.o"
    # the folder may be deleted at any time
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with FileLock(lock):
        # a lock that others wait for is not to be removed
        os.utime(lock)
        kept = intact(path)
        if kept is not None:
            os.utime(path)
            return kept
        logger.info("compiling %s: once, it is kept in %s", name, path.parent)
        code, results = make()
        try:
            keep(path, code, results)
            remove_unused(path.parent)
        except OSError as error:
            logger.warning("%s is not kept: %s", path, error)
        return code, results


def digest(made_of: object) -> str:
    """Of all that compiled code depends on: the compiler, the processor, the sources, and the ``repr`` of the rest."""
    made_by = (torch.__version__, version("llvmlite"), processor(), CODE)
    return hashlib.sha256(repr((made_of, made_by)).encode()).hexdigest()[:32]


def keep(path: Path, code: bytes, results: Likes) -> None:
    """Write a loop's file: a digest of its name and the rest, a line of its results, and machine code."""
    likes = json.dumps([[str(dtype).removeprefix("torch."), *shape] for dtype, *shape in results]).encode()
    body = likes + b"\n" + code
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        # whatever the umask lets others do
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(_seal(path, body) + body)
        os.replace(unfinished, path)


def intact(path: Path) -> tuple[bytes, Likes] | None:
    """(Machine code, results) of a loop's file that is whole, of that name and of this user alone; else None."""
    data = _own_content(path)
    if data is None or _seal(path, data[32:]) != data[:32]:
        return None
    likes, _, code = data[32:].partition(b"\n")
    return code, tuple((getattr(torch, dtype), *shape) for dtype, *shape in json.loads(likes))


def _seal(path: Path, body: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + b"\n" + body).digest()


def _own_content(path: Path) -> bytes | None:
    """The content of a regular file that this user owns and nobody else may write to; else None."""
    try:
        # neither through a link, nor waiting for who writes to a pipe
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # of the open file: another may stand under its name by now
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError:
        return None
    finally:
        os.close(descriptor)


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
    # it lies there as long as it is held
    folder.own = tempfile.TemporaryDirectory(prefix="maskpro_kernels-")
    return Path(folder.own.name)


@functools.cache
def processor() -> str:
    """This machine's processor and its features: a cache may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {line.split(":")[0].strip(): line for line in lines if ":" in line}
    model = [fields[name] for name in ("model name", "flags", "Features") if name in fields]
    return " ".join([platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability(), *model])


def sources() -> str:
    """Digest of what loops are compiled from."""
    ops, digest = Path(__file__).parents[1], hashlib.sha256()
    folders = (ops, *(ops / name for name in ("reference", "cpu", "cpu/packed")))
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# Now, for a file may be edited before the first loop is compiled from what this process has loaded
CODE = sources()
