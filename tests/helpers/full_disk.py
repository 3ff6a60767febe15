"""A disk without space."""

from __future__ import annotations

import resource
from contextlib import contextmanager


@contextmanager
def files_of_at_most(size):
    """A disk that is full, for files: none grows beyond that many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
