"""A converted model comes back from a checkpoint of transformers with its masks, or is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers.architectures import tiny
from helpers.bits import assert_same_bits
from helpers.checkpoints import reconfigure, rewrite
from helpers.small_trainer import logits_of
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BitsAndBytesConfig,
)

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.text.perplexity import causal_lm_loss

pytestmark = pytest.mark.usefixtures("eager_reference")

LAYER = "model.layers.0.mlp.down_proj"


def converted(**how) -> nn.Module:
    """A model whose masks have moved, at step 3 of seed 5."""
    model = tiny_model()
    mk.convert(model, "2:4", gap=1.0, **how)
    for layer in masked_layers(model).values():
        noise = torch.randn(layer.logits.shape, generator=torch.Generator().manual_seed(layer.layer))
        layer.logits.data += noise.to(layer.logits.dtype)
    model.get_submodule(LAYER).counter_state.seed.fill_(5)
    model.get_submodule(LAYER).counter_state.step.fill_(3)
    model.get_submodule(LAYER).weight_changed = True
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    converted().save_pretrained(tmp_path / "masked")
    return tmp_path / "masked"


@pytest.mark.parametrize("saved_by", ["save_pretrained", "save_model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_and_draws_come_back(saved_by, dtype, tmp_path):
    model = converted(logits_dtype=dtype)
    model.save_pretrained(tmp_path) if saved_by == "save_pretrained" else hf.save_model(
        model, tiny_tokenizer(), tmp_path
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(logits_of(loaded), logits_of(model))
    assert_same_bits(loaded.eval()(tokens()).logits, model.eval()(tokens()).logits)
    assert_same_bits(loaded.train()(tokens()).logits, model.train()(tokens()).logits)
    mk.advance(loaded)
    mk.advance(model)
    assert_same_bits(loaded(tokens()).logits, model(tokens()).logits)
    layer = loaded.get_submodule(LAYER)
    assert layer.weight_changed and not loaded.model.layers[1].mlp.down_proj.weight_changed
    assert layer.counter_state is loaded.model.layers[1].mlp.down_proj.counter_state
    # and once more, by the config that it was loaded with
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same_bits(again.train()(tokens()).logits, loaded(tokens()).logits)


def test_a_loaded_model_goes_on_learning_as_the_saved_one(folder):
    models = [converted(), AutoModelForCausalLM.from_pretrained(folder)]
    for model in models:
        estimator = mk.StraightThrough(lr=0.5, steps=2)
        mk.MaskTrainer(model, causal_lm_loss, [tokens()], estimator, seed=0).run(2, progress=False)
    assert_same_bits(*map(logits_of, models))


def test_weights_of_a_loaded_model_are_frozen(folder, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for layer in masked_layers(loaded).values():
        assert not layer.weight.requires_grad and layer.logits.requires_grad
    mk.finalize(loaded, to="packed").save_pretrained(tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert not packed.get_submodule(LAYER).values.requires_grad


def test_logits_keep_their_dtype_where_weights_are_cast(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    layer = loaded.get_submodule(LAYER)
    assert layer.weight.dtype == torch.bfloat16 and layer.logits.dtype == torch.float32
    assert_same_bits(logits_of(loaded), logits_of(converted()))


def test_other_classes_load_it_as_well(folder):
    base = AutoModel.from_pretrained(folder)
    assert_same_bits(base(tokens()).last_hidden_state, converted().eval().model(tokens()).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(classifier.score) is nn.Linear
    assert_same_bits(logits_of(classifier), logits_of(converted()))


def test_layers_of_a_head_that_the_class_has_not_are_left_out(tmp_path):
    made = tiny("BERT")
    mk.convert(made.model, "2:4", gap=3.0)
    made.model.save_pretrained(tmp_path)
    classifier = BertForSequenceClassification.from_pretrained(tmp_path)
    assert_same_bits(logits_of(classifier), logits_of(made.model.bert))


def test_sharded_checkpoints(tmp_path):
    converted().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_bits(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(converted()))


@pytest.mark.parametrize("to", ["dense", "packed"])
def test_a_finalized_model_is_saved_as_what_it_is(to, tmp_path):
    model = converted()
    expected = model.eval()(tokens()).logits
    mk.finalize(model, to=to)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    kind = nn.Linear if to == "dense" else mk.Sparse24Linear
    assert type(loaded.get_submodule(LAYER)) is kind
    assert_same_bits(loaded(tokens()).logits, expected)
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("quantization_config" in config) == (to == "packed")


def test_a_copy_and_a_wrapped_model_are_saved_whole(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, ids):
            return self.inner(ids)

    model = tiny_model()
    mk.convert(Wrapper(model), "2:4", targets=["*.down_proj"])
    copy.deepcopy(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(logits_of(loaded), logits_of(model))
    assert len(masked_layers(loaded)) == 2


def test_a_loaded_model_that_is_finalized_is_a_dense_one(folder, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    expected = loaded(tokens()).logits
    mk.finalize(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not masked_layers_of(again)
    assert_same_bits(again(tokens()).logits, expected)


def masked_layers_of(model):
    return [module for module in model.modules() if isinstance(module, mk.MaskedLinear)]


def test_a_model_within_another_is_saved_with_its_own_masks(tmp_path):
    made = tiny("LLaVA")
    mk.convert(made.model, "2:4", gap=3.0)
    inner = made.model.model.language_model
    inner.save_pretrained(tmp_path / "inner")
    loaded = type(inner).from_pretrained(tmp_path / "inner")
    assert_same_bits(logits_of(loaded), logits_of(inner))
    made.model.save_pretrained(tmp_path / "whole")
    assert_same_bits(logits_of(type(made.model).from_pretrained(tmp_path / "whole")), logits_of(made.model))


def test_parts_may_be_finalized_and_layers_taken_away(tmp_path):
    """What is stored is what there is when it is stored."""
    model = converted()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "half")
    assert_same_bits(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "half")), logits_of(model))
    mk.finalize(model.model.layers)
    model.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert_same_bits(loaded(tokens()).logits, model.eval()(tokens()).logits)


def test_another_model_of_a_copied_config_is_a_dense_one(tmp_path):
    model = converted()
    other = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    other.save_pretrained(tmp_path)
    assert not masked_layers_of(AutoModelForCausalLM.from_pretrained(tmp_path))
    # and one that comes out of a pickle has its masks
    torch.save(model, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False).save_pretrained(tmp_path / "again")
    assert_same_bits(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits_of(model))


def test_what_another_library_has_quantized_is_refused():
    model = tiny_model()
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="model: expected one whose config has no quantization_config, got BitsAndB"):
        mk.convert(model, "2:4")
    assert_same_bits(list(model.state_dict().values()), list(before.values()))
    assert not masked_layers_of(model)


def test_what_cannot_come_back_is_refused(tmp_path):
    model = tiny_model()
    mk.convert(model, "2:4", targets=["*down_proj"])
    mk.finalize(model, to="packed")
    mk.convert(model, "2:4", targets=["*up_proj"])
    with pytest.raises(ValueError, match="model: expected masked or packed layers, got both"):
        hf.save_model(model, tiny_tokenizer(), tmp_path / "both")
    assert not (tmp_path / "both").exists()
    with pytest.raises(ValueError, match="model: expected masked or packed layers, got both"):
        model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()
    model = converted()
    model.model.layers[1].mlp.down_proj.layer = 0
    with pytest.raises(ValueError, match="expected a layer id of its own for each layer, got 0 in"):
        model.save_pretrained(tmp_path / "ids")
    model = converted()
    model.model.layers[1].mlp.down_proj.counter_state = mk.modules.CounterState(9)
    with pytest.raises(ValueError, match="expected one seed and one step for all layers, got"):
        model.save_pretrained(tmp_path / "seeds")
    shard = mk.MaskedLinear(torch.ones(4, 8), None, torch.ones(4, 8), "2:4", group_offset=8)
    model = tiny_model()
    model.model.layers[0].mlp.shard = shard
    with pytest.raises(ValueError, match="model: expected whole layers, got a shard in model.layers.0.mlp.shard"):
        hf.save_model(model, tiny_tokenizer(), tmp_path / "shard")


@pytest.mark.slow
def test_without_the_import_transformers_tells_what_it_does_not_know(folder):
    """It gives the dense model, which no file can forbid; but not without a word."""
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Unknown quantization type, got maskpro-mask" in done.stderr and "logits" in done.stderr


DAMAGES = {
    "expected logits of the 14 layers that its quantization_config names, such as .*, got 13": (
        rewrite(lambda tensors: tensors.pop(f"{LAYER}.logits"))
    ),
    "expected _extra_state of the 14 layers": rewrite(lambda tensors: tensors.pop(f"{LAYER}._extra_state")),
    "expected extra state of shape .8., got .7.": (
        rewrite(lambda tensors: tensors.update({f"{LAYER}._extra_state": torch.zeros(7, dtype=torch.int64)}))
    ),
    "expected the extra state of each layer": (
        rewrite(lambda tensors: tensors.update({f"{LAYER}._extra_state": torch.full((8,), 99)}))
    ),
    "expected logits of F32 or BF16 or F16, got .'F32', 'I8'.": (
        rewrite(lambda tensors: tensors.update({f"{LAYER}.logits": tensors[f"{LAYER}.logits"].to(torch.int8)}))
    ),
    "expected the extra state of a whole 2:4 layer": (
        rewrite(lambda tensors: tensors[f"{LAYER}._extra_state"].index_fill_(0, torch.tensor([1]), 1))
    ),
    "expected pattern and layer of": reconfigure(lambda config: config["layers"].update({LAYER: {"pattern": "2:4"}})),
    "pattern: expected N:M": (
        reconfigure(lambda config: config["layers"].update({LAYER: {"pattern": "2:5", "layer": 0}}))
    ),
    "got 'model.nothing', which is none of its modules": (
        reconfigure(lambda config: config["layers"].update({"model.nothing": config["layers"].pop(LAYER)}))
    ),
    "expected version 1, got 2": reconfigure(lambda config: config.update(version=2)),
    "expected format 'logits', got 'other'": reconfigure(lambda config: config.update(format="other")),
    "expected no others than its own settings, got .'speed'": reconfigure(lambda config: config.update(speed=1)),
}


@pytest.mark.parametrize("told", DAMAGES)
def test_damaged_checkpoints_are_refused(told, folder):
    DAMAGES[told](folder)
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(folder)
    with hf.without_digests(), pytest.raises(ValueError, match=told):
        AutoModelForCausalLM.from_pretrained(folder)
