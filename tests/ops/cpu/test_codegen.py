"""Each operation that loops of machine code are made of gives torch's bits, also for values that are no numbers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

from maskpro_kernels.ops.cpu import codegen, machine
from maskpro_kernels.ops.cpu.loops import MIN_SHARED_GROUPS, CompiledLoop, _same_bits

SPECIAL = [0.0, -0.0, 1.0, -1.5, 3.25e-39, torch.inf, -torch.inf, torch.nan, 88.5, -3e38, 0.1, 7.0]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def loop_of(function, *tensors):
    """The results of ``function`` on tensors of groups, by a loop."""
    loop = CompiledLoop(function, tuple((x.dtype, *x.shape[1:]) for x in tensors), ())
    run = loop._loaded(*loop._build())
    return run(list(tensors))


def check(function, *tensors):
    expected = function(*tensors)
    for one, other in zip(loop_of(function, *tensors), expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert _same_bits(one, other), (one, other)


def pairs(dtype=torch.float32):
    """All pairs of special values, and of others."""
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor(list(itertools.product(SPECIAL, SPECIAL)))
    return [x.contiguous() for x in torch.cat([special, torch.randn(1_000, 2, generator=generator)]).to(dtype).T]


def integers(dtype=torch.int32):
    generator = torch.Generator().manual_seed(0)
    ends = torch.iinfo(dtype)
    return [torch.randint(ends.min, ends.max, (1_003,), generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("operation", [torch.add, torch.sub, torch.mul, torch.div], ids=lambda f: f.__name__)
def test_arithmetic_of_floats(operation):
    check(lambda a, b: (operation(a, b), operation(a, 0.1), operation(a, a)), *pairs())


def test_numbers_before_tensors():
    check(lambda a, b: (1.0 - a, 4096.0 / b, 0.5 + a, 3.0 * b), *pairs())


@pytest.mark.parametrize("operation", ["ge", "gt", "lt", "le", "eq", "ne"])
def test_comparisons(operation):
    def compared(a, b):
        compare = getattr(torch, operation)
        chosen = torch.where(compare(a, b), a, b)
        return chosen, compare(a, 1.0), torch.where(~compare(a, b), 0.0, 1.0).to(torch.uint8)

    check(compared, *pairs())
    check(lambda a, b: (getattr(torch, operation)(a, b).to(torch.int32),), *integers())


def test_extremes_are_no_number_where_either_is_none():
    def extremes(a, b):
        # which of two zeros is taken is not said
        a, b = a + 0.0, b + 0.0
        a, b = torch.where(a == 0.0, 1.0, a), torch.where(b == 0.0, 1.0, b)
        return torch.minimum(a, b), torch.maximum(a, b)

    check(extremes, *pairs())
    check(lambda a, b: (torch.clamp(a, -1.0, 20.0), torch.clamp(a, max=0.0), torch.clamp(b, min=0.0)), *pairs())
    check(lambda a, b: (torch.clamp(torch.minimum(a, b), 0, 255).to(torch.uint8), torch.maximum(a, b)), *integers())


def test_integers_wrap_and_shift_as_those_of_torch():
    def mixed(a, b):
        return a * b, a + b, a - 7, a ^ b, a & 0xFFFF, a | b, a >> 3, a << 5, a.to(torch.int64) * 0xD2511F53 >> 32

    check(mixed, *integers())
    check(lambda a, b: (a * 3 >> 32 & 0xFFFFFFFF, a ^ b, a.to(torch.int32), a & b), *integers(torch.int64))


def test_logic():
    def logic(a, b):
        one, other = a > 0.0, b > 0.0
        return one & other, one | other, ~one, (one & ~other).to(torch.int32) << 4

    check(logic, *pairs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floats_of_16_bits_are_widened_and_rounded(dtype):
    check(lambda a, b: (a.to(torch.float32) + b.to(torch.float32),), *pairs(dtype))
    check(lambda a, b: (a.to(dtype), (a * b).to(dtype)), *pairs())


def test_conversions():
    words = integers(torch.int64)
    check(lambda a, b: (a.to(torch.float32), (b & 0xFF).to(torch.uint8).to(torch.float32)), *words)
    check(lambda a, b: (a.view(torch.float32).view(torch.int32), b.to(torch.int64), b.to(torch.float32)), *integers())
    small = [x.nan_to_num(0.0).clamp(-1e9, 1e9) for x in pairs()]
    check(lambda a, b: (a.to(torch.int32), a.abs(), b.to(torch.int32).to(torch.uint8)), *small)


def test_columns_of_groups_are_split_and_joined():
    x = torch.randn(1_003, 4)
    check(lambda x: (torch.stack([c * (i + 1) for i, c in enumerate(x.unbind(-1))], -1), x[..., 2], x * 2), x)


def test_what_has_no_translation_is_named():
    graph = codegen.traced(lambda x: (x.sin(),), [torch.zeros(2)])
    with pytest.raises(NotImplementedError, match="aten.sin.default has no translation"):
        codegen.lowered(graph, ((torch.float32,),), ())


@pytest.mark.parametrize("function", [lambda x: x[0] + x, lambda x: x.view(-1, 2)[:, 0], lambda x: x.sum(-1)])
def test_what_is_not_taken_column_by_column_runs_eagerly(function):
    x = torch.randn(64, 4)
    with pytest.warns(UserWarning, match="runs eagerly"):
        (result,) = CompiledLoop(function, ((x.dtype, 4),), ())([x])
    assert torch.equal(result, function(x))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_groups(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (1, MIN_SHARED_GROUPS - 1, MIN_SHARED_GROUPS, 5 * MIN_SHARED_GROUPS + 7):
            x = torch.arange(2 * count, dtype=torch.float32).view(count, 2)
            check(lambda x: (x + 1.0,), x)
    finally:
        torch.set_num_threads(before)


def test_without_openmp_one_thread_does_all(monkeypatch):
    monkeypatch.setattr(machine, "_openmp", lambda: None)
    x = torch.arange(10.0 * MIN_SHARED_GROUPS).view(-1, 2)
    check(lambda x: (x + 1.0,), x)


AT_EXIT = """
import atexit, torch
import maskpro_kernels as mk
torch.set_num_threads(2)
logits = torch.zeros(1 << 14, 8)
expected = mk.sample_mask(logits, "2:4", seed=1)
atexit.register(lambda: print(torch.equal(mk.sample_mask(logits, "2:4", seed=1), expected)))
"""


def test_draws_work_while_the_interpreter_ends():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", AT_EXIT], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
