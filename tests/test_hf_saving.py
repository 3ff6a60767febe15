"""Sparse layers put into a model by hand are saved as such, and a loaded model is made dense by ``dequantize``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers import moe_jobs
from helpers.architectures import tiny
from helpers.bits import assert_same_bits
from helpers.children import environment
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.hf.stored_files import check_dense_parts_stored
from maskpro_kernels.packed import SPARSE
from maskpro_kernels.prune.finalize import unpack

pytestmark = pytest.mark.usefixtures("eager_reference")

LAYER = "model.layers.0.mlp.down_proj"


def tokens() -> torch.Tensor:
    return torch.arange(12).view(1, 12)


def pruned(**settings) -> nn.Module:
    """With exact zeros."""
    model = tiny_model(**settings)
    mk.convert(model, "2:4")
    return mk.finalize(model)


def packed_by_hand(names=(LAYER,), values: str = "keep") -> nn.Module:
    model = pruned()
    for name in names:
        model.set_submodule(name, mk.NMLinear.from_dense(model.get_submodule(name), "2:4", values))
    return model


def written(folder) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("saved_by", ["save_pretrained", "save_model"])
@pytest.mark.parametrize("values", ["keep", "int8"])
def test_layers_packed_by_hand_come_back(values, saved_by, tmp_path):
    model = packed_by_hand(values=values)
    if saved_by == "save_model":
        hf.save_model(model, tiny_tokenizer(), tmp_path)
    else:
        model.save_pretrained(tmp_path)
    assert written(tmp_path)["quantization_config"]["patterns"] == {"2:4": [LAYER]}
    assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, model(tokens()).logits)


def test_a_part_that_was_converted_comes_back(tmp_path):
    model = tiny_model()
    mk.convert(model.model.layers, "2:4")
    model.save_pretrained(tmp_path)
    assert "taken_apart" not in written(tmp_path)["quantization_config"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(isinstance(layer, mk.MaskedLinear) for layer in loaded.modules()) == 14
    assert_same_bits(loaded(tokens()).logits, model(tokens()).logits)
    # and once more, with a layer less and one that is packed instead of all
    unpacked = mk.finalize(loaded, to="packed")
    unpacked.set_submodule(LAYER, nn.Linear(64, 32, bias=False))
    unpacked.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same_bits(again(tokens()).logits, unpacked(tokens()).logits)
    assert type(again.get_submodule(LAYER)) is nn.Linear


def test_layers_taken_out_by_hand_are_no_longer_told_of(tmp_path):
    packed_by_hand().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "again")
    assert written(tmp_path / "again") == written(tmp_path)
    linear = nn.Linear(64, 32, bias=False)
    linear.weight.data = model.get_submodule(LAYER).weight
    model.set_submodule(LAYER, linear)
    assert isinstance(model.config.quantization_config, hf.PackedConfig)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in written(tmp_path / "dense")
    assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(tokens()).logits, model(tokens()).logits)


BY_HAND = """
import sys
from transformers import AutoModelForCausalLM
from maskpro_kernels import {kind}

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.set_submodule("{layer}", {kind}.{made}(model.get_submodule("{layer}"), "2:4"))
model.save_pretrained(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("kind", "made"),
    [("NMLinear", "from_dense"), pytest.param("MaskedLinear", "from_linear", marks=pytest.mark.slow)],
)
def test_who_never_imports_hf_saves_what_can_be_loaded(kind, made, tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path / "dense")
    code = BY_HAND.format(kind=kind, made=made, layer=LAYER)
    folders = [str(tmp_path / "dense"), str(tmp_path / "by-hand")]
    subprocess.run([sys.executable, "-c", code, *folders], check=True, env=environment())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "by-hand")
    assert type(loaded.get_submodule(LAYER)).__name__ in ("Sparse24Linear", "MaskedLinear")
    assert_same_bits(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("to", [None, "packed"])
def test_files_of_ranks_are_refused_before_anything_is_written(to, tmp_path):
    model = tiny_model()
    mk.convert(model, "2:4")
    if to is not None:
        mk.finalize(model, to=to)
    model.config.distributed_config = DistributedConfig(fsdp_size=2)
    with pytest.raises(ValueError) as error:
        model.save_pretrained(tmp_path / "parts", distributed_checkpoint=True)
    assert str(error.value) == (
        "distributed_checkpoint: expected False for a model with masked or packed layers, got True, whose files "
        "from_pretrained refuses beside a quantization_config; without it rank 0 writes whole layers"
    )
    assert not (tmp_path / "parts").exists()


def test_packed_by_hand_beside_another_quantization_is_refused(tmp_path):
    model = packed_by_hand()
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="model: expected one whose config has no quantization_config, got BitsAnd"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


FORMS = ["masked", "packed", "int8"]


def stored(form: str, folder, **settings) -> nn.Module:
    """A model of transformers' own class, loaded from a folder."""
    model = tiny_model(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    mk.convert(model, "2:4")
    if form != "masked":
        mk.finalize(model, to="packed", values="int8" if form == "int8" else "keep")
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_dequantized_model_is_an_ordinary_dense_one(form, tied, tmp_path):
    model = stored(form, tmp_path / "sparse", tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    expected = model(tokens()).logits
    weights = {
        name: layer.top_n_weight() if form == "masked" else layer.packed.unpack()
        for name, layer in model.named_modules()
        if isinstance(layer, SPARSE)
    }
    assert model.is_quantized
    dense = model.dequantize()
    assert dense is model and not any(isinstance(layer, SPARSE) for layer in dense.modules())
    assert_same_bits({name: dense.get_submodule(name).weight for name in weights}, weights)
    torch.testing.assert_close(dense(tokens()).logits, expected)
    assert not dense.is_quantized and not hasattr(dense, "hf_quantizer") and not hasattr(dense, "quantization_method")
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in written(tmp_path / "dense")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    assert not getattr(again, "is_quantized", False)
    assert_same_bits(again(tokens()).logits, dense(tokens()).logits)
    # what transformers refuses of quantized models
    assert dense.half().dtype == torch.float16


@pytest.mark.parametrize("form", FORMS)
def test_a_dequantized_model_has_one_dtype(form, tmp_path):
    frequencies = stored(form, tmp_path).model.rotary_emb.inv_freq
    for model, asked, dtype in (
        (stored(form, tmp_path), torch.bfloat16, torch.bfloat16),
        # one that was cast since it was loaded
        (stored(form, tmp_path).to(torch.float16), None, torch.float16),
    ):
        dense = model.dequantize(asked)
        assert {parameter.dtype for parameter in dense.parameters()} == {dtype}
        zeros = dense.get_submodule(LAYER).weight.view(-1, 4) == 0
        assert (zeros.sum(-1) >= 2).all()
        if asked is not None:
            assert_same_bits(dense.model.rotary_emb.inv_freq, frequencies)


def test_dequantized_modules_are_put_together_again(tmp_path):
    model, batch = tiny("GPT-2")
    built = {name: type(module).__name__ for name, module in model.named_modules()}
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed").save_pretrained(tmp_path)
    assert "transformer.h.0.attn.c_attn" in written(tmp_path)["quantization_config"]["taken_apart"]
    dense = type(model).from_pretrained(tmp_path).dequantize().eval()
    assert {name: type(module).__name__ for name, module in dense.named_modules()} == built
    unpack(model)
    torch.testing.assert_close(dense(**batch).logits, model.eval()(**batch).logits)


def test_dense_matrices_of_what_is_taken_apart_have_to_be_stored(tmp_path):
    """transformers would load a checkpoint that lacks them, with random values in their place."""
    model = AutoModelForCausalLM.from_pretrained(moe_jobs.write_checkpoint(tmp_path))
    mk.convert(model, "2:4", targets=["*.down_proj.*"])
    names = list(model.state_dict())
    check_dense_parts_stored(model, names)
    lacking = f"{moe_jobs.EXPERTS}.linears.gate_proj.0"
    with pytest.raises(
        ValueError, match=f"^checkpoint: expected the matrices of {moe_jobs.EXPERTS}, .* of {lacking}; "
    ):
        check_dense_parts_stored(model, [name for name in names if not name.startswith(lacking)])
