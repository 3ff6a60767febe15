"""Functions of groups as native code: compiled once, kept on disk, loaded by later processes.

One graph serves any number of groups. A call costs microseconds, and a process that finds it on disk traces and
compiles nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor, nn

from .reference import INTEGERS

logger = logging.getLogger(__name__)

# Groups that a function is traced with: as many columns no group has
TRACED = 7

# What a graph is compared with its function on: more than a vector holds, and no multiple of one
SAMPLE = 2_003

# Fewest groups that threads share
LEAST_SHARED = 1 << 14

# What the compiled code is made from
SOURCES = ("pattern", "philox", "reference", "certain", "graphs", "native", "compiled")

KEPT_SECONDS = 90 * 24 * 3600

# torch's tracer changes settings of the whole process while it runs
_making = threading.Lock()

# (dtype, *shape) of tensors
Likes = tuple[tuple, ...]


class Places(NamedTuple):
    """What a function fills: ``count`` columns of every group of a tensor [groups, count].

    It is one of its own, or, ``in_place``, the first tensor, whose groups the function reads before.
    """

    dtype: torch.dtype
    count: int
    in_place: bool


class _Bound(nn.Module):
    """``function(*tensors, **constants)``, with the columns to fill, if any, by the keyword ``places``.

    Where ``numbered``, the last tensor is the number of the first group, and the function gets the numbers of all
    groups behind the first ``groups`` tensors.
    """

    def __init__(self, function: Callable, groups: int, fills: bool, numbered: bool, constants: Mapping):
        super().__init__()
        self.function, self.groups, self.fills = function, groups, fills
        self.numbered, self.constants = numbered, constants

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        groups, rest = list(tensors[: self.groups]), list(tensors[self.groups + self.fills :])
        if self.numbered:
            groups.append(rest.pop() + torch.arange(groups[0].shape[0], device="cpu"))
        places = {"places": tensors[self.groups].unbind(-1)} if self.fills else {}
        results = self.function(*groups, *rest, **places, **self.constants)
        if results is None:
            return ()
        return results if isinstance(results, tuple) else (results,)


class Graph:
    """``function(*groups, *rest, places=places, **constants)`` of tensors of groups [groups, ...].

    It is called with a list of all these tensors, that of places behind those of groups, each contiguous, and compiled
    or loaded at its first call. It checks nothing: what its results depend on is in the key by which ``graph`` keeps
    it, and in its name on disk. Where it cannot be compiled it runs eagerly.

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
        self.whole = _Bound(function, len(groups), places is not None, numbered, constants)
        self.groups, self.rest = groups, (*rest, (torch.int64,)) if numbered else rest
        self.places = places
        self.run: Callable[[list[Tensor]], Sequence[Tensor]] | None = None

    def __call__(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        if self.run is None:
            with _making:
                if self.run is None:
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
        path = cache_folder() / f"{self.whole.function.__name__.strip('_')}-{self._digest()}.o"
        # the folder may be deleted at any time
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = path.with_suffix(".lock")
        with FileLock(lock):
            # a lock that others wait for is not to be removed
            os.utime(lock)
            kept = intact(path)
            if kept is not None:
                os.utime(path)
                return self._loaded(*kept)
            logger.info("compiling %s: once, it is kept in %s", self.whole.function.__name__.strip("_"), path.parent)
            # tracing takes no tensors of inference mode
            with torch.inference_mode(False), torch.no_grad():
                code, results = self._build()
                run = self._loaded(code, results)
                self._check(run, tensors)
            try:
                keep(path, code, results)
                remove_unused(path.parent)
            except OSError as error:
                logger.warning("%s is not kept: %s", path, error)
            return run

    def _digest(self) -> str:
        """Of all that the compiled code depends on."""
        function, constants = self.whole.function, sorted(map(str, self.whole.constants.items()))
        name = (function.__module__, function.__qualname__, constants)
        made_of = (name, self.groups, self.rest, self.whole.numbered, self.places)
        made_by = (torch.__version__, version("llvmlite"), processor(), CODE)
        return hashlib.sha256(repr((*made_of, *made_by)).encode()).hexdigest()[:32]

    def _build(self) -> tuple[bytes, Likes]:
        """(Machine code, (dtype, *shape of one group) of each result)."""
        sample = [_zeros(dtype, TRACED, *shape) for dtype, *shape in self.groups]
        if self.places:
            sample.append(_zeros(self.places.dtype, TRACED, self.places.count))
        sample += [_zeros(*like) for like in self.rest]
        # here, for it brings all of LLVM
        from . import native

        assembly, results = native.lowered(native.traced(self.whole, sample), self.groups, self.rest, self.places)
        return native.compiled(assembly), results

    def _loaded(self, code: bytes, results: Likes) -> Callable[[list[Tensor]], list[Tensor]]:
        from . import native

        in_place = self.places is not None and self.places.in_place
        position = len(self.groups)
        loop = native.loaded(code, position + bool(self.places) - in_place + len(self.rest) + len(results))

        def run(tensors: list[Tensor]) -> list[Tensor]:
            count = tensors[0].shape[0]
            filled = [torch.empty((count, *shape), dtype=dtype, device="cpu") for dtype, *shape in results]
            addresses = [x.data_ptr() for x in tensors]
            if in_place:
                del addresses[position]
            addresses += [x.data_ptr() for x in filled]
            # all or one: OpenMP starts threads anew where their number changes
            loop(count, torch.get_num_threads() if count >= LEAST_SHARED else 1, *addresses)
            return filled

        return run

    def _check(self, run: Callable[[list[Tensor]], Sequence[Tensor]], tensors: list[Tensor]) -> None:
        """Raise unless ``run`` does what the function does, bit for bit: translations and compilers may err."""
        expected, found = self._sample(tensors), self._sample(tensors)
        results = [*self._eager(expected), *expected], [*run(found), *found]
        for one, other in zip(*results, strict=True):
            if not _same_bits(one, other):
                raise RuntimeError(f"the graph of {self.whole.function.__name__} differs from the function")

    def _sample(self, tensors: list[Tensor]) -> list[Tensor]:
        """Few groups like ``tensors``: with their integers, for not all may be codes of groups, and any floats."""
        generator = torch.Generator("cpu").manual_seed(0)

        def like(x: Tensor, shape: Sequence[int]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(x.dtype)

        # as far apart as makes some draws certain and leaves others open, and factors that keep them so
        some = torch.arange(SAMPLE, device="cpu") % tensors[0].shape[0]
        groups = [
            16.0 * like(x, (SAMPLE, *x.shape[1:])) if x.is_floating_point() else x[some]
            for x in tensors[: len(self.groups)]
        ]
        rest = [
            1.0 + like(x, x.shape).abs() if x.is_floating_point() else x.clone()
            for x in tensors[len(tensors) - len(self.rest) :]
        ]
        if self.places is None:
            return [*groups, *rest]
        own = _zeros(self.places.dtype, SAMPLE, self.places.count)
        return [*groups, groups[0] if self.places.in_place else own, *rest]


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


def keep(path: Path, code: bytes, results: Likes) -> None:
    """A graph's file: a digest of the rest, a line that tells its results, and machine code."""
    told = json.dumps([[str(dtype).removeprefix("torch."), *shape] for dtype, *shape in results]).encode()
    body = told + b"\n" + code
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        unfinished.write_bytes(hashlib.sha256(body).digest() + body)
        os.replace(unfinished, path)


def intact(path: Path) -> tuple[bytes, Likes] | None:
    """(Machine code, results) of a graph's file, if it is there and whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, body = data[:32], data[32:]
    if hashlib.sha256(body).digest() != digest:
        return None
    told, code = body.split(b"\n", 1)
    return code, tuple((getattr(torch, dtype), *shape) for dtype, *shape in json.loads(told))


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
