"""SparseGPT against optimal brain surgery by the definition, on layers small enough for it."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from helpers.allocated import allocated
from helpers.bits import assert_same_bits
from helpers.mask_toy import inputs, learned_mask, toy
from helpers.tiny_llama import tiny_model
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.prune.calibration import LayerMasks
from maskpro_kernels.prune.initial_masks import initial_codes
from maskpro_kernels.prune.sparsegpt import BLOCK, inverse_factor, prune_layer, sparsegpt

pytestmark = pytest.mark.usefixtures("eager_reference")


def pruned_by(weight, gram, pattern):
    """``prune_layer`` by the Gram matrix of the inputs."""
    return prune_layer(weight, gram.diagonal() == 0, inverse_factor(gram), mk.NMPattern(pattern))


def by_definition(weight: torch.Tensor, gram: torch.Tensor, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, kept): column by column, the inverse of what is left of H again for each."""
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
    codes, found = pruned_by(weight, gram, pattern)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    expected, kept = by_definition(weight, damped, *map(int, pattern.split(":")))
    assert torch.equal(mk.expand_mask(codes, pattern), kept)
    torch.testing.assert_close(found, expected * kept)
    assert torch.equal(found != 0, kept)


def test_columns_without_input_are_dropped_first():
    weight, x = torch.full((2, 8), 3.0), torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    x[:, [1, 2, 5]] = 0.0
    codes, found = pruned_by(weight, x.T @ x, "2:4")
    assert torch.equal(mk.expand_mask(codes, "2:4")[:, :4], torch.tensor([[True, False, False, True]] * 2))
    assert found.isfinite().all() and (found[:, [1, 2, 5]] == 0).all()


def test_the_best_mask_with_refitted_weights_is_found():
    """Of two similar inputs one is enough; by magnitude both weights would be kept."""
    generator = torch.Generator().manual_seed(0)
    first, own, *others = torch.randn(10, 256, generator=generator)
    x = torch.stack([first, first + 0.1 * own, *others[:6]], 1)
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.8, 1.2, 0.5, 0.7, 2.0, 1.5, 0.3, 0.2]]))
    codes, weights = sparsegpt(nn.Sequential(layer), {"0": layer}, "2:4", [x], keep_weights=True)
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
    # what is to the left of a dropped weight stays unchanged
    found = float((x @ weights["0"][0] - target).square().sum())
    dropped = float((x @ (layer.weight.detach()[0] * expected) - target).square().sum())
    assert lost[best] <= found < lost[best] + 0.1 * (dropped - lost[best])


def layers_of(model):
    named = model.named_modules()
    return {name: layer for name, layer in named if isinstance(layer, nn.Linear) and "head" not in name}


def test_a_language_model_is_pruned_layer_by_layer_and_not_changed(monkeypatch):
    model = tiny_model()
    layers, reported = layers_of(model), []
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    batches = list(torch.randint(0, 32, (3, 2, 16), generator=torch.Generator().manual_seed(0)))
    watched = {"keep_weights": True, "progress": lambda *of: reported.append(of)}
    codes, weights = sparsegpt(model, layers, "2:4", iter(batches), **watched)
    assert_same_bits({name: layer.weight.detach() for name, layer in layers.items()}, before)
    assert model.config.use_cache and reported == [(done, 14) for done in range(15)]
    assert not any("forward" in vars(layer) or layer._forward_pre_hooks for layer in layers.values())
    assert list(weights) == list(codes) == list(layers)
    for name, weight in weights.items():
        assert torch.equal(weight != 0, mk.expand_mask(codes[name], "2:4"))
    # without them only those of one block are held, and the masks are the same
    held, counts, running = [], [], LayerMasks.running
    monkeypatch.setattr(LayerMasks, "running", lambda masks: held.append(masks.weights) or running(masks))
    alone = sparsegpt(model, layers, "2:4", batches, progress=lambda *_: counts.append(len(held[0]) if held else 0))
    assert_same_bits(alone.codes, codes)
    assert alone.weights == {} and counts == [0, *range(1, 8), *range(1, 8)]
    # each layer sees what those before it give under their new weights
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, layer in layers.items()
    ]
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    for name in (first, last):
        seen.clear()
        with torch.no_grad():
            for other, layer in layers.items():
                layer.weight.copy_(before[other] if name == first or other == last else weights[other])
            for batch in batches:
                model(batch)
        x = torch.cat(seen[name]).flatten(0, 1)
        assert torch.equal(pruned_by(before[name], x.T @ x, "2:4")[0], codes[name])
    for handle in handles:
        handle.remove()


@pytest.mark.slow
def test_five_matrices_of_a_layer_are_held():
    """As in docs/large-models.md; of few rows and inputs all else is small."""
    layer, x = nn.Linear(512, 4), torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    held = allocated(lambda: sparsegpt(nn.Sequential(layer), {"0": layer}, "2:4", [x])).peak
    assert held == pytest.approx(5 * 4 * 512**2, rel=0.01)


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [24, 64], inputs [512, 64] that are correlated and of unequal norms, as those of language models are)."""
    generator = torch.Generator().manual_seed(0)
    weight, mixing = torch.randn(24, 64, generator=generator), torch.randn(64, 64, generator=generator) / 16
    scales = (0.5 * torch.randn(64, generator=generator)).exp()
    return weight, torch.randn(512, 64, generator=generator) @ (torch.eye(64) + mixing) * scales


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "8:16"])
def test_outputs_come_nearer_than_by_magnitude(pattern):
    """Of the mask alone, and nearer still with the weights that compensate for it."""
    weight, x = problem()
    gram = (x.T @ x).double()

    def lost(pruned):
        return float((((pruned - weight).double() @ gram) * (pruned - weight)).sum())

    codes, pruned = pruned_by(weight, gram, pattern)
    own = lost(weight * mk.expand_mask(codes, pattern))
    assert own < 0.8 * lost(weight * mk.expand_mask(mk.top_n_mask(weight.abs(), pattern), pattern))
    assert lost(pruned) < 0.95 * own


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**70])
def test_the_scale_of_weights_changes_no_mask(scale):
    """Of costs in float32 the squares would be 0 or infinite."""
    weight, x = problem()
    codes, pruned = pruned_by(weight, x.T @ x, "2:4")
    scaled_codes, scaled = pruned_by(weight * scale, x.T @ x, "2:4")
    assert torch.equal(scaled_codes, codes)
    assert_same_bits(scaled, pruned * scale)


def test_convert_takes_its_mask_and_leaves_the_weights():
    weight, x = problem()
    model = nn.Sequential(nn.Linear(64, 24))
    model[0].weight.data = weight.clone()
    expected, _ = pruned_by(weight, x.T @ x, "2:4")
    mk.convert(model, "2:4", init="sparsegpt", calibration=iter([x]))
    assert torch.equal(learned_mask(model[0]), mk.expand_mask(expected, "2:4"))
    assert not torch.equal(expected, mk.top_n_mask(weight.abs() * x.norm(dim=0), "2:4"))
    assert_same_bits(model[0].weight.detach(), weight)
    assert not model[0].weight_changed


def test_a_mask_of_sparsegpt_is_refitted():
    """The refit is that of any mask: the weights of SparseGPT are not taken."""
    model, batches = toy(), inputs()
    layers = {"0": model[0]}
    expected = initial_codes(layers, "2:4", "sparsegpt", model, batches)["0"]
    mk.convert(model, "2:4", init="sparsegpt", calibration=batches, refit="weights")
    assert torch.equal(learned_mask(model[0]), mk.expand_mask(expected, "2:4")) and model[0].weight_changed


def test_a_gram_matrix_that_has_no_inverse_is_refused():
    with pytest.raises(ValueError, match="^calibration: expected inputs whose Gram matrix can be inverted, "):
        inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    torch.testing.assert_close(inverse_factor(torch.zeros(4, 4)), 1.01**-0.5 * torch.eye(4))
