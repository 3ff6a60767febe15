"""Straight-through layers: the gradients of masked ones, and a slope for the logits."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.cases import slow
from helpers.enumerated import KERNEL_DEVICE
from helpers.products import COUNTER, normal
from helpers.slopes import slope_operands, source_of
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.ops.pattern import NMPattern


@pytest.mark.parametrize("tokens", [20, 150])
def test_all_gradients_but_the_logits_are_those_of_masked_linear(tokens):
    pattern = NMPattern("2:4")
    grad, x, weight, logits = slope_operands(pattern, tokens=tokens)
    bias = normal(24, seed=5)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, logits)]
    others = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = mk.straight_through_linear(leaves[0], leaves[1], leaves[3], leaves[2], pattern=pattern, **COUNTER)
    expected, _ = mk.masked_linear(others[0], others[1], logits, others[2], pattern=pattern, log_prob=False, **COUNTER)
    assert_same_bits(y, expected)
    y.backward(grad)
    expected.backward(grad)
    for ours, theirs in zip(leaves, others, strict=False):
        assert_same_bits(ours.grad, theirs.grad)
    found = mk.straight_through_gradient(grad, x, weight, source_of(logits, pattern))
    assert_same_bits(leaves[3].grad, found)


def test_second_derivatives_are_refused():
    _, x, weight, logits = slope_operands(NMPattern("2:4"))
    logits.requires_grad_()
    y = mk.straight_through_linear(x, weight, logits, pattern="2:4", **COUNTER)
    (first,) = torch.autograd.grad(y.square().sum(), logits, create_graph=True)
    # ahead of torch, which would take zeros for them in torch.autograd.functional.hessian
    with pytest.raises(RuntimeError, match="^grad: expected none for second derivatives, which a masked layer has not"):
        torch.autograd.grad(first.sum() + logits.square().sum(), logits)


@pytest.mark.parametrize("dynamic", [slow(None), True])
def test_gradients_arrive_for_any_optimizer_also_under_compile(dynamic):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).to(KERNEL_DEVICE)
    mk.convert(model, "2:4", targets=["0", "2"], gap=3.0)
    for layer in (model[0], model[2]):
        layer.logits_backward = mk.straight_through_gradient
    x = normal(10, 32)
    model(x).square().mean().backward()
    eager = [layer.logits.grad.clone() for layer in (model[0], model[2])]
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)(x).square().mean().backward()
    assert_same_bits([layer.logits.grad for layer in (model[0], model[2])], eager)
    before = model[0].logits.detach().clone()
    torch.optim.SGD([layer.logits for layer in (model[0], model[2])], lr=1.0).step()
    assert not torch.equal(model[0].logits, before)


@pytest.mark.parametrize("tokens", [20, 150])
def test_logits_that_backward_moves_move_after_the_other_gradients(tokens):
    """Which are those of the mask that the logits of the forward draw."""
    pattern = NMPattern("2:4")
    grad, x, weight, logits = slope_operands(pattern, tokens=tokens)
    found, moved = {}, []

    def move(grad, x, weight, mask):
        moved.append(mask.tensor.neg_())

    for logits_backward in (mk.straight_through_gradient, move):
        leaves = [t.clone().requires_grad_() for t in (x, weight, logits)]
        how = {"pattern": pattern, "logits_backward": logits_backward, **COUNTER}
        mk.straight_through_linear(*leaves, **how).backward(grad)
        found[logits_backward] = [leaf.grad for leaf in leaves[:2]]
    assert_same_bits(found[move], found[mk.straight_through_gradient])
    assert len(moved) == 1 and torch.equal(leaves[2].detach(), -logits)
