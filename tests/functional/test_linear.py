"""Linear layers under a mask: products and gradients of their parts."""

from __future__ import annotations

import pytest
import torch
from helpers.arguments import cpu_normal, linear_arguments
from helpers.bits import assert_same_bits
from helpers.enumerated import exact_log_prob, exact_score
from helpers.products import DRAW
from torch import nn
from torch.autograd import forward_ad

import maskpro_kernels as mk
from maskpro_kernels.functional import checks
from maskpro_kernels.packed import dense_layer


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_masked_linear_is_linear_under_the_drawn_mask(temperature):
    given, plain = linear_arguments(), linear_arguments()
    draw = {"pattern": "2:4", "temperature": temperature, **DRAW}
    y, log_prob = mk.masked_linear(**given, **draw)
    codes = mk.sample_mask(plain["logits"].detach(), **draw)
    expected = nn.functional.linear(plain["x"], plain["weight"] * mk.expand_mask(codes, "2:4"), plain["bias"])
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)

    scaled = (plain["logits"].detach() / temperature).view(-1, 4)
    groups = list(zip(scaled, codes.flatten().tolist(), strict=True))
    assert log_prob.shape == () and log_prob.dtype == torch.float32
    assert log_prob.item() == pytest.approx(float(sum(exact_log_prob(z, c) for z, c in groups)), rel=1e-5)

    upstream = cpu_normal(*y.shape, seed=9)
    ((y * upstream).sum() + 3.0 * log_prob).backward()
    (expected * upstream).sum().backward()
    for name in ("x", "weight", "bias"):
        torch.testing.assert_close(given[name].grad, plain[name].grad, rtol=1e-5, atol=1e-6)
    scores = torch.tensor([[float(s) for s in exact_score(z, c)] for z, c in groups]).view(5, 8)
    torch.testing.assert_close(given["logits"].grad, 3.0 * scores / temperature, rtol=0, atol=1e-5)


def test_masked_linear_without_log_prob():
    given = linear_arguments()
    y, log_prob = mk.masked_linear(**given, pattern="2:4", log_prob=False, **DRAW)
    assert log_prob is None
    assert_same_bits(y, mk.masked_linear(**given, pattern="2:4", **DRAW)[0])
    y.sum().backward()
    assert given["logits"].grad is None
    assert given["weight"].grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (0, 8), (2, 3, 8)])
def test_masked_linear_without_bias(shape, dtype):
    x, weight, logits = cpu_normal(*shape, dtype=dtype), cpu_normal(5, 8, seed=1, dtype=dtype), cpu_normal(5, 8, seed=2)
    y, _ = mk.masked_linear(x, weight, logits, pattern="2:4", **DRAW)
    masked = mk.sample_masked_weight(weight, logits, "2:4", **DRAW)
    assert masked.dtype == y.dtype == dtype
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y, nn.functional.linear(x, masked))


class Layer(nn.Module):
    """A user's own module around masked_linear."""

    def __init__(self):
        super().__init__()
        for name, tensor in linear_arguments().items():
            if name != "x":
                self.register_parameter(name, nn.Parameter(tensor.detach().clone()))

    def forward(self, x, seed, step):
        return mk.masked_linear(x, self.weight, self.logits, self.bias, pattern="2:4", seed=seed, step=step, layer=2)


def test_masked_linear_compiles_without_a_graph_break():
    torch._dynamo.reset()
    eager, whole = Layer(), Layer()
    graph = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for step in range(2):
        arguments = (cpu_normal(3, 8), torch.tensor(7), torch.tensor(step))
        (y, log_prob), (y_graph, log_prob_graph) = eager(*arguments), graph(*arguments)
        assert_same_bits(y, y_graph)
        assert_same_bits(log_prob, log_prob_graph)
        (y.sum() + log_prob).backward()
        (y_graph.sum() + log_prob_graph).backward()
    for parameter, same in zip(eager.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_a_forward_mode_derivative_is_not_lost_but_refused(name):
    operands = {"x": torch.randn(3, 16), "weight": torch.randn(4, 16), "bias": torch.randn(4)}
    codes = mk.top_n_mask(operands["weight"].abs(), "2:4")

    def product(tensor):
        own = operands | {name: tensor}
        return mk.codes_linear(own["x"], own["weight"], codes, own["bias"], pattern="2:4")

    with pytest.raises(RuntimeError, match="forward mode AD"):
        torch.func.jvp(product, (operands[name],), (torch.ones_like(operands[name]),))
    # also where nothing needs a gradient
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        product(forward_ad.make_dual(operands[name], torch.ones_like(operands[name])))


def twice(layer):
    return lambda x: layer(x).square().sum()


# What works of torch.func and of torch.autograd.functional, beside a dense layer with the same zeros
OF_FUNC = {
    "grad": lambda layer, x: torch.func.grad(twice(layer))(x),
    "jacrev": lambda layer, x: torch.func.jacrev(layer)(x),
    "vmap": lambda layer, x: torch.func.vmap(layer)(x),
    "vmap of grad": lambda layer, x: torch.func.vmap(torch.func.grad(twice(layer)))(x),
    "grad of grad": lambda layer, x: torch.func.grad(lambda x: torch.func.grad(twice(layer))(x).sum())(x),
    "hessian": lambda layer, x: torch.func.hessian(twice(layer))(x),
    "functional.jacobian": lambda layer, x: torch.autograd.functional.jacobian(layer, x),
    "functional.hessian": lambda layer, x: torch.autograd.functional.hessian(twice(layer), x),
    "functional.hvp": lambda layer, x: torch.autograd.functional.hvp(twice(layer), x, x)[1],
}
WORKS = {
    "masked": {"grad", "jacrev", "functional.jacobian"},
    "packed": {"vmap", "functional.jacobian", "functional.hessian", "functional.hvp"},
}


def test_torch_has_the_private_names_that_the_checks_read():
    """Without them ``check_transforms`` and ``in_forward_mode`` would refuse nothing."""
    assert checks._transforms is torch._C._functorch.get_interpreter_stack
    assert forward_ad._current_level == -1 and not checks.in_forward_mode()
    with forward_ad.dual_level():
        assert checks.in_forward_mode()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", WORKS)
@pytest.mark.parametrize("name", OF_FUNC)
def test_transforms_of_torch_give_what_a_dense_layer_gives_or_say_what_works(name, kind):
    torch.manual_seed(0)
    layer, x = mk.MaskedLinear.from_linear(nn.Linear(16, 8), "2:4").eval(), torch.randn(3, 16)
    dense = dense_layer(layer)
    layer = layer if kind == "masked" else mk.NMLinear.from_masked(layer)
    if name in WORKS[kind]:
        torch.testing.assert_close(OF_FUNC[name](layer, x), OF_FUNC[name](dense, x))
    else:
        with pytest.raises((ValueError, RuntimeError), match=f"^(x|grad): expected none .* a {kind} layer has"):
            OF_FUNC[name](layer, x)
