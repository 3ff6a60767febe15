"""Functions of groups as native code: compiled by torch's inductor once, kept on disk, loaded by later processes.

One graph serves all shapes: it takes tensors of groups in rows of ``ROW``, any number of rows. It is compiled ahead of
time (AOTInductor), so that a call costs microseconds and a process that finds it on disk traces and compiles nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shutil
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# A multiple of every vector width, so that the loop needs no scalar tail: compiling one takes minutes
ROW = 32

# A graph of one row would be another graph than that of many
LEAST_ROWS = 2

# What a graph is laid out for
USUAL_ROWS = 4096

OPTIONS = {
    # With the heuristics inductor falls back to scalar code for the strided reads of a group
    "cpp.enable_tiling_heuristics": False,
    # Bits must not depend on a user's settings
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
    "cpp.simdlen": None,
    # Else the number of threads where it was compiled would decide how all later ones run
    "cpp.dynamic_threads": True,
}

# What the compiled code is made from
SOURCES = ("pattern", "philox", "reference", "certain", "graphs", "compiled")

KEPT_SECONDS = 90 * 24 * 3600

# torch's exporter and compiler change settings of the whole process while they run
_making = threading.Lock()

# (dtype, *shape) of tensors
Likes = tuple[tuple, ...]


class _Bound(nn.Module):
    """``function(*tensors, **constants)``; where ``numbered``, the tensor behind the others is the number of the first
    group, and the function gets the numbers of all groups behind the first ``groups`` tensors.
    """

    def __init__(self, function: Callable, groups: int, numbered: bool, constants: Mapping):
        super().__init__()
        self.function, self.groups, self.numbered, self.constants = function, groups, numbered, constants

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.numbered:
            *tensors, first = tensors
            rows = tensors[0].shape[0]
            tensors.insert(self.groups, first + torch.arange(rows * ROW, device="cpu").view(rows, ROW))
        results = self.function(*tensors, **self.constants)
        return results if isinstance(results, tuple) else (results,)


class Graph:
    """``function(*groups, *rest, **constants)`` of tensors of groups [rows, ROW, ...], called with a list of them all.

    The function may change the tensors of groups.

    It is compiled or loaded at its first call. It checks nothing: what its results depend on is in the key by which
    ``graph`` keeps it, and in its name on disk. Where it cannot be compiled it runs eagerly.

    Args:
        groups: (dtype, *shape of one group) of each tensor of groups.
        rest: (dtype, *shape) of each of the others.
        numbered: whether the groups are consecutive, so that the number of the first one, a 0-dim int64 tensor that
            comes last, stands for the tensor of their numbers, which the function takes behind those of groups.
    """

    def __init__(self, function: Callable, groups: Likes, rest: Likes, numbered: bool, constants: Mapping):
        self.whole = _Bound(function, len(groups), numbered, constants)
        self.groups, self.rest = groups, (*rest, (torch.int64,)) if numbered else rest
        self.run: Callable[[list[Tensor]], Sequence[Tensor]] | None = None

    def __call__(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        if self.run is None:
            with _making:
                if self.run is None:
                    self.run = self._made()
        return self.run(tensors)

    def _made(self) -> Callable[[list[Tensor]], Sequence[Tensor]]:
        try:
            return self._compiled()
        except Exception as error:
            # what a compiler, its cache or its settings raise differs from release to release
            first_line = (str(error) or repr(error)).splitlines()[0]
            warnings.warn(f"compilation failed ({first_line}); maskpro_kernels runs eagerly on CPU", stacklevel=4)
            return self._eager

    def _eager(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        return self.whole(*tensors)

    def _compiled(self) -> Callable[[list[Tensor]], list[Tensor]]:
        path = cache_folder() / f"{self.whole.function.__name__.strip('_')}-{self._digest()}.pt2"
        # the folder may be deleted at any time
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = path.with_suffix(".lock")
        with FileLock(lock):
            # a lock that others wait for is not to be removed
            os.utime(lock)
            if intact(path):
                os.utime(path)
            else:
                logger.info(
                    "compiling %s: once, it is kept in %s", self.whole.function.__name__.strip("_"), path.parent
                )
                self._build(path)
                remove_unused(path.parent)
        return load(path)

    def _digest(self) -> str:
        """Of all that the compiled code depends on."""
        function, constants = self.whole.function, sorted(map(str, self.whole.constants.items()))
        name = (function.__module__, function.__qualname__, constants)
        made_of = (name, self.groups, self.rest, self.whole.numbered, OPTIONS, torch.__version__, processor(), CODE)
        return hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]

    def _build(self, path: Path) -> None:
        rows = torch.export.Dim("rows", min=LEAST_ROWS)
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            # of torch.export, about itself
            warnings.simplefilter("ignore", FutureWarning)
            groups = [torch.zeros(USUAL_ROWS, ROW, *shape, dtype=dtype, device="cpu") for dtype, *shape in self.groups]
            rest = [torch.zeros(shape, dtype=dtype, device="cpu") for dtype, *shape in self.rest]
            shapes = (*[{0: rows}] * len(groups), *[None] * len(rest))
            exported = torch.export.export(self.whole, (*groups, *rest), dynamic_shapes=(shapes,))
            with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
                package = os.path.join(unfinished, "graph.pt2")
                torch._inductor.aoti_compile_and_package(exported, package_path=package, inductor_configs=dict(OPTIONS))
                os.replace(package, path)


@functools.cache
def graph(function: Callable, groups: Likes, rest: Likes, numbered: bool, **constants: int | torch.dtype) -> Graph:
    """The graph of ``function`` with those constants, for tensors like those."""
    return Graph(function, groups, rest, numbered, constants)


def load(path: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    """The graph of a file, which takes all tensors in a list and empties it."""
    # what its own call adds, parsing its signature anew, costs as much as a small layer
    return torch._inductor.aoti_load_package(os.fspath(path)).loader.boxed_run


def intact(path: Path) -> bool:
    """Whether a graph's file is there and whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:
        # by where the damage is: errors of zipfile, zlib and struct, of encryption and unknown compression
        return False


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
def cache_folder() -> Path:
    """Where graphs are kept: ``maskpro_kernels`` in ``$XDG_CACHE_HOME`` or ``~/.cache`` if nobody else may write there,
    for what lies there is run; else a folder of this process.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "maskpro_kernels"
    try:
        if folder.is_absolute():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
            if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
                return folder
    except OSError:
        pass
    return Path(_of_this_process().name)


@functools.cache
def _of_this_process() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="maskpro_kernels-")


@functools.cache
def processor() -> str:
    """What native code may use here: a cache may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {line.split(":")[0].strip(): line for line in lines if ":" in line}
    model = [fields[name] for name in ("model name", "flags", "Features") if name in fields]
    return " ".join([platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability(), *model])


def sources() -> str:
    """Digest of what graphs are compiled from."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


# Now, for a file may be edited before the first graph is compiled from what this process has loaded
CODE = sources()
