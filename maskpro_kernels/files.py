"""Atomic files: other processes see a file whole or not at all, also after a crash. Folders, checkpoints, digests."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# Bytes of a digest. BLAKE2b without a key detects damage and mix-ups, not deliberate forgery
SIZE = 16
# File names of a checkpoint
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, also across a crash; of several writers the last one wins."""
    temporary = _temporary(path)
    with naming_path(path):
        try:
            temporary.write_bytes(content)
            _replace(path, temporary)
        finally:
            temporary.unlink(missing_ok=True)


def write_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file; an existing file is replaced only once the new one is on disk."""
    path = Path(path)
    with naming_path(path), folder_aside(path) as folder:
        temporary = folder / path.name
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            # such as of a full disk
            raise OSError(f"{path}: {error}") from error
        make_readable(temporary)
        _replace(path, temporary)


def make_readable(path: Path) -> None:
    """Give a file of safetensors, which only its owner can read, the mode of other new files."""
    umask = os.umask(0o077)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def _replace(path: Path, temporary: Path) -> None:
    """Move a complete file to its name once it is on disk."""
    sync(temporary)
    os.replace(temporary, path)
    # without a sync of the folder, a crash may lose the new name
    sync(path.parent)


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path`` for its parts, and remove it afterwards; ``unfinished`` lists it after a kill.

    Libraries that write files under temporary names of their own write them there.
    """
    folder = _temporary(path)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Add a path to errors of the system that name none, such as those of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_record(path: Path, content: Mapping) -> None:
    """Write JSON with its digest for ``read_record``, as ``write_whole`` does."""
    write_whole(path, json.dumps({**content, "digest": _digest_of_record(content)}, indent=1).encode())


def read_record(path: Path) -> dict:
    """Read a file of ``write_record``; ValueError if it is damaged, OSError if it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
        intact = content.pop("digest") == _digest_of_record(content)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(f"expected {str(path)!r} as it was written, got a damaged file; restore it from a copy")
    return content


def _digest_of_record(content: Mapping) -> str:
    return digest_of_bytes(json.dumps(content, sort_keys=True).encode()).hex()


def append_whole(path: Path, content: bytes) -> None:
    """Append bytes to a file, made if missing: all of them, or none and an OSError."""
    with naming_path(path), open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            if file.write(content) != len(content):
                raise OSError(f"{path}: the disk took only a part")
        except BaseException:
            # after an interrupt too: a later append must not follow half a record
            os.ftruncate(file.fileno(), before)
            raise


def _temporary(path: Path) -> Path:
    # a unique name, so that one writer cannot remove the file of another
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


def discard(path: Path) -> None:
    """Remove a file or a folder with its content atomically."""
    if not path.is_dir():
        path.unlink()
        return
    aside = _temporary(path)
    path.rename(aside)
    shutil.rmtree(aside)


def unfinished(folder: Path, name: str = ".+") -> list[Path]:
    """Unfinished files and folders of a killed process whose names match a regular expression."""
    part = re.compile(rf"({name})(\.[0-9a-f]{{16}}\.tmp)+")
    return [path for path in folder.glob("*") if part.fullmatch(path.name)]


def make_folder(path: Path) -> None:
    """Make a folder and its parents if missing, with their names on disk."""
    missing = _missing(path)
    # a process that made an existing folder may have died before its name was on disk
    try:
        sync((missing[-1].parent if missing else path).absolute().parent)
    except OSError as error:
        # a folder of another user, or a file system without sync
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
    path.mkdir(exist_ok=True)


def _missing(path: Path) -> list[Path]:
    """Missing folders among a folder and its parents, the topmost last."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_takes_files(folder: Path) -> None:
    """Raise OSError unless a file can be made in a folder; leave no file there."""
    # permission bits are not enough: root, read-only and virtual file systems pass them. A file without a name vanishes
    # even if the process is killed
    tempfile.TemporaryFile(dir=folder).close()


def check_output(folder: str | Path) -> None:
    """Raise ValueError unless an output folder is writable and empty or missing; leave no file there."""
    folder = Path(folder)
    missing = []
    try:
        missing = _missing(folder.absolute())
        folder.mkdir(parents=True, exist_ok=True)
        check_takes_files(folder)
    except OSError as error:
        raise ValueError(f"output: expected a writable folder, got {str(folder)!r}: {error}") from error
    finally:
        for created in missing:
            with suppress(OSError):
                created.rmdir()
    if folder.exists() and set(folder.iterdir()) - set(unfinished(folder)):
        raise ValueError(
            f"output: expected a new or empty folder, got {str(folder)!r}, which is not empty; give another"
        )


def weight_files(folder: str | Path) -> list[Path]:
    """List the safetensors files of a checkpoint; ValueError if there are none, one is damaged, or one is not there."""
    folder = Path(folder)
    files = [folder] if folder.suffix == ".safetensors" else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"checkpoint: expected a folder with safetensors files, got {str(folder)!r}")
    if (folder / INDEX).is_file() and not (folder / SINGLE).exists():
        names = {file.name for file in files}
        shards = read_object(folder / INDEX).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else [shards]:
            if not isinstance(shard, str) or shard not in names:
                raise ValueError(
                    f"checkpoint: expected an index of files in {str(folder)!r}, got {shard!r}, which is not there; "
                    "copy or download it again"
                )
    for file in files:
        # a pipe would block forever
        if not file.is_file():
            raise ValueError(f"checkpoint: expected regular files, got {str(file)!r}")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"checkpoint: expected a whole safetensors file, got {str(file)!r}: {error}; copy or download it again"
            ) from error
    return files


def read_object(path: Path) -> dict:
    """Read a JSON object from a file of a checkpoint; ValueError for other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint: expected a JSON object in {str(path)!r}, got other content: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint: expected a JSON object in {str(path)!r}, got a {type(content).__name__}")
    return content


def digest_of_bytes(*parts: bytes) -> bytes:
    """Digest of concatenated bytes."""
    whole = hashlib.blake2b(digest_size=SIZE)
    for part in parts:
        whole.update(part)
    return whole.digest()


def digest(tensors: Iterable[Tensor]) -> str:
    """Digest of the shapes, dtypes and bytes of tensors, in order.

    For DTensors all ranks of the mesh must call it. It gathers one tensor at a time, so the digest is that of whole
    tensors on any mesh.
    """
    whole = hashlib.blake2b(digest_size=SIZE)
    for tensor in tensors:
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.detach().full_tensor()
        whole.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        plain = tensor.detach().cpu().contiguous()
        # reads the memory directly; not by ``numpy``, which would keep FSDP2 from freeing it
        whole.update(memoryview((ctypes.c_ubyte * plain.nbytes).from_address(plain.data_ptr())))
    return whole.hexdigest()


def digest_of_named(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Digest of tensors and metadata: names, shapes, dtypes, bytes and strings, sorted by name."""
    digests = [[name, digest([tensors[name]])] for name in sorted(tensors)]
    # JSON delimits the names
    return digest_of_bytes(json.dumps([digests, sorted((metadata or {}).items())]).encode()).hex()
