"""Functions of groups as loops of machine code: compiled once, kept on disk, loaded by later processes.

One loop serves any number of groups. A call costs microseconds. A process that loads it from disk does not trace or
compile.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, fx, nn

from ..reference.groups import INTEGERS
from . import cache
from .cache import Specs

# Groups of the traced tensors, a number that no group has of columns
TRACED = 7

# Groups for the comparison of a loop with its function: more than one block, and not a multiple of a vector
SAMPLE = 5_003

# Their shard, whose rows are not adjacent in the whole layer
SAMPLE_SHARD = (3, 1_000, 1_777, 5)

# Fewest groups for several threads
MIN_SHARED_GROUPS = 1 << 14

# Each loop is compiled once, whichever thread calls it first
_compile_lock = threading.Lock()

# Types of a group's index, and of many indices, which compiled code stores in half the width for more in a vector
NUMBER = (torch.int64,)
NUMBERS = (torch.uint32,)
LEVELS = (torch.uint8,)


class _Bound(nn.Module):
    """``function(*tensors, **constants)`` as a tuple; with ``numbered``, all indices replace the first one."""

    def __init__(self, function: Callable, groups: int, numbered: bool, constants: Mapping):
        super().__init__()
        self.function = function
        self.groups = groups
        self.numbered = numbered
        self.constants = constants

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        groups = list(tensors[: self.groups])
        rest = list(tensors[self.groups :])
        if self.numbered:
            groups.append(rest.pop() + torch.arange(groups[0].shape[0], device="cpu"))
        groups = [x.to(torch.int64) if x.dtype == torch.uint32 else x for x in groups]
        results = self.function(*groups, *rest, **self.constants)
        return results if isinstance(results, tuple) else (results,)


class _Drawn(nn.Module):
    """``by_bounds`` on all groups, and ``full`` on undetermined ones, see ``CompiledLoop``."""

    def __init__(self, levels: _Bound, by_bounds: _Bound, full: _Bound):
        super().__init__()
        self.levels = levels
        self.by_bounds = by_bounds
        self.full = full

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        *tensors, shard = tensors
        groups = tensors[: self.full.groups - 1]
        rest = tensors[self.full.groups - 1 :]
        start, columns, row_stride, offset = shard.tolist()
        local = torch.arange(start, start + len(groups[0]), device="cpu")
        number = local // columns * row_stride + local % columns + offset
        result, undetermined = self.by_bounds(*groups, *self.levels(number, *rest), *rest)
        (indices,) = undetermined.nonzero(as_tuple=True)
        (drawn,) = self.full(*(x[indices] for x in groups), number[indices], *rest)
        return (result.index_put((indices,), drawn),)


class CompiledLoop:
    """``function(*groups, *rest, **constants)`` on tensors of groups [groups, ...] and other tensors.

    Call it with a list of all these tensors, contiguous, and if the caller has it, memory for the first result. It
    returns a list of results [groups, ...]. The first call compiles or loads it. If it cannot be compiled, it runs
    eagerly.

    Args:
        groups: (dtype, *shape of one group) of each tensor of groups.
        rest: (dtype, *shape) of each other tensor.
        numbered: whether groups are consecutive. The function takes the tensor of their indices after the tensors of
            groups; a call passes the index of the first group instead, as a 0-dim int64 tensor, last.
        out: (dtype, *shape of one group) of the given memory for the first result.
        in_place: index of the tensor of groups with this memory; None if it is no tensor's.
        levels, full: with these, the function has two results: one, and uint8 1 for each group that it leaves
            undetermined. Such a group gets the result of ``full``, which takes indices in the whole layer after the
            tensors of groups. At the same place the function takes ``levels(indices, *rest, m=...)``, uint8, with m the
            last size of the first tensor of groups. The last tensor of a call is then int64 (start, columns,
            row_stride, offset): group i has the index l // columns * row_stride + l % columns + offset, l = start + i.
    """

    def __init__(self, function: Callable, groups: Specs, rest: Specs, numbered: bool = False,
                 out: tuple | None = None, in_place: int | None = None, levels: Callable | None = None,
                 full: Callable | None = None, constants: Mapping = MappingProxyType({})):  # fmt: skip
        self.name = function.__name__.strip("_")
        drawn = full is not None
        self.function = _Bound(function, len(groups) + drawn, numbered, constants)
        self.levels = _Bound(levels, 1, False, {"m": groups[0][-1]}) if drawn else None
        self.full = _Bound(full, len(groups) + 1, False, constants) if drawn else None
        self.whole = _Drawn(self.levels, self.function, self.full) if drawn else self.function
        self.groups = groups
        self.rest = (*rest, NUMBER) if numbered else rest
        self.out = out
        self.in_place = in_place
        self.run = self._over_layers = None

    def __call__(self, tensors: list[Tensor], out: Tensor | None = None) -> list[Tensor]:
        self._compile_once(tensors)
        return self.run(tensors, out)

    def over_layers(self, tensors: list[Tensor]) -> Callable[[Tensor], None] | None:
        """Return ``run(table)``, the loop over the groups of many layers in one call; None if it runs eagerly.

        A row of the table, int64 [layers + 1, 1 + addresses], has the number of groups in the layers before, and the
        addresses for a layer: the tensors of a call, then those of results, without a first result in place of a
        tensor. In the last row, after the layers, only the first number counts.

        Args:
            tensors: those of one layer: the first call compiles the loop.
        """
        self._compile_once(tensors)
        return self._over_layers

    def _compile_once(self, tensors: list[Tensor]) -> None:
        if self.run is None:
            with _compile_lock:
                if self.run is None:
                    self.run = self._compiled_or_eager(tensors)

    def _compiled_or_eager(self, tensors: list[Tensor]) -> Callable[..., list[Tensor]]:
        try:
            return self._compiled(tensors)
        except Exception as error:
            warn_of_failure(error, "maskpro_kernels runs eagerly on CPU")
            return self._eager

    def _eager(self, tensors: list[Tensor], out: Tensor | None = None) -> list[Tensor]:
        with torch.no_grad():
            results = list(self.whole(*tensors))
            if out is not None:
                results[0] = out.copy_(results[0])
        return results

    def _compiled(self, tensors: list[Tensor]) -> Callable[..., list[Tensor]]:
        def make() -> tuple[bytes, Specs]:
            # inference tensors cannot be traced
            with torch.inference_mode(False), torch.no_grad():
                code, results = self._build()
                self._check(self._loaded(code, results), tensors)
            return code, results

        return self._loaded(*cache.compiled(self.name, self.key, make))

    @property
    def key(self) -> tuple:
        """Parts of this loop that its code depends on."""
        functions = [bound.function for bound in (self.function, self.levels, self.full) if bound]
        names = [(function.__module__, function.__qualname__) for function in functions]
        constants = sorted(map(str, self.function.constants.items()))
        return names, constants, self.groups, self.rest, self.function.numbered, self.out, self.in_place

    def _build(self) -> tuple[bytes, Specs]:
        """(Machine code, (dtype, *shape of one group) of each result)."""
        # imported here, since it loads LLVM
        from . import codegen, machine

        def traced(bound: _Bound, *groups: tuple) -> fx.Graph:
            sizes = [(dtype, TRACED, *shape) for dtype, *shape in groups]
            sample = [torch.zeros(shape, dtype=dtype, device="cpu") for dtype, *shape in (*sizes, *self.rest)]
            return codegen.traced(bound, sample)

        levels = full = None
        if self.full:
            levels = traced(self.levels, NUMBERS)
            full = traced(self.full, *self.groups, NUMBERS)
        graph = traced(self.function, *self.groups, *([LEVELS] if self.full else []))
        assembly, results = codegen.lowered(graph, self.groups, self.rest, self.in_place, levels, full)
        if self.out not in (None, results[0]):
            raise ValueError(f"out: expected {results[0]}, got {self.out}")
        return machine.object_code(assembly), results

    def _loaded(self, code: bytes, results: Specs) -> Callable[..., list[Tensor]]:
        from . import machine

        # a first result in place of a tensor has its address already
        written = results if self.in_place is None else results[1:]
        allocated = results if self.out is None else results[1:]
        addresses = len(self.groups) + len(self.rest) + (self.full is not None) + len(written)
        loop, layers = machine.loaded_loop_and_layers(code, addresses)

        def run(tensors: list[Tensor], out: Tensor | None = None) -> list[Tensor]:
            count = tensors[0].shape[0]
            outputs = [] if out is None else [out]
            outputs += [torch.empty((count, *shape), dtype=dtype, device="cpu") for dtype, *shape in allocated]
            addresses = [x.data_ptr() for x in tensors]
            addresses += [x.data_ptr() for x in outputs[len(outputs) - len(written) :]]
            loop(count, _threads(count), *addresses)
            return outputs

        def over_layers(table: Tensor) -> None:
            count = int(table[-1, 0])
            layers(count, _threads(count), len(table) - 1, table.data_ptr())

        self._over_layers = over_layers
        return run

    def _check(self, run: Callable[..., list[Tensor]], tensors: list[Tensor]) -> None:
        """Raise unless ``run`` matches the function bit for bit: translations and compilers may have bugs."""
        eager_tensors = self._sample(tensors)
        loop_tensors = self._sample(tensors)
        expected = self._eager(eager_tensors)
        out = None
        if self.in_place is not None:
            out = loop_tensors[self.in_place]
            eager_tensors[self.in_place] = expected[0]
        elif self.out:
            out = torch.empty_like(expected[0])
        results = run(loop_tensors, out)
        for x, y in zip([*expected, *eager_tensors], [*results, *loop_tensors], strict=True):
            if not _same_bits(x, y):
                raise RuntimeError(f"the loop of {self.name} differs from the function")

    def _sample(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sample of groups like ``tensors``: with their integers, since not all are codes, and random floats."""
        generator = torch.Generator("cpu").manual_seed(0)

        def like(x: Tensor, *shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(x.dtype)

        # gaps that determine some draws and not others, and factors that keep them so
        indices = torch.arange(SAMPLE, device="cpu") % tensors[0].shape[0]
        groups = tensors[: len(self.groups)]
        rest = tensors[len(self.groups) :]
        if self.full:
            *rest, _ = rest
            rest.append(torch.tensor(SAMPLE_SHARD, device="cpu"))
        return [
            *(16.0 * like(x, SAMPLE, *x.shape[1:]) if x.is_floating_point() else x[indices] for x in groups),
            *(1.0 + like(x, *x.shape).abs() if x.is_floating_point() else x.clone() for x in rest),
        ]


def warn_of_failure(error: Exception, consequence: str) -> None:
    """Warn that compilation has failed, with any error: releases of compilers differ."""
    first_line = (str(error) or repr(error)).splitlines()[0]
    warnings.warn(f"compilation failed ({first_line}); {consequence}", stacklevel=5)


def _threads(groups: int) -> int:
    # all or one: OpenMP restarts threads when their number changes
    return torch.get_num_threads() if groups >= MIN_SHARED_GROUPS else 1


def _same_bits(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors have the same bits, except for the bits of a NaN, which may differ."""
    if not x.is_floating_point():
        return torch.equal(x, y)
    nan = x.isnan()
    bits = [tensor.masked_fill(nan, 0.0).view(INTEGERS[tensor.itemsize]) for tensor in (x, y)]
    return torch.equal(nan, y.isnan()) and torch.equal(*bits)


@functools.cache
def compiled_loop(*arguments, **constants: int | torch.dtype) -> CompiledLoop:
    """``CompiledLoop`` of these arguments, cached."""
    return CompiledLoop(*arguments, constants=constants)


def run(function: Callable, tensors: Sequence[Tensor], rest: Sequence[Tensor] = (), *, out: Tensor,
        first: Tensor | None = None, shard: Tensor | None = None, levels: Callable | None = None,
        full: Callable | None = None, **constants) -> list[Tensor]:  # fmt: skip
    """Results [groups, ...] of ``function`` on tensors [groups, ...], by a ``CompiledLoop``; without groups ``out``.

    ``out`` is memory for the first result, perhaps that of one of the tensors; ``first`` is the index of the first
    group.
    """
    if not tensors[0].shape[0]:
        return [out]
    group_specs = tuple([(x.dtype, *x.shape[1:]) for x in tensors])
    rest_specs = tuple([(x.dtype, *x.shape) for x in rest])
    in_place = next((i for i, x in enumerate(tensors) if x.data_ptr() == out.data_ptr()), None)
    out_spec = (out.dtype, *out.shape[1:])
    numbered = first is not None
    loop = compiled_loop(function, group_specs, rest_specs, numbered, out_spec, in_place, levels, full, **constants)
    return loop([*tensors, *rest, *(x for x in (first, shard) if x is not None)], out)
