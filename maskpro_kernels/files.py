"""Files that are seen as a whole or not at all, also after a crash; folders to write to; the files of a checkpoint.

And digests, by which files, tensors and records are recognised.
"""

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

# Of a digest: BLAKE2b without a key finds damage and what was mixed up, not one who means to deceive
SIZE = 16
# Of a checkpoint
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is seen as a whole or not at all, also after a crash; of several writers the last one's."""
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file; one of that name is replaced only once the new one is safe on disk."""
    with _replacing(Path(path)) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            # such as of a full disk
            raise OSError(f"{path}: {error}") from error
        # safetensors lets its owner alone read a file; others get what other new files have
        umask = os.umask(0o077)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which takes the place of ``path`` once it is on disk."""
    temporary = _temporary(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # the new name is itself lost in a crash unless the folder reaches the disk too
    sync(path.parent)


def append_whole(path: Path, content: bytes) -> None:
    """Add bytes to a file, which is made if missing: all of them, or where that fails none, with an OSError."""
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
    """Parts of files and folders, of the names that a regular expression says, that a killed process has left."""
    part = re.compile(rf"({name})(\.[0-9a-f]{{16}}\.tmp)+")
    return [path for path in folder.glob("*") if part.fullmatch(path.name)]


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, unless it is there; their names are on disk then."""
    missing = _missing(path)
    # whoever made the folder that is there may have been ended before its name was on disk
    try:
        sync((missing[-1].parent if missing else path).absolute().parent)
    except OSError as error:
        # of a folder that is not ours, or a file system without a sync
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
    path.mkdir(exist_ok=True)


def _missing(path: Path) -> list[Path]:
    """A folder and those above it that are not there, the topmost last."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_takes_files(folder: Path) -> None:
    """Raise OSError unless a file can be made in a folder; leaves nothing behind."""
    # permission bits are not enough: root, read-only and virtual file systems pass them; a file without a name is
    # gone whenever the process is killed
    tempfile.TemporaryFile(dir=folder).close()


def check_output(folder: str | Path) -> None:
    """Raise ValueError unless an output folder can be written and holds nothing; leave nothing behind."""
    folder = Path(folder)
    missing = _missing(folder.absolute())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_takes_files(folder)
    except OSError as error:
        raise ValueError(f"output: expected a writable folder, got {str(folder)!r}: {error}") from error
    finally:
        for made in missing:
            with suppress(OSError):
                made.rmdir()
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"output: expected a new or empty folder, got {str(folder)!r}, which is not empty; give another"
        )


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint; ValueError if there are none, or one of them is damaged."""
    folder = Path(folder)
    files = [folder] if folder.suffix == ".safetensors" else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"checkpoint: expected a folder with safetensors files, got {str(folder)!r}")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"checkpoint: expected a whole safetensors file, got {str(file)!r}: {error}; copy or download it again"
            ) from error
    return files


def named_files(folder: Path) -> list[Path]:
    """The files that ``from_pretrained`` loads: the single one, else those that a checked index names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []
    try:
        names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"it names {missing[0]}, which is not there")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"checkpoint: expected a sound {INDEX} in {str(folder)!r}, got {error!r}; copy or download it again"
        ) from error
    return [folder / name for name in names]


def digest_of_bytes(*parts: bytes) -> bytes:
    """The digest of bytes, one part behind the other."""
    whole = hashlib.blake2b(digest_size=SIZE)
    for part in parts:
        whole.update(part)
    return whole.digest()


def digest(tensors: Iterable[Tensor]) -> str:
    """The digest of the shapes, dtypes and bytes of tensors, in their order.

    To DTensors all ranks of their mesh have to come. One after the other is gathered; the digest is that of whole
    tensors, whatever the mesh.
    """
    whole = hashlib.blake2b(digest_size=SIZE)
    for tensor in tensors:
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.detach().full_tensor()
        whole.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        plain = tensor.detach().cpu().contiguous()
        # the bytes where they lie; not by ``numpy``: FSDP2 could free no memory that has been given to it
        whole.update(memoryview((ctypes.c_ubyte * plain.nbytes).from_address(plain.data_ptr())))
    return whole.hexdigest()


def digest_of_named(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """The digest of tensors and the strings beside them: names, shapes, dtypes, bytes and metadata, in sorted order."""
    parts = [[name, digest([tensors[name]])] for name in sorted(tensors)]
    # JSON marks where a name ends
    return digest_of_bytes(json.dumps([parts, sorted((metadata or {}).items())]).encode()).hex()
