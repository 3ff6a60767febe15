"""Layers whose weight other code reads past the module get no mask, which would do nothing there."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.architectures import loss_of, tiny
from helpers.bits import assert_same_bits
from helpers.nets import refused
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.prune import selection
from maskpro_kernels.prune.selection import READ_ELSEWHERE, first_call, read_elsewhere

pytestmark = pytest.mark.usefixtures("eager_reference")


class Reader(nn.Module):
    """Reads weights past their modules, in a way of each name; `asked` and `plain` it only asks for what they are."""

    def __init__(self):
        super().__init__()
        for name in ("plain", "asked", "matmul", "functional", "transposed", "in_a_list", "both"):
            setattr(self, name, nn.Linear(8, 8, bias=False))

    def forward(self, x):
        x = self.asked(self.plain(x).to(self.asked.weight.dtype))
        assert self.asked.weight.shape == (8, 8) and self.asked.weight.device == x.device
        x = x @ self.matmul.weight.T
        x = nn.functional.linear(input=x, weight=self.functional.weight)
        x = self.both(torch.einsum("bi,oi->bo", x, self.transposed.weight)) + self.both.weight.sum()
        return x @ torch.cat([self.in_a_list.weight])


READ = {"matmul", "functional", "transposed", "in_a_list", "both"}


@pytest.mark.parametrize("given", ["list", "generator"])
def test_weights_that_are_read_past_the_module_are_left_out(given):
    model, batches = Reader(), [torch.randn(4, 8), torch.randn(4, 8)]
    calibration = batches if given == "list" else iter(batches)
    with pytest.warns(UserWarning, match="28.6% of its matrix weights have a mask"):
        conversion = mk.convert(model, "2:4", init="magnitude", calibration=calibration)
    assert conversion.converted == ["plain", "asked"]
    assert conversion.skipped == dict.fromkeys(READ, READ_ELSEWHERE)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_all_batches_of_a_generator_are_still_taken():
    torch.manual_seed(0)
    layer, batches = nn.Linear(8, 8), [torch.randn(4, 8) for _ in range(3)]
    models = [nn.Sequential(nn.Linear(8, 8)) for _ in range(2)]
    for model, calibration in zip(models, (batches, iter(batches)), strict=True):
        model[0].load_state_dict(layer.state_dict())
        mk.convert(model, "2:4", init="wanda", calibration=calibration)
    assert torch.equal(models[0][0].logits, models[1][0].logits)
    call, rest = first_call(iter(batches))
    assert call == ((batches[0],), {}) and len(list(rest)) == 3
    assert first_call(None) == (None, None)
    assert first_call([])[0] is None


def test_targets_that_are_read_past_the_module_are_refused():
    told = f"targets: expected layers that run as modules, got both: {READ_ELSEWHERE}"
    refused(Reader(), ValueError, told, targets=["plain", "both"], calibration=[torch.randn(4, 8)])


def test_a_model_of_which_nothing_else_is_left_is_refused():
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8)

        def forward(self, x):
            return x @ self.one.weight

    refused(Only(), ValueError, f"all matrices were left out: {READ_ELSEWHERE}", calibration=[torch.randn(4, 8)])


def test_an_embedding_that_shares_a_weight_reads_it_by_itself():
    made = tiny("OPT")
    assert made.model.lm_head.weight is made.model.get_input_embeddings().weight
    assert mk.convert(made.model, "2:4", targets=["lm_head"]).converted == ["lm_head"]


def test_without_batches_the_dummy_inputs_of_transformers_serve():
    made = tiny("Mamba")
    conversion = mk.convert(made.model, "2:4")
    names = [f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)]
    assert conversion.skipped == dict.fromkeys(names, READ_ELSEWHERE) | {"lm_head": "output head"}
    assert all(conversion.unmasked[f"{name}.weight"] == READ_ELSEWHERE for name in names)


def test_without_the_look_a_mask_would_do_nothing(monkeypatch):
    """The fault that it is there for: any mask of such a layer gives the same loss."""
    monkeypatch.setattr(selection, "read_elsewhere", lambda *_: set())
    made = tiny("Mamba")
    mk.convert(made.model, "2:4", targets=["*.dt_proj"])
    with torch.no_grad():
        before = loss_of(made.model, made.batch)
        for layer in mk.modules.masked_layers(made.model).values():
            layer.logits.neg_()
        assert torch.equal(before, loss_of(made.model, made.batch))


@pytest.mark.parametrize("inputs", [None, {"input_ids": torch.tensor([[9999]])}, {"input_ids": "no tensor"}])
def test_a_model_that_cannot_be_called_is_not_looked_at(inputs):
    class Model(nn.Module):
        dummy_inputs, device = inputs, torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.embedding, self.one = nn.Embedding(10, 8), nn.Linear(8, 8)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids):
            raise AssertionError("called")

    model = Model()
    assert read_elsewhere(model, {"one": model.one}, None) == set()


def test_a_model_without_what_the_dummy_inputs_need_is_not_looked_at():
    model = nn.Sequential(nn.Linear(8, 8))
    model.dummy_inputs = {"input_ids": torch.tensor([[1]])}
    assert mk.convert(model, "2:4").converted == ["0"]


def test_what_is_read_in_training_alone_is_found_and_nothing_else_changes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            x = nn.functional.dropout(self.norm(self.a(x)), training=self.training)
            return nn.functional.linear(x, self.b.weight) if self.training else self.b(x)

    model = Model()
    model.a.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    assert read_elsewhere(model, {"a": model.a, "b": model.b}, ((torch.randn(4, 8),), {})) == {"b"}
    assert_same_bits(list(model.state_dict().values()), list(before.values()))
    assert not model.a.training and model.b.training
    model.norm.eval()
    torch.random.set_rng_state(state)
    read_elsewhere(model, {"a": model.a}, ((torch.ones(1, 8),), {}))
    assert torch.equal(torch.random.get_rng_state(), state)


class Counting(nn.Module):
    """Counts its forwards in a buffer, and fails in one of its modes."""

    def __init__(self, fails_in_training: bool):
        super().__init__()
        self.one, self.fails_in_training = nn.Linear(8, 8), fails_in_training
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x):
        self.forwards += 1
        assert self.training != self.fails_in_training, "labels"
        return self.one(x)


@pytest.mark.parametrize("fails_in_training", [True, False])
def test_a_forward_that_fails_leaves_the_model_as_it_was(fails_in_training):
    """In training it may ask for labels; in eval mode the calibration is not for this model."""
    model, calibration = Counting(fails_in_training), [torch.randn(4, 8)]
    if fails_in_training:
        assert mk.convert(model, "2:4", calibration=calibration).converted == ["one"]
    else:
        refused(model, AssertionError, "labels", calibration=calibration)
    assert model.forwards == 0 and model.training


def test_compiled_models_are_looked_at_eagerly():
    made = tiny("LLaMA")
    for layer in made.model.model.layers:
        layer.mlp.compile(backend="eager")
    assert len(mk.convert(made.model, "2:4", calibration=[made.batch]).converted) == 14


def test_to_take_over_the_dtype_of_a_weight_is_not_to_read_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8)

        def forward(self, x):
            x = x.to(self.one.weight).type_as(self.one.weight) + torch.zeros_like(self.one.weight)[0]
            return self.one(x) + self.one.weight.new_zeros(8)

    model = Model()
    assert read_elsewhere(model, {"one": model.one}, ((torch.randn(4, 8),), {})) == set()


def test_a_model_that_fails_on_the_dummy_inputs_is_not_looked_at():
    made = tiny("LLaMA")
    made.model.forward = None
    assert read_elsewhere(made.model, {}, None) == set()
    with pytest.raises(TypeError):
        read_elsewhere(made.model, {}, ((), made.batch))
