"""Compiled loops on disk: one file a loop, with a digest, its results and its machine code.

The machine code is executed. So a file is valid only if this user owns it and nobody else may write to it, which is
checked on the open file, not on its name. The digest covers the name, so that no file can replace another.
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

# Files that were not loaded for this long are removed
KEPT_SECONDS = 90 * 24 * 3600

# (dtype, *shape) of each tensor
Specs = tuple[tuple, ...]


def compiled(name: str, key: object, make: Callable[[], tuple[bytes, Specs]]) -> tuple[bytes, Specs]:
    """(machine code, results) of a loop: loaded from disk, or made by ``make`` and stored."""
    try:
        path = folder() / f"{name}-{digest(key)}.o"
        # the folder may be deleted at any time
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_path = path.with_suffix(".lock")
        lock = FileLock(lock_path).acquire()
        # keeps the file, whose lock other processes may wait for, from removal
        os.utime(lock_path)
    except OSError as error:
        logger.warning("%s is compiled, and not stored: %s", name, error)
        return make()
    with lock:
        loop = load(path)
        if loop is not None:
            os.utime(path)
            return loop
        logger.info("compiling %s once, to store it in %s", name, path.parent)
        code, results = make()
        try:
            store(path, code, results)
            remove_unused(path.parent)
        except OSError as error:
            logger.warning("%s is not stored: %s", path, error)
        return code, results


def digest(key: object) -> str:
    """Digest of all that compiled code depends on: compiler, processor, sources, and the ``repr`` of its key."""
    environment = (torch.__version__, version("llvmlite"), processor(), CODE)
    return hashlib.sha256(repr((key, environment)).encode()).hexdigest()[:32]


def store(path: Path, code: bytes, results: Specs) -> None:
    """Write a loop's file: a digest of its name and the rest, a line of its results, and machine code."""
    specs = json.dumps([[str(dtype).removeprefix("torch."), *shape] for dtype, *shape in results]).encode()
    body = specs + b"\n" + code
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        # whatever the umask
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(_checksum(path, body) + body)
        os.replace(unfinished, path)


def load(path: Path) -> tuple[bytes, Specs] | None:
    """(machine code, results) of a loop's file; None unless it is whole, of this name and of this user alone."""
    data = _trusted_content(path)
    if data is None or _checksum(path, data[32:]) != data[:32]:
        return None
    specs, _, code = data[32:].partition(b"\n")
    return code, tuple((getattr(torch, dtype), *shape) for dtype, *shape in json.loads(specs))


def _checksum(path: Path, body: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + b"\n" + body).digest()


def _trusted_content(path: Path) -> bytes | None:
    """Content of a regular file that this user owns and nobody else may write to; else None."""
    try:
        # do not follow a link, or wait for the writer of a pipe
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # of the open file: the name may now belong to another
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
    """Remove files that were not loaded for KEPT_SECONDS, and temporary files of killed processes."""
    for path in folder.iterdir():
        # another process may have removed it since
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime < KEPT_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


@functools.cache
def folder() -> Path:
    """Folder of compiled loops: ``maskpro_kernels`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    If others may write there, it is a temporary folder of this process, since its files are executed.
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
    # it exists as long as this object
    folder.temporary = tempfile.TemporaryDirectory(prefix="maskpro_kernels-")
    return Path(folder.temporary.name)


@functools.cache
def processor() -> str:
    """Name and features of this machine's processor, since different machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {line.split(":")[0].strip(): line for line in lines if ":" in line}
    model = [fields[name] for name in ("model name", "flags", "Features") if name in fields]
    return " ".join([platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability(), *model])


def sources() -> str:
    """Digest of the sources of all operations."""
    ops = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(ops.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# Computed now: a file may be edited before this process compiles loops from the code that it has loaded
CODE = sources()
