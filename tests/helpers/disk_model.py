"""States of a folder after a power cut: a model of its disk.

The content of a file is sure to be there once the file was synced, and its name once its folder was. All else may be
there, in part, or not at all. The model reads the real folder: it cannot miss what is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

# Bytes that a disk writes as a whole
SECTOR = 512

# The bytes of each file below the folder, None for a folder, by path
Tree = dict[str, bytes | None]


class File:
    """The content of a file: for processes, before the last write, and surely on disk."""

    def __init__(self):
        self.content = self.before = self.synced = b""
        # bytes that a sync has failed to write: no later one does, since the kernel takes them for written
        self.lost: set[int] = set()

    def write(self, content: bytes) -> None:
        """Take over what a process has made of it."""
        self.before, self.content = self.content, content
        begin, end = _written(self.before, content)
        self.lost = {at for at in self.lost if at < len(content) and not begin <= at < end}

    def sync(self) -> None:
        on_disk = bytearray(self.content)
        for at in self.lost:
            on_disk[at] = self.synced[at] if at < len(self.synced) else 0
        self.before, self.synced = self.content, bytes(on_disk)

    def fail(self) -> None:
        """A sync that fails."""
        self.lost |= {at for at, byte in enumerate(self.content) if self.synced[at : at + 1] != bytes([byte])}

    def zeros(self) -> bytes:
        """Its length has reached the disk, and nothing that was written."""
        return self.synced[: len(self.content)].ljust(len(self.content), b"\0")

    def torn(self) -> Iterator[bytes]:
        """The last write without its sectors before or after a bound."""
        begin, end = _written(self.before, self.content)
        bounds = range((begin // SECTOR + 1) * SECTOR, end, SECTOR)
        # of a long write some, evenly
        for bound in bounds[:: len(bounds) // 8 + 1]:
            yield self.content[:bound] + self.before[bound:]
            yield self.content[:begin] + self.before[begin:bound].ljust(bound - begin, b"\0") + self.content[bound:]


def _written(before: bytes, content: bytes) -> tuple[int, int]:
    """Begin and end of what differs; the end is not above the begin where bytes were cut off alone."""
    begin = len(os.path.commonprefix([before, content]))
    if len(before) != len(content):
        return begin, len(content)
    return begin, len(content) - len(os.path.commonprefix([before[begin:][::-1], content[begin:][::-1]]))


class Folder:
    """The names in a folder, and those that are on disk for sure."""

    def __init__(self):
        self.names: dict[str, File | Folder] = {}
        self.synced: dict[str, File | Folder] = {}


class Disk:
    """The disk of a folder, whose first content is surely on disk."""

    def __init__(self, root: Path):
        self.root, self.folder = root, Folder()
        self._nodes: dict[int, File | Folder] = {}
        # names that were set, or removed by None, and whose folder was not synced since
        self._changes: list[tuple[Folder, dict[str, File | Folder | None]]] = []
        self._last_written: File | None = None
        self.observe()
        for node in self._nodes.values():
            self.sync(node)

    def node(self, descriptor: int) -> File | Folder | None:
        """Model of an open file."""
        return self._nodes.get(os.fstat(descriptor).st_ino)

    def observe(self) -> bool:
        """Apply changes of the real folder; return whether there were any."""
        seen: dict[int, File | Folder] = {self.root.stat().st_ino: self.folder}
        changed = self._observe(self.folder, self.root, seen)
        self._nodes = seen
        return changed

    def _observe(self, folder: Folder, path: str | Path, seen: dict[int, File | Folder]) -> bool:
        names, changed = {}, False
        with os.scandir(path) as entries:
            for entry in entries:
                number, kind = entry.stat(follow_symlinks=False).st_ino, Folder if entry.is_dir() else File
                node = seen.get(number, self._nodes.get(number))
                node = names[entry.name] = seen[number] = node if isinstance(node, kind) else kind()
                if kind is Folder:
                    changed |= self._observe(node, entry.path, seen)
                elif (content := Path(entry.path).read_bytes()) != node.content:
                    node.write(content)
                    self._last_written, changed = node, True
        # by one operation: all of it reaches the disk, or nothing
        change = {
            name: names.get(name) for name in {*folder.names, *names} if folder.names.get(name) is not names.get(name)
        }
        if change:
            self._changes.append((folder, change))
            folder.names = names
        return changed or bool(change)

    def sync(self, node: File | Folder) -> None:
        """Sync a file or a folder."""
        if isinstance(node, File):
            node.sync()
            return
        for folder, change in self._changes:
            if folder is node:
                _apply(change, node.synced)
        self._changes = [one for one in self._changes if one[0] is not node]

    def states(self) -> Iterator[tuple[str, Tree]]:
        """(cause, state after a power cut); some more than once.

        Of the names that were not synced none are there, or the first ones, or one alone; of what was written and not
        synced all or nothing, or zeros in its place, or a part of the last write.
        """
        for names, there in self._names():
            for contents, content_of in self._contents():
                yield f"{names}, {contents}", dict(self._walk(self.folder, "", there, content_of))

    def _names(self) -> Iterator[tuple[str, Collection[int]]]:
        count = len(self._changes)
        for number in range(count + 1):
            yield f"{number} of {count} names", range(number)
        for index in range(1, count):
            yield f"name {index + 1} of {count}", (index,)

    def _contents(self) -> Iterator[tuple[str, Callable[[File], bytes]]]:
        yield "synced content", lambda file: file.synced
        yield "all content", lambda file: file.content
        yield "zeros", File.zeros
        last = self._last_written
        for number, torn in enumerate(last.torn() if last is not None else ()):
            yield f"torn write {number}", lambda file, torn=torn: torn if file is last else file.content

    def _walk(
        self, folder: Folder, path: str, there: Collection[int], content_of: Callable[[File], bytes]
    ) -> Iterator[tuple[str, bytes | None]]:
        names = dict(folder.synced)
        for index in there:
            changed, change = self._changes[index]
            if changed is folder:
                _apply(change, names)
        for name, node in names.items():
            if isinstance(node, File):
                yield path + name, content_of(node)
            else:
                yield path + name, None
                yield from self._walk(node, f"{path}{name}/", there, content_of)


def _apply(change: dict[str, File | Folder | None], names: dict[str, File | Folder]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def put(tree: Tree, folder: Path) -> None:
    """Write what a power cut has left into a new folder."""
    folder.mkdir()
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
