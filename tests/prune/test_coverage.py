"""How much of a model has a mask is told, and what has none is named."""

from __future__ import annotations

import warnings

import pytest
import transformers as tf
from helpers.architectures import GROUPED, tiny
from torch import nn

import maskpro_kernels as mk

pytestmark = pytest.mark.usefixtures("eager_reference")


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


def test_matrices_of_experts_that_the_pattern_does_not_fit_are_named():
    # 32 inputs of one, 40 of the other
    sizes = {**GROUPED, "intermediate_size": 40}
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))
    with pytest.warns(UserWarning, match="of its matrix weights"):
        conversion = mk.convert(model, "8:16")
    attention, gates = 2 * 3072, 2 * 4 * 80 * 32
    assert conversion.masked_share == (attention + gates) / (attention + gates + 2 * 4 * (32 * 40 + 32))
    left = {f"model.layers.{i}.mlp.experts.linears.down_proj.{e}" for i in range(2) for e in range(4)}
    assert left <= conversion.skipped.keys()
    assert {conversion.unmasked[f"{name}.weight"] for name in left} == {"in_features 40 not divisible by 16"}


def test_what_was_put_together_again_is_named_as_it_was_built():
    model = tiny("Mixtral").model
    conversion = mk.convert(model, "2:4", targets=["*_proj"])
    experts = "model.layers.0.mlp.experts"
    assert conversion.skipped[experts] == conversion.unmasked[f"{experts}.down_proj"] == "matches no target"


def test_a_little_masked_model_is_told_of():
    model = tiny("convolutions").model
    with pytest.warns(UserWarning) as caught:
        mk.convert(model, "2:4")
    (warning,) = caught
    assert str(warning.message).startswith(
        "model: 2.5% of its matrix weights have a mask, embeddings and the output head apart; 2 matrices have none, "
        "such as blocks.0.weight (of Conv2d, which is no nn.Linear)"
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
