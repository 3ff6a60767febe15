"""Disks of tests: what is surely on them, and one that fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path


class SyncedDisk:
    """What a power cut cannot take: files and names in folders as they were at their last sync.

    Kills do not show it, since the system writes what a killed process has left in memory. From its start on a file
    must be synced before it replaces an older one.

    Attributes:
        contents: bytes of a file, or inodes of a folder by name, at the last sync, by inode.
    """

    def __init__(self, monkeypatch):
        self.contents: dict[int, bytes | dict[str, int]] = {}
        fsync, replace = os.fsync, os.replace

        def synced(descriptor) -> None:
            fsync(descriptor)
            self.contents[os.fstat(descriptor).st_ino] = content(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

        def replaced(source, target) -> None:
            if os.path.exists(target):
                assert self.contents.get(os.stat(source).st_ino) == content(Path(source)), f"{source} is not synced"
            replace(source, target)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", replaced)

    def check(self, path: Path) -> None:
        """Assert that a file and its name, or the name of a folder, are on disk."""
        inode = path.stat().st_ino
        if path.is_file():
            assert self.contents.get(inode) == content(path), f"{path} is not synced"
        names = self.contents.get(path.parent.stat().st_ino, {})
        assert names.get(path.name) == inode, f"the name of {path} is not synced"


def content(path: Path) -> bytes | dict[str, int]:
    if path.is_file():
        return path.read_bytes()
    return {entry.name: entry.inode() for entry in os.scandir(path)}


class FailingDisk:
    """An operation of ``os`` that fails once.

    Attributes:
        has_failed: whether there were so many calls.
    """

    def __init__(self, monkeypatch, operation: str, number: int):
        self.has_failed = False
        calls, call = 0, getattr(os, operation)

        def failing(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls - 1 == number:
                self.has_failed = True
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*arguments, **keywords)

        monkeypatch.setattr(os, operation, failing)
