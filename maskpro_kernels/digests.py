"""Digests: by what files, tensors and records are recognised, and what each digest covers.

All are BLAKE2b without a key, of 16 bytes. They find damage and things that were mixed up. They do not find one who
means to deceive: whoever can write a file can write its digest too.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Iterable, Mapping

from torch import Tensor

SIZE = 16


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
    """The digest of tensors with the strings beside them: names, shapes, dtypes, bytes and metadata, in sorted order.

    Args:
        tensors: by name. Two of one shape that change places give another digest.
        metadata: strings by name.
    """
    parts = [[name, digest([tensors[name]])] for name in sorted(tensors)]
    # JSON marks where a name ends
    return digest_of_bytes(json.dumps([parts, sorted((metadata or {}).items())]).encode()).hex()
