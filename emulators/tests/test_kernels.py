"""Triton kernels that know nothing of the emulators: they run for each GPU, and faults planted in them are found."""

from __future__ import annotations

import re

import pytest
import torch
from hand_written.kernels import add, add_beyond_the_end, count, matmul, softmax

from gpu_emulators import driver
from gpu_emulators.findings import Fault

TARGETS = ["sm_80", "sm_90", "sm_100"]


@pytest.fixture(scope="module")
def installed():
    return driver.install("sm_80")


@pytest.fixture(params=TARGETS)
def emulator(installed, request):
    """The driver, aimed at a GPU; without findings before and, unless a test takes them, after."""
    installed.aim(request.param)
    with installed.apart() as findings:
        yield installed
        installed.rewrite = str
        assert not installed.faults(findings)


def numbers(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_add(emulator):
    x, y, out = numbers(1000), numbers(1000) + 1, torch.empty(1000)
    add[(4,)](x, y, out, 1000, BLOCK=256)
    assert torch.equal(out, x + y)


def test_softmax(emulator):
    x = numbers(5, 200)
    out = torch.empty_like(x)
    softmax[(5,)](x, out, 200, 200, BLOCK=256)
    torch.testing.assert_close(out, x.softmax(1), rtol=1e-5, atol=1e-6)


def product(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(c of the kernel, c of torch) in float32, from bfloat16."""
    a, b, c = numbers(m, k, dtype=torch.bfloat16), numbers(k, n, dtype=torch.bfloat16), torch.empty(m, n)
    grid = (-(-m // 64), -(-n // 64))
    matmul[grid](a, b, c, m, n, k, M=64, N=64, K=32, num_warps=4, num_stages=3)
    return c, a.float() @ b.float()


def test_matmul(emulator):
    c, expected = product(80, 64, 128)
    torch.testing.assert_close(c, expected, rtol=1e-4, atol=1e-3)


def test_a_bad_address_is_found(emulator):
    x, y, out = numbers(1000), numbers(1000), torch.empty(1000)
    with pytest.raises(Fault, match=r"^out of bounds of global memory.* beyond "):
        add_beyond_the_end[(4,)](x, y, out, 1000, BLOCK=256)


def test_a_race_between_programs_is_found(emulator):
    with emulator.apart() as findings:
        count[(4,)](numbers(1024), torch.zeros(1), BLOCK=256)
    assert any("race" in kind for kind in findings.kinds), findings


def test_a_race_in_shared_memory_is_found(emulator):
    """The sum over a row passes from warp to warp by shared memory, behind barriers."""
    emulator.rewrite = lambda text: re.sub(r"bar\.sync[^;]*;", "", text)
    x = numbers(1, 256)
    with emulator.apart() as findings:
        softmax[(1,)](x, torch.empty_like(x), 256, 256, BLOCK=256)
    assert any("race" in kind for kind in findings.kinds), findings


def test_a_missing_wait_is_found(emulator):
    """Operands come by asynchronous copies, of which the last has to have arrived."""
    waits = re.compile(r"cp\.async\.wait_group[^;]*;")

    def without(text: str) -> str:
        assert waits.search(text)
        return waits.sub("", text)

    emulator.rewrite = without
    with emulator.apart() as findings:
        product(64, 64, 128)
    assert findings.kinds
