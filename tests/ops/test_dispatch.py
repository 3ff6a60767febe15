"""Which code runs an operation, and what happens where a loop cannot be compiled."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.arguments import cpu_normal
from helpers.bits import assert_same_bits
from helpers.routes import take_route
from llvmlite import binding

import maskpro_kernels as mk
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import dispatch, reference
from maskpro_kernels.ops.cpu import loops
from maskpro_kernels.ops.cpu.loops import CompiledLoop
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.ops.tables import cpu as table


def test_cpu_tensors_go_to_the_compiled_reference_without_the_interpreter(monkeypatch):
    calls = []

    def recorded(scores, n, m):
        calls.append((n, m))
        return reference.top_n_mask(scores, n, m)

    take_route(monkeypatch, "compiled")
    monkeypatch.setattr(table, "top_n_mask", recorded)
    assert mk.top_n_mask(torch.tensor([3.0, 1.0, 2.0, 0.0]), "2:4").tolist() == [0b0101]
    assert calls == [(2, 4)]


@pytest.fixture
def compiled_route(monkeypatch):
    """CPU tensors go to the compiled reference, whose loops are made again."""
    take_route(monkeypatch, "compiled")
    monkeypatch.setattr(loops, "compiled_loop", functools.cache(loops.compiled_loop.__wrapped__))


@pytest.mark.parametrize("error", [FileNotFoundError("cache"), RuntimeError("no compiled frames")], ids=repr)
def test_a_loop_that_cannot_be_compiled_runs_eagerly(compiled_route, error, monkeypatch):
    tries = []

    def failing(*_, **__):
        tries.append(error)
        raise error

    monkeypatch.setattr(CompiledLoop, "_compiled", failing)
    with pytest.warns(UserWarning, match=f"compilation failed .{error}"):
        codes = mk.top_n_mask(torch.tensor([3.0, 1.0, 2.0, 0.0]), "2:4")
    assert codes.tolist() == [0b0101]
    mk.top_n_mask(torch.tensor([3.0, 1.0, 2.0, 0.0]), "2:4")
    assert len(tries) == 1
    logits = cpu_normal(5, 64)
    expected = reference_update(logits)
    with pytest.warns(UserWarning, match="compilation failed"):
        assert_same_bits(mk.score_update_(logits, 0.5, pattern="2:4", seed=3), expected)


def test_an_error_of_a_run_is_raised(compiled_route, monkeypatch):
    def failing(tensors, out):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(CompiledLoop, "_compiled", lambda *_: failing)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            mk.top_n_mask(torch.zeros(1, 4), "2:4")


def test_results_do_not_follow_the_default_dtype(compiled_route):
    torch.set_default_dtype(torch.bfloat16)
    try:
        logits = cpu_normal(8, 8, dtype=torch.float32).requires_grad_()
        log_prob = mk.mask_log_prob(logits, mk.top_n_mask(logits.detach(), "2:4"), "2:4")
        log_prob.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert log_prob.dtype == logits.grad.dtype == torch.float32
    codes = reference.top_n_mask(logits.detach(), n=2, m=4)
    expected = reference.mask_score(logits.detach(), codes, torch.ones(8, 2), 2, 4, 1.0)
    assert_same_bits(logits.grad, expected)


def reference_update(logits: torch.Tensor) -> torch.Tensor:
    """Result of ``score_update_(logits, 0.5, pattern="2:4", seed=3)`` by the eager reference."""
    updated = logits.clone()
    counter = counter_of(logits, NMPattern("2:4"), seed=3)._replace(draw=torch.tensor([0]))
    reference.score_update_(updated, torch.tensor([0.5]), 2, 4, 1.0, counter)
    return updated


def test_that_no_compiler_is_found_is_reported(monkeypatch, caplog):
    def none_found():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(binding, "get_host_cpu_name", none_found)
    # the answer of this process is kept
    assert not dispatch.compiler_available.__wrapped__()
    assert "LLVM does not compile here (no compiler)" in caplog.text
