"""Weights without a mask are named with the reason, such as other code that reads the weight of a layer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers.architectures import tiny
from helpers.bits import assert_same_bits
from helpers.nets import refused
from torch import nn

import maskpro_kernels as mk
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
    reported = f"targets: expected layers that run as modules, got both: {READ_ELSEWHERE}"
    refused(Reader(), ValueError, reported, targets=["plain", "both"], calibration=[torch.randn(4, 8)])


def test_a_model_of_which_nothing_else_is_left_is_refused():
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8)

        def forward(self, x):
            return x @ self.one.weight

    refused(Only(), ValueError, f"fits, got none: {READ_ELSEWHERE}", calibration=[torch.randn(4, 8)])


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
def test_a_forward_that_fails_changes_nothing(fails_in_training):
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


def test_a_language_model_is_masked_but_for_embedding_and_head():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conversion = mk.convert(tiny("LLaMA").model, "2:4")
    assert conversion.masked_share == 1.0
    assert conversion.unmasked == {"model.embed_tokens.weight": "embedding", "lm_head.weight": "output head"}


def test_experts_are_counted_and_what_is_not_masked_of_a_mixture_is_named():
    model = tiny("Mixtral").model
    conversion = mk.convert(model, "2:4")
    routers = {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    assert routers | {"model.embed_tokens.weight", "lm_head.weight"} == set(conversion.unmasked)
    # attention of 2 layers: 32 x 32 twice and 16 x 32 twice; 4 experts of 96 x 32 and 32 x 48; a router of 4 x 32
    attention, experts = 2 * 3072, 2 * 4 * (96 * 32 + 32 * 48)
    assert conversion.masked_share == (attention + experts) / (attention + experts + 2 * 4 * 32)


def test_fused_modules_have_their_original_names():
    model = tiny("Mixtral").model
    conversion = mk.convert(model, "2:4", targets=["*_proj"])
    experts = "model.layers.0.mlp.experts"
    assert conversion.skipped[experts] == conversion.unmasked[f"{experts}.down_proj"] == "matches no target"


def test_a_little_masked_model_is_reported():
    model = tiny("convolutions").model
    with pytest.warns(UserWarning) as caught:
        mk.convert(model, "2:4")
    (warning,) = caught
    assert str(warning.message).startswith(
        "model: 2.5% of its matrix weights have a mask, embeddings and the output head not counted; 2 matrices have "
        "none, such as blocks.0.weight (of Conv2d, which is not an nn.Linear)"
    )
    assert warning.filename == __file__


def test_the_largest_matrix_is_named_first_and_targets_need_no_word():
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 64, 4), nn.Conv1d(8, 8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conversion = mk.convert(model, "2:4", targets=["0"])
    assert list(conversion.unmasked) == ["1.weight", "2.weight"]
    assert conversion.masked_share == 64 / (64 + 2048 + 256)


def test_the_head_of_a_model_within_another_stays_dense():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny("LLaMA").model

    conversion = mk.convert(Wrapper(), "2:4")
    assert conversion.skipped == {"inner.lm_head": "output head"} and conversion.masked_share == 1.0


def test_layers_masked_earlier_and_packed_ones_count():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    assert mk.convert(model, "2:4", targets=["0"]).masked_share == 1 / 3
    assert mk.convert(model, "2:4", targets=["1"]).masked_share == 2 / 3
    mk.finalize(model)
    packed = mk.prune.finalize.pack(model, "2:4")
    assert packed.converted == ["0", "1"] and packed.masked_share == 2 / 3
    assert packed.unmasked == {"2.weight": packed.skipped["2"]}


class Plain(nn.Linear):
    def forward(self, input):
        return input @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def forward(self, input):
        return 1.001 * nn.functional.linear(input, self.weight, self.bias)


class WithParameters(nn.Linear):
    """Like LoRA at its start, where it changes nothing."""

    def __init__(self, k, rows):
        super().__init__(k, rows)
        self.a, self.b = nn.Parameter(torch.randn(2, k)), nn.Parameter(torch.zeros(rows, 2))

    def forward(self, input):
        return nn.functional.linear(input, self.weight + self.b @ self.a, self.bias)


class WithAttribute(nn.Linear):
    def __init__(self, k, rows):
        super().__init__(k, rows)
        self.factor = 1.0

    def forward(self, input):
        return nn.functional.linear(input, self.weight, self.bias) * self.factor


class InEvalAlone(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input, self.weight, self.bias) * (0.5 if self.training else 1.0)


class WithMore(nn.Linear):
    def forward(self, input):
        return super().forward(input) if self.weight.sum() != 0 else input

    def extra(self):
        pass


class Pair(nn.Linear):
    def forward(self, input):
        return super().forward(input), input


@pytest.mark.parametrize(
    "kind",
    [
        Scaled,
        WithParameters,
        WithAttribute,
        InEvalAlone,
        WithMore,
        Pair,
        nn.modules.linear.NonDynamicallyQuantizableLinear,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_that_computes_what_a_linear_layer_does_is_one(kind, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(Plain(32, 16), kind(16, 8)).to(dtype).eval()
    x = torch.randn(3, 32, dtype=dtype)
    before = model[0](x)
    conversion = mk.convert(model, "2:4", targets=["0"])
    assert conversion.converted == ["0"] and conversion.skipped["1"] == f"subclass of nn.Linear: {kind.__name__}"
    assert not model[1].training
    with mk.dense(model):
        torch.testing.assert_close(model[0](x), before)
