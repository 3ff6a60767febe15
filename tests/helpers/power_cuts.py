"""Power cuts and disk errors at each operation that a process does on the files of a folder."""

from __future__ import annotations

import builtins
import gc
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.disk_model import Disk, File, Tree
from maskpro_kernels import files

# Operations of a file that is open, and of paths
OF_FILES = ("write", "pwrite", "writev", "pwritev", "ftruncate")
OF_PATHS = ("open", "truncate", "rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir")

# Of nothing that a run has reported
NOTHING = -1


class Kill(BaseException):
    """The process is killed: later actions, such as cleaning up, do not change its files."""


@dataclass
class State:
    """State after a power cut.

    Attributes:
        tree: of the folder.
        how: its first cause.
        acknowledged: the most steps that the run has reported before a cut with this state; ``NOTHING`` before its
            begin is reported.
    """

    tree: Tree
    how: str
    acknowledged: int


class Watched:
    """While it is entered, an operation of this process on the files below a folder is a point to cut the power at.

    Files of Python, the functions of ``os`` and what safetensors writes are watched. Before each operation the folder
    has to be as the one before has left it: what is written past them is found.

    Args:
        root: of the files.
        ignored: of which files or folders a sync is without effect, as if the program did not ask for it.
        error: (operation, path) -> what it fails with instead; None: it does not. A write that fails has written a
            half; after a sync that fails no later one writes the same. ``Kill`` lasts until ``revive``.
        unseen: whether other code may write, which is then taken to do so in one operation with the next one.

    Attributes:
        cuts: how many operations there were that change something.
        states: what the cuts after them leave, by content.
        acknowledged: how many steps the run has reported as done.
    """

    def __init__(
        self,
        root: Path,
        ignored: Callable[[Path], bool] = lambda _: False,
        error: Callable[[str, Path], OSError | Kill | None] = lambda *_: None,
        unseen: bool = False,
    ):
        self.root, self.ignored, self.error, self.unseen = root, ignored, error, unseen
        self.disk = Disk(root)
        self.cuts = 0
        self.acknowledged = NOTHING
        self.states: dict[tuple, State] = {}
        self.dead = False
        self._depth = 0
        self._patched = pytest.MonkeyPatch()

    def acknowledge(self, steps: int) -> None:
        """From here on no power cut may lose one of these steps."""
        if steps > self.acknowledged:
            self.acknowledged = steps
            self._collect("reported")

    def revive(self) -> None:
        """From here on it is another process, after one that was killed: nothing but its states counts."""
        # files that the dead one has not closed are to be closed by it
        gc.collect()
        self.dead = False
        self.states.clear()

    def __enter__(self) -> Watched:
        self._collect("begin")
        real_open = builtins.open
        for module in (builtins, io):
            self._patched.setattr(module, "open", lambda *args, **how: self._open(real_open, *args, **how))
        for name in OF_FILES:
            self._patched.setattr(os, name, self._of_file(name, getattr(os, name)))
        for name in OF_PATHS:
            self._patched.setattr(os, name, self._of_path(name, getattr(os, name)))
        for name in ("fsync", "fdatasync"):
            self._patched.setattr(os, name, self._sync)
        save = files.save_file
        self._patched.setattr(
            files, "save_file", lambda *args, **how: self._call("save_file", Path(args[1]), lambda: save(*args, **how))
        )
        return self

    def __exit__(self, *_) -> None:
        self._patched.undo()
        self._check()

    def _check(self) -> None:
        if self.disk.observe():
            assert self.unseen, f"{self.root}: something was written past what is watched"
            self._collect("unseen")

    def _collect(self, operation: str) -> None:
        for how, tree in self.disk.states():
            key = tuple(sorted(tree.items()))
            reported = f"cut {self.cuts} after {operation}: {how}"
            state = self.states.setdefault(key, State(tree, reported, self.acknowledged))
            state.acknowledged = max(state.acknowledged, self.acknowledged)

    def _call(self, name: str, path: Path, call: Callable, half: Callable = lambda: None):
        """Do an operation, which may fail by ``error``; ``half`` of it is done then."""
        if self._depth:
            return call()
        self._check()
        self._depth += 1
        try:
            error = self._error(name, path)
            if error is not None:
                if not self.dead:
                    half()
                raise error
            return call()
        finally:
            self._depth -= 1
            if self.disk.observe():
                self.cuts += 1
                self._collect(f"{name} {path.name}")

    def _error(self, name: str, path: Path) -> OSError | Kill | None:
        error = Kill() if self.dead else self.error(name, path)
        self.dead = isinstance(error, Kill)
        return error

    def _below(self, path) -> bool:
        return not isinstance(path, int) and self.root in Path(os.path.abspath(os.fsdecode(path))).parents

    def _of_path(self, name: str, real: Callable) -> Callable:
        def call(path, *args, **how):
            # relative to an open folder: wherever it is
            if self._below(path) or how.get("dir_fd") is not None:
                return self._call(name, Path(os.fsdecode(path)), lambda: real(path, *args, **how))
            return real(path, *args, **how)

        return call

    def _of_file(self, name: str, real: Callable) -> Callable:
        def call(descriptor, *args, **how):
            if self.disk.node(descriptor) is None:
                return real(descriptor, *args, **how)
            return self._call(name, path_of(descriptor), lambda: real(descriptor, *args, **how))

        return call

    def _sync(self, file) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        node, path = self.disk.node(descriptor), path_of(descriptor)
        if node is None or self.ignored(path):
            return
        self._check()
        error = self._error("fsync", path)
        if error is not None:
            if isinstance(node, File) and not self.dead:
                node.fail()
            raise error
        self.disk.sync(node)
        self.cuts += 1
        self._collect(f"fsync {path.name}")

    def _open(self, real, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True,
              opener=None):  # fmt: skip
        # one with an opener has no name, and leaves nothing
        if opener is not None or not self._below(file) or not set(mode) & set("wax+"):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = WatchedFile(self, file, mode)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)


class WatchedFile(io.FileIO):
    """A file whose writes are operations."""

    def __init__(self, watched: Watched, path, mode: str):
        self._watched, self._path = watched, Path(os.fsdecode(path))
        mode = "".join(sorted(set(mode) - set("bt")))
        watched._call("open", self._path, lambda: super(WatchedFile, self).__init__(path, mode))

    def write(self, data) -> int:
        if self._watched.dead:
            # a buffer that is given up
            return len(data)
        write = super().write
        return self._watched._call("write", self._path, lambda: write(data), lambda: write(data[: len(data) // 2]))

    def truncate(self, size=None) -> int:
        truncate = super().truncate
        return self._watched._call("ftruncate", self._path, lambda: truncate(size))

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        if not self._watched.dead:
            self._watched._call("close", self._path, lambda: None)


def path_of(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))


class Failing:
    """An ``error`` for ``Watched``: one operation fails, or all from it on.

    Args:
        what: the number of an error, None: the process is killed.
        operation: its name; None: any.
        number: which of that name, counted from 0.
        lasting: whether all that come after it fail, too.

    Attributes:
        came: whether it has been.
    """

    def __init__(self, what: int | None, operation: str | None, number: int, lasting: bool = False):
        self.what, self.operation, self.number, self.lasting = what, operation, number, lasting
        self._seen, self.came = 0, False

    def __call__(self, name: str, path: Path) -> OSError | Kill | None:
        if self.operation not in (None, name):
            return None
        self._seen += 1
        now = self._seen - 1 == self.number or self.lasting and self.came
        self.came |= now
        if not now:
            return None
        return Kill() if self.what is None else OSError(self.what, os.strerror(self.what))
