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
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor, nn

from .reference import INTEGERS

logger = logging.getLogger(__name__)

# A multiple of every vector width, so that the loop needs no scalar tail: compiling one takes minutes
ROW = 32

# A graph of one row would be another graph than that of many
LEAST_ROWS = 2

# What a graph is laid out for
USUAL_ROWS = 4096

# What it is compared with its function on
SAMPLE_ROWS = 64

# What the compiled code is made from
SOURCES = ("pattern", "philox", "reference", "certain", "graphs", "compiled")

KEPT_SECONDS = 90 * 24 * 3600

# torch's exporter and compiler change settings of the whole process while they run
_making = threading.Lock()

# (dtype, *shape) of tensors
Likes = tuple[tuple, ...]


class Places(NamedTuple):
    """What a function fills: ``count`` words of every group, a tensor [rows, ROW] of the places of each.

    They are of memory of their own, or, ``in_place``, of that of the first tensor, whose groups the function reads.
    """

    dtype: torch.dtype
    count: int
    in_place: bool


class _Bound(nn.Module):
    """``function(*tensors, **constants)``, with the places to fill, if any, by their name.

    Where ``numbered``, the last tensor is the number of the first group, and the function gets the numbers of all
    groups behind the first ``groups`` tensors.
    """

    def __init__(self, function: Callable, groups: int, count: int, numbered: bool, constants: Mapping):
        super().__init__()
        self.function, self.groups, self.count = function, groups, count
        self.numbered, self.constants = numbered, constants

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        groups, rest = list(tensors[: self.groups]), list(tensors[self.groups + self.count :])
        if self.numbered:
            first, rows = rest.pop(), groups[0].shape[0]
            groups.append(first + torch.arange(rows * ROW, device="cpu").view(rows, ROW))
        places = {"places": tensors[self.groups :][: self.count]} if self.count else {}
        results = self.function(*groups, *rest, **places, **self.constants)
        if results is None:
            return ()
        return results if isinstance(results, tuple) else (results,)


class Graph:
    """``function(*groups, *rest, places=places, **constants)`` of tensors of groups [rows, ROW, ...].

    It is called with a list of all these tensors, the places behind those of groups, and compiled or loaded at its
    first call. It checks nothing: what its results depend on is in the key by which ``graph`` keeps it, and in its name
    on disk. Where it cannot be compiled it runs eagerly.

    Args:
        groups: (dtype, *shape of one group) of each tensor of groups.
        rest: (dtype, *shape) of each of the others.
        numbered: whether the groups are consecutive, so that the number of the first one, a 0-dim int64 tensor that
            comes last, stands for the tensor of their numbers, which the function takes behind those of groups.
        places: what the function fills, by the keyword of that name, besides what it returns.
    """

    def __init__(
        self, function: Callable, groups: Likes, rest: Likes, numbered: bool, places: Places | None, constants: Mapping
    ):
        self.whole = _Bound(function, len(groups), places.count if places else 0, numbered, constants)
        self.groups, self.rest = groups, (*rest, (torch.int64,)) if numbered else rest
        self.places = places
        self.run: Callable[[list[Tensor]], Sequence[Tensor]] | None = None
        # native code has one caller at a time, and a second one would wait for the first while it holds the GIL
        self.running = threading.Lock()

    def __call__(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        with self.running:
            if self.run is None:
                with _making:
                    self.run = self._made(tensors)
            return self.run(tensors)

    def _made(self, tensors: list[Tensor]) -> Callable[[list[Tensor]], Sequence[Tensor]]:
        try:
            return self._compiled(tensors)
        except Exception as error:
            # what a compiler, its cache or its settings raise differs from release to release
            first_line = (str(error) or repr(error)).splitlines()[0]
            warnings.warn(f"compilation failed ({first_line}); maskpro_kernels runs eagerly on CPU", stacklevel=4)
            return self._eager

    def _eager(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return self.whole(*tensors)

    def _compiled(self, tensors: list[Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
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
                self._build(path, tensors)
                remove_unused(path.parent)
        return load(path)

    def _digest(self) -> str:
        """Of all that the compiled code depends on."""
        function, constants = self.whole.function, sorted(map(str, self.whole.constants.items()))
        name = (function.__module__, function.__qualname__, constants)
        made_of = (name, self.groups, self.rest, self.whole.numbered, self.places, options())
        return hashlib.sha256(repr((*made_of, torch.__version__, processor(), CODE)).encode()).hexdigest()[:32]

    def _build(self, path: Path, tensors: list[Tensor]) -> None:
        """Compile it, and keep what is found to work on groups like the first of ``tensors``.

        Raises:
            RuntimeError: if it gives other bits than the function.
        """
        rows = torch.export.Dim("rows", min=LEAST_ROWS)
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            # of torch.export, about itself
            warnings.simplefilter("ignore", FutureWarning)
            groups = [_zeros(dtype, USUAL_ROWS, ROW, *shape) for dtype, *shape in self.groups]
            if self.places:
                # each in memory of its own: torch.export would take what they share for a dependence
                words = _zeros(self.places.dtype, USUAL_ROWS, ROW, self.places.count)
                groups += [words.clone()[..., i] for i in range(self.places.count)]
            rest = [_zeros(*like) for like in self.rest]
            shapes = (*[{0: rows}] * len(groups), *[None] * len(rest))
            exported = torch.export.export(self.whole, (*groups, *rest), dynamic_shapes=(shapes,))
            with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
                package = Path(unfinished) / "graph.pt2"
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=os.fspath(package), inductor_configs=dict(options())
                )
                self._check(load(package), tensors)
                os.replace(package, path)

    def _check(self, run: Callable[[list[Tensor]], Sequence[Tensor]], tensors: list[Tensor]) -> None:
        """Raise unless ``run`` does what the function does, bit for bit.

        Compilers may err, and neither inductor nor that of C++ knows that places are of the memory of a tensor which
        is read: that is right as long as a group is read before its places are filled, as it is where all is one loop.
        """
        expected, found = self._sample(tensors), self._sample(tensors)
        results = [*self.whole(*expected), *expected], [*run(list(found)), *found]
        for one, other in zip(*results, strict=True):
            if not _same_bits(one, other):
                raise RuntimeError(f"the graph of {self.whole.function.__name__} differs from the function")

    def _sample(self, tensors: list[Tensor]) -> list[Tensor]:
        """Few groups like ``tensors``: with their integers, for not all may be codes of groups, and any floats."""
        generator = torch.Generator("cpu").manual_seed(0)

        def like(x: Tensor, shape: Sequence[int]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(x.dtype)

        # as far apart as makes some draws certain and leaves others open, and factors that keep them so
        some = torch.arange(SAMPLE_ROWS, device="cpu") % LEAST_ROWS
        groups = [
            16.0 * like(x, (SAMPLE_ROWS, *x.shape[1:])) if x.is_floating_point() else x[some]
            for x in tensors[: len(self.groups)]
        ]
        rest = [
            1.0 + like(x, x.shape).abs() if x.is_floating_point() else x.clone()
            for x in tensors[len(tensors) - len(self.rest) :]
        ]
        if self.places is None:
            return [*groups, *rest]
        words = _zeros(self.places.dtype, SAMPLE_ROWS, ROW, self.places.count)
        if self.places.in_place:
            words = groups[0].view(self.places.dtype)
        return [*groups, *words.unbind(-1), *rest]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits, but for those of a NaN, which no operation promises."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    nan = one.isnan()
    bits = [x.masked_fill(nan, 0.0).view(INTEGERS[x.itemsize]) for x in (one, other)]
    return torch.equal(nan, other.isnan()) and torch.equal(*bits)


def _zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


@functools.cache
def options() -> dict[str, object]:
    """How graphs are compiled."""
    # here, for it brings all of inductor
    from torch._inductor import config as inductor_config

    chosen = {
        # With the heuristics inductor falls back to scalar code for the strided reads of a group
        "cpp.enable_tiling_heuristics": False,
        # What is left out of a loop goes through memory: twice the time for an update of 4:8. And places that are
        # filled in one loop must not be read in the next
        "max_fusion_size": 1024,
        # Rows have no tail: writing one for vectors, which no loop would hold, takes a tenth of the compilation
        "cpp.enable_loop_tail_vec": False,
        # Bits must not depend on a user's settings
        "cpp.enable_floating_point_contract_flag": "off",
        "cpp.enable_unsafe_math_opt_flag": False,
        "cpp.simdlen": None,
        # Else the number of threads where it was compiled would decide how all later ones run
        "cpp.dynamic_threads": True,
    }
    # torch before 2.13 has no such setting
    if hasattr(inductor_config.cpp, "march") and torch.backends.cpu.get_cpu_capability() == "AVX512":
        # GCC prefers half of such a register where it copies one, and what was written by halves cannot be read as a
        # whole until it has come to the cache: a fifth of an update's loop
        chosen["cpp.march"] = "native -mprefer-vector-width=512"
    return chosen


@functools.cache
def graph(
    function: Callable,
    groups: Likes,
    rest: Likes,
    numbered: bool,
    places: Places | None = None,
    **constants: int | torch.dtype,
) -> Graph:
    """The graph of ``function`` with those constants, for tensors like those."""
    return Graph(function, groups, rest, numbered, places, constants)


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
