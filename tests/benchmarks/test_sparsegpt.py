"""SparseGPT against optimal brain surgery by the definition, on layers small enough for it."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.tiny_llama import tiny_model
from sparsegpt import BLOCK, prune_layer, sparsegpt
from torch import nn

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")


def by_definition(weight: torch.Tensor, gram: torch.Tensor, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, kept): column by column, the inverse of what is left of H anew for each."""
    w, kept, k = weight.clone(), torch.zeros_like(weight, dtype=torch.bool), weight.shape[1]
    for i in range(k):
        if i % m == 0:
            costs = [w[:, j].square() / torch.linalg.inv(gram[j:, j:])[0, 0] for j in range(i, i + m)]
            kept[:, i : i + m].scatter_(1, torch.stack(costs, 1).topk(n).indices, True)
        inverse = torch.linalg.inv(gram[i:, i:])
        dropped = torch.where(kept[:, i], 0.0, w[:, i])
        w[:, i:] -= dropped[:, None] * inverse[0] / inverse[0, 0]
    return w, kept


@pytest.mark.parametrize(("pattern", "k"), [("1:4", 16), ("2:4", 24), ("4:8", 24), ("2:4", BLOCK + 16)])
def test_a_layer_is_pruned_as_defined(pattern, k):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, k, dtype=torch.float64, generator=generator)
    x = torch.randn(2 * k, k, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(k, k, dtype=torch.float64, generator=generator)
    gram = x.T @ x
    found, codes = prune_layer(weight, gram, pattern)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    expected, kept = by_definition(weight, damped, *map(int, pattern.split(":")))
    assert torch.equal(mk.expand_mask(codes, pattern), kept)
    torch.testing.assert_close(found, expected * kept)
    assert torch.equal(found != 0, kept)


def test_columns_without_input_are_dropped_first():
    weight, x = torch.full((2, 8), 3.0), torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    x[:, [1, 2, 5]] = 0.0
    found, codes = prune_layer(weight, x.T @ x, "2:4")
    assert torch.equal(mk.expand_mask(codes, "2:4")[:, :4], torch.tensor([[True, False, False, True]] * 2))
    assert found.isfinite().all() and (found[:, [1, 2, 5]] == 0).all()


def test_the_best_mask_with_refitted_weights_is_found():
    """Of two inputs that are much alike one stands for both; by magnitude both weights would be kept."""
    generator = torch.Generator().manual_seed(0)
    first, own, *others = torch.randn(10, 256, generator=generator)
    x = torch.stack([first, first + 0.1 * own, *others[:6]], 1)
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.8, 1.2, 0.5, 0.7, 2.0, 1.5, 0.3, 0.2]]))
    weights, codes = sparsegpt(nn.Sequential(layer), {"0": layer}, "2:4", [x])
    target = x @ layer.weight.detach()[0]
    lost = {}
    for kept in product(combinations(range(4), 2), combinations(range(4, 8), 2)):
        columns = x[:, [place for group in kept for place in group]]
        refitted = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
        lost[kept] = float((columns @ refitted - target).square().sum())
    best = min(lost, key=lost.get)
    assert best == ((1, 3), (4, 5))
    expected = torch.zeros(8, dtype=torch.bool).index_fill_(0, torch.tensor(sum(best, ())), True)
    assert torch.equal(mk.expand_mask(codes["0"], "2:4")[0], expected)
    # what is to the left of a dropped weight stays as it is
    found = float((x @ weights["0"][0] - target).square().sum())
    dropped = float((x @ (layer.weight.detach()[0] * expected) - target).square().sum())
    assert lost[best] <= found < lost[best] + 0.1 * (dropped - lost[best])


def test_a_language_model_is_pruned_layer_by_layer_and_left_as_it_was():
    model = tiny_model()
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "head" not in name
    }
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    batches = list(torch.randint(0, 32, (3, 2, 16), generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="^model: expected config.use_cache to be False"):
        sparsegpt(model, layers, "2:4", batches)
    model.config.use_cache = False
    weights, codes = sparsegpt(model, layers, "2:4", batches)
    assert_same_bits({name: layer.weight.detach() for name, layer in layers.items()}, before)
    assert weights.keys() == codes.keys() == layers.keys()
    for name, weight in weights.items():
        assert torch.equal(weight != 0, mk.expand_mask(codes[name], "2:4"))
    # the first layers see what the dense model gives
    first = "model.layers.0.self_attn.q_proj"
    seen = []
    handle = layers[first].register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    x = torch.cat(seen)
    assert torch.equal(prune_layer(before[first], x.T @ x, "2:4")[1], codes[first])
