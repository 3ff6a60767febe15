"""Files that are seen as a whole or not at all, also after a crash, and folders that may be written to."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

# What a folder answers to a sync that is not ours to read or write, or whose file system, as autofs, has none
UNSYNCED = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EROFS}


def can_only_be_a_path(name: str) -> bool:
    """Whether a name is none of the hub, whose ids are "name" and "owner/name"."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is seen as a whole or not at all, also after a crash; of several writers the last one's."""
    with writing_whole(path) as file:
        file.write(content)


@contextmanager
def writing_whole(path: Path) -> Iterator[BinaryIO]:
    """The same, of what is written within; where that fails, nothing has been written."""
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def append_whole(path: Path, content: bytes) -> None:
    """Add bytes to a file, which is made if missing: all of them, or none where that fails.

    Raises:
        OSError: if they cannot be written; the file then ends where it did.
    """
    with open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            if file.write(content) != len(content):
                raise OSError(f"{path}: the disk took a part only")
        except BaseException:
            # an interrupt too: whoever goes on would write behind a half
            os.ftruncate(file.fileno(), before)
            raise


def _temporary(path: Path) -> Path:
    # a name of its own, or one writer would take away what another one writes
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


def discard(path: Path) -> None:
    """Remove a file, or a folder with what is in it, which is seen as a whole or not at all."""
    if not path.is_dir():
        path.unlink()
        return
    aside = _temporary(path)
    path.rename(aside)
    shutil.rmtree(aside)


def unfinished(folder: Path, name: str = ".+") -> list[Path]:
    """Files and folders of which a process that was killed had written or removed a part, by the names of such parts.

    Args:
        name: a regular expression for the name that the whole file would have got.
    """
    return _named(rf"({name})(\.[0-9a-f]{{16}}\.tmp)+", folder)


def unfinished_tensors(folder: Path) -> list[Path]:
    """The same of ``write_tensors``, by the names that safetensors gives such parts."""
    return _named(r"\.tmp[A-Za-z0-9]{6}", folder)


def clear_unfinished(folder: Path) -> None:
    """Remove all such parts in a folder, which need not be there."""
    for half in (*unfinished(folder), *unfinished_tensors(folder)):
        discard(half)


def _named(name: str, folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if re.fullmatch(name, path.name)]


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, unless it is there; their names are on disk then."""
    missing = _missing(path)
    there = missing[-1].parent if missing else path
    # whoever made it may have been ended before its name was on disk
    try:
        sync(there.absolute().parent)
    except OSError as error:
        if error.errno not in UNSYNCED:
            raise
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        # its name is itself lost in a crash unless the folder above reaches the disk too
        sync(folder.parent)
    path.mkdir(exist_ok=True)


def _missing(path: Path) -> list[Path]:
    """A folder and those above it that are not there, the topmost last."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_takes_files(folder: Path) -> None:
    """Raise OSError unless a file can be made in a folder; leaves nothing behind."""
    # Permission bits alone do not tell: root, read-only and virtual file systems pass them. A file without a name is
    # gone whenever the process is killed.
    tempfile.TemporaryFile(dir=folder).close()


def check_output(folder: str | Path) -> None:
    """Refuses an output folder that cannot be written or would mix with what is already there; leaves nothing behind.

    Raises:
        ValueError: if ``folder`` exists and is not empty, or it or a folder above it is a file or not writable.
    """
    folder = Path(folder)
    missing = _missing(folder.absolute())
    there = missing[-1].parent if missing else folder.absolute()
    # Told now: after hours of learning it would be too late.
    if not there.is_dir():
        raise ValueError(f"output: expected a folder, got {str(folder)!r}: {str(there)!r} is a file; give another name")
    try:
        check_takes_files(there)
        # an empty folder of that name may be given again
        if missing:
            os.mkdir(missing[-1])
            os.rmdir(missing[-1])
    except OSError as error:
        raise ValueError(f"output: expected a writable folder, got {str(folder)!r}: {error}") from error
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"output: expected a new or empty folder, got {str(folder)!r}, which is not empty; give another"
        )


def write_tensors(tensors: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file; one of that name is replaced only once the new one is safe on disk.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with disk_errors(path):
            save_file(tensors, temporary, metadata=metadata)
        open_to_others(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # The new name is itself lost in a crash unless the folder reaches the disk too.
    sync(path.parent)


def open_to_others(path: str | Path) -> None:
    """Give a file of safetensors, which its owner alone may read, the mode that other new files have."""
    umask = os.umask(0o077)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """What safetensors cannot write, such as to a full disk, is told as an OSError, which its own error is not."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
