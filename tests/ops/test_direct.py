"""Calls of a packed layer without torch's dispatcher, and all those with it."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import maskpro_kernels as mk
from maskpro_kernels import ops
from maskpro_kernels.ops import registry
from maskpro_kernels.packed import packed_linear


@pytest.fixture
def layer() -> mk.Sparse24Linear:
    torch.manual_seed(0)
    linear = nn.Linear(32, 8)
    with torch.no_grad():
        linear.weight.view(-1, 4)[:, 1:3] = 0.0
    return mk.Sparse24Linear.from_dense(linear)


@pytest.fixture(params=["machine code", "kernels"])
def taken(request, monkeypatch) -> list:
    """Results of the direct calls, by machine code, and by kernels in the interpreter."""
    results, direct = [], registry.direct_nm_linear

    def recorded(*args):
        y = direct(*args)
        results.extend([] if y is None else [y])
        return y

    monkeypatch.setattr(registry, "uses_kernels", lambda tensor: request.param == "kernels")
    monkeypatch.setattr(ops, "direct_nm_linear", recorded)
    return results


def test_plain_calls_are_direct_and_give_the_same(layer, taken):
    for shape in ((32,), (1, 32), (2, 3, 32), (0, 32)):
        x = torch.randn(shape)
        for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            before = len(taken)
            with context:
                y = layer(x)
            assert len(taken) == before + 1 and y.shape == (*shape[:-1], 8) and not y.requires_grad
            torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


def in_mode(mode):
    def call(layer, x):
        with mode:
            return layer(x)

    return call


def with_gradient(name):
    def call(layer, x):
        values = {"x": x, "values": layer.values, "bias": layer.bias}
        values[name].requires_grad_()
        return layer(x)

    return call


def with_tangent(layer, x):
    with forward_ad.dual_level(), pytest.raises(ValueError, match="x: expected a tensor without a forward-mode"):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))


OTHERS = {
    "a gradient in x": with_gradient("x"),
    "a gradient in values": with_gradient("values"),
    "a gradient in the bias": with_gradient("bias"),
    "autocast": in_mode(torch.autocast("cpu")),
    "a dispatch mode": in_mode(Watching()),
    "a function mode": in_mode(Overriding()),
    "a tensor of another type": lambda layer, x: layer(x.as_subclass(Own)),
    "rows that lie apart": lambda layer, x: layer(torch.cat([x, x], 1)[:, :32]),
    "a forward derivative": with_tangent,
    "a trace": lambda layer, x: torch.jit.trace(layer, x, check_trace=False),
    "a graph": lambda layer, x: torch.compile(layer, backend="eager", fullgraph=True)(x),
    "an exported program": lambda layer, x: torch.export.export(layer, (x,)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_torch_has_its_part_where_it_wants_one(name, layer, taken):
    OTHERS[name](layer, torch.randn(4, 32))
    assert not taken


class OwnParameter(torch.Tensor):
    """Like a DTensor: the memory at its address is not its content."""


ODD = {
    "values of another type": ("values", lambda x: x.detach().as_subclass(OwnParameter)),
    "values that lie apart": ("values", lambda x: torch.cat([x.detach(), x.detach()], 1)[:, : x.shape[1]]),
    "a bitmask elsewhere": ("bitmask", lambda x: x.to("meta")),
    "a bias elsewhere": ("bias", lambda x: x.detach().to("meta")),
    "a bias that is too short": ("bias", lambda x: x.detach()[:5]),
}


@pytest.mark.parametrize("name", ODD)
def test_memory_that_is_not_plain_is_never_read(name, layer, taken):
    part, change = ODD[name]
    parts = {"values": layer.values, "bitmask": layer.bitmask, "scales": None, "bias": layer.bias}
    parts[part] = change(parts[part])
    assert registry.direct_nm_linear(torch.randn(1, 32), **parts, n=2, m=4) is None and not taken


def test_parts_on_other_devices_are_named(layer, taken):
    x = torch.randn(1, 32)
    with pytest.raises(ValueError, match="bitmask: expected a tensor on the values' device cpu"):
        packed_linear(x, layer.values, layer.bitmask.to("meta"), None, None, layer.pattern)
    with pytest.raises(ValueError, match=r"bias: expected a tensor \[8\] of torch.float32 on cpu"):
        packed_linear(x, layer.values, layer.bitmask, None, layer.bias.detach().to("meta"), layer.pattern)


def test_float64_is_refused_and_a_negation_is_heeded(layer, taken):
    x = torch.randn(2, 32)
    torch.testing.assert_close(layer(torch._neg_view(x)), layer(-x))
    with pytest.raises(TypeError, match="dtype: expected float32, bfloat16 or float16, got torch.float64"):
        layer.double()(x.double())


def test_replicas_with_plain_attributes_multiply(layer, taken):
    """DataParallel and FSDP replace parameters by plain attributes."""
    replica, x = layer._replicate_for_data_parallel(), torch.randn(2, 32)
    for name in ("values", "bias"):
        setattr(replica, name, getattr(layer, name).detach())
    assert not replica._parameters.get("values")
    torch.testing.assert_close(replica(x), layer(x))


def test_without_what_torch_does_not_promise_all_goes_by_the_dispatcher(layer, taken, monkeypatch):
    monkeypatch.setattr(registry, "_derivatives", False)
    x = torch.randn(4, 32)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not taken


MASKED = {
    "no gradient": (lambda x, of: of(x), [True]),
    # within its autograd function
    "a gradient": (lambda x, of: of(x.requires_grad_())[0].sum().backward(), [False, True]),
    "a dispatch mode": (lambda x, of: in_mode(Watching())(of, x), [False, False]),
    "a transform": (lambda x, of: torch.func.grad(lambda x: of(x)[0].sum())(x), [False, True]),
    "a graph": (lambda x, of: torch.compile(of, backend="eager", fullgraph=True)(x), []),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_products_are_direct_where_nothing_else_sees_them(name, monkeypatch):
    call, expected = MASKED[name]
    weight, logits, x = torch.randn(8, 32), torch.randn(8, 32), torch.randn(4, 32)
    taken, direct = [], registry.direct_masked_linear

    def recorded(*args):
        out = direct(*args)
        if not torch.compiler.is_compiling():
            taken.append(out is not None)
        return out

    monkeypatch.setattr(ops, "direct_masked_linear", recorded)
    call(x, lambda x: mk.masked_linear(x, weight, logits, pattern="2:4", seed=0))
    assert taken == expected
    found = mk.masked_linear(x.detach(), weight, logits, pattern="2:4", seed=0)
    monkeypatch.setattr(ops, "direct_masked_linear", lambda *_: None)
    assert_same_bits(list(found), list(mk.masked_linear(x.detach(), weight, logits, pattern="2:4", seed=0)))
