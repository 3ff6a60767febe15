"""SmolLM2-135M under 2:4: the own work of a training step on all its 210 layers, and whole steps by estimator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import eager
import pytest
import torch
from harness import DEVICE, Work

import maskpro_kernels as mk
from maskpro_kernels.functional.checks import counter_of
from maskpro_kernels.ops import reference
from maskpro_kernels.ops.counter import MaskSource
from maskpro_kernels.ops.pattern import NMPattern
from maskpro_kernels.text.perplexity import causal_lm_loss

pytest.importorskip("gguf", reason="reading SmolLM2-135M needs the extra demo")
hf = pytest.importorskip("maskpro_kernels.hf")

PATTERN = "2:4"
N = 2
M = 4
SHAPE = (8, 128)
COEF = 1e-6
SEED = 11


@pytest.fixture(scope="session")
def model():
    """Frozen weights in bfloat16."""
    try:
        loaded, _ = hf.load_model("smollm2-135m", torch.bfloat16)
    except (ImportError, OSError, ValueError) as error:
        pytest.skip(f"SmolLM2-135M is not here: {error}")
    return loaded.to(DEVICE).eval().requires_grad_(False)


@pytest.fixture
def batch() -> torch.Tensor:
    tokens = torch.randint(0, 49152, SHAPE, generator=torch.Generator().manual_seed(0))
    return tokens.to(DEVICE)


class Layers:
    """Weights and logits of all layers, and the step's own work on them by each provider."""

    def __init__(self, model):
        mk.convert(model, PATTERN, gap=10.0)
        self.layers = [module for module in model.modules() if isinstance(module, mk.MaskedLinear)]
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        self.seed, self.step = (torch.tensor(i, dtype=torch.int64, device=DEVICE) for i in (SEED, 0))
        # each side moves its own logits
        self.eager_logits = [layer.logits.clone() for layer in self.layers]
        self.eager_masks = [None] * len(self.layers)

    def counter(self, layer) -> dict:
        return {"seed": self.seed, "step": self.step, "layer": layer.layer}

    def draw(self, layer):
        mk.sample_masked_weight(layer.weight, layer.logits, PATTERN, **self.counter(layer))

    def update(self, layer):
        mk.score_update_(layer.logits, COEF, pattern=PATTERN, **self.counter(layer))

    def eager_draw(self, i):
        self.eager_masks[i], _ = eager.draw(self.layers[i].weight, self.eager_logits[i], self.generator)

    def eager_update(self, i):
        eager.update_(self.eager_logits[i], self.eager_masks[i], COEF)

    def provider_parts(self) -> dict[str, list[Callable[[], None]]]:
        """A step's own work, one layer after another: all are drawn, then all are updated."""
        layers = self.layers
        numbers = range(len(self.layers))
        draws, updates = ([partial(f, layer) for layer in layers] for f in (self.draw, self.update))
        eager_draws, eager_updates = ([partial(f, i) for i in numbers] for f in (self.eager_draw, self.eager_update))
        return {
            "ours": [*draws, *updates, lambda: self.step.add_(1)],
            "eager formulation": [*eager_draws, *eager_updates, lambda: None],
        }

    def check(self):
        """The smallest layer has the bits of the reference."""
        layer = min(self.layers, key=lambda layer: layer.weight.numel())
        counter = counter_of(layer.logits, NMPattern(PATTERN), **self.counter(layer))
        masked = mk.sample_masked_weight(layer.weight, layer.logits, PATTERN, **self.counter(layer))
        source = MaskSource(layer.logits, "drawn", N, M, 1.0, counter)
        assert torch.equal(masked, reference.masked_weight(layer.weight, source))
        ours = layer.logits.clone()
        expected = layer.logits.clone()
        mk.score_update_(ours, 0.37, pattern=PATTERN, **self.counter(layer))
        coef = torch.tensor([0.37], device=DEVICE)
        by_draws = counter._replace(draw=counter.draw[None])
        reference.score_update_(expected, coef, N, M, 1.0, by_draws)
        assert torch.equal(ours, expected)


def test_draw_and_update_of_all_layers(model, compare):
    with torch.inference_mode():
        layers = Layers(copy.deepcopy(model))
        weights = sum(layer.weight.numel() for layer in layers.layers)
        compare(
            layers.check,
            layers.provider_parts(),
            work=Work(bytes=12 * weights),
            op="draw+update, all layers",
            pattern=PATTERN,
            shape=(len(layers.layers),),
            dtype="bfloat16 weight, float32 logits",
        )


def test_training_step(model, batch, compare):
    """Steps of each estimator, with the forward, and the forward and backward, of the unmasked model."""
    trainers = {}
    for name, estimator, gap in (
        ("REINFORCE", mk.Reinforce(lr=1.0), 10.0),
        ("straight-through", mk.StraightThrough(lr=1e-6), 15.0),
    ):
        converted = copy.deepcopy(model)
        mk.convert(converted, PATTERN, gap=gap)
        trainers[name] = mk.MaskTrainer(converted, causal_lm_loss, [batch], estimator, seed=0)
    dense_model = copy.deepcopy(model)
    weights = [
        dense_model.get_submodule(name).weight.requires_grad_()
        for name in mk.convert(copy.deepcopy(model), PATTERN).converted
    ]

    @torch.inference_mode()
    def forward():
        return causal_lm_loss(dense_model, batch)

    def forward_and_backward():
        causal_lm_loss(dense_model, batch).backward()
        for weight in weights:
            weight.grad = None

    def check():
        """A step moves logits, and only those."""
        for name, trainer in trainers.items():
            layer = next(iter(trainer.layers.values()))
            logits = layer.logits.detach().clone()
            weight = layer.weight.clone()
            record = trainer.step()
            assert torch.isfinite(torch.tensor(record.loss)), name
            assert not torch.equal(layer.logits, logits), name
            assert torch.equal(layer.weight, weight), name

    compare(
        check,
        {
            "REINFORCE": trainers["REINFORCE"].step,
            "straight-through": trainers["straight-through"].step,
            "dense forward": forward,
            "dense forward and backward": forward_and_backward,
        },
        op="training step",
        pattern=PATTERN,
        shape=SHAPE,
        dtype="bfloat16 weight, float32 logits",
    )
