"""Models of many architectures: converted, learned, finalized, saved and loaded, with the same loss; or refused."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from helpers.architectures import MAKERS, loss_of, tiny
from helpers.cases import cases
from helpers.children import ROOT
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels.hf.quantizer import put_empty_layers
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.prune.selection import coverage, select_layers
from maskpro_kernels.unfuse import as_linears

pytestmark = [
    pytest.mark.usefixtures("eager_reference"),
    # what is masked of each is asked for below
    pytest.mark.filterwarnings("ignore:model.*of its matrix weights"),
]

# Percent of the matrix weights of these tiny models that get a mask, embeddings and the output head apart
MASKED = {
    "LLaMA": 100, "Qwen3": 100, "Mistral": 100, "Gemma 3": 100, "GPT-2": 100, "OPT": 100, "Phi": 100, "Phi-3": 100,
    "BERT": 100, "T5": 100, "DeepSeek-V3": 99, "Mixtral": 99, "Qwen3-MoE": 99,
    "gpt-oss": 97, "Qwen2.5-VL": 95, "Whisper": 91, "Mamba": 86, "LLaVA": 84, "Gemma 3 with images": 74, "ViT": 70,
    "convolutions": 2, "Falcon": 100, "Zamba2": 98, "Jamba": 96, "BART": 100, "Qwen2": 100, "Gemma": 100,
    "Gemma 2": 100, "OLMo 2": 100, "StableLM": 100, "StarCoder2": 100, "Cohere": 100, "Granite": 100, "SmolLM3": 100,
    "Nemotron": 100, "GLM": 100, "GPT-NeoX": 100, "GPT-J": 100, "BLOOM": 100, "Qwen2-MoE": 99, "OLMoE": 99,
    "Mamba 2": 95, "RoBERTa": 100, "ELECTRA": 100,
}  # fmt: skip
# One of each way in which weights lie in a model
EVERY_KIND = ("LLaMA", "GPT-2", "T5", "gpt-oss", "Mamba", "Falcon", "convolutions")
# Layers that the loss does not depend on
UNUSED = {"LLaVA": ["vision_tower.encoder.layers.1."], "Gemma 3 with images": ["vision_tower.head."]}


def test_every_architecture_is_reported():
    assert MASKED.keys() == MAKERS.keys() and len(MAKERS) == 43 + 1


@pytest.mark.slow
def test_docs_have_the_table_of_shares():
    """Names and shares of all architectures, made of the models here; an assertion shows the table to put there."""
    shares: dict[int, list[str]] = {}
    for name in MAKERS.keys() - {"convolutions"}:
        model, batch = tiny(name)
        conversion = mk.convert(model, "2:4", calibration=[batch], init="wanda")
        shares.setdefault(round(100 * conversion.masked_share), []).append(name)
    rows = [f"| {share}% | {', '.join(sorted(shares[share], key=str.lower))} |" for share in sorted(shares)[::-1]]
    table = "\n".join(["| masked | architectures |", "|---:|---|", *rows])
    docs = ROOT / "docs" / "architectures.md"
    assert table in docs.read_text(encoding="utf-8"), f"expected in {docs}:\n{table}"


@pytest.mark.parametrize("name", cases(((name,) for name in MASKED), slow=lambda name: name not in EVERY_KIND))
def test_a_model_goes_all_the_way(name, tmp_path):
    model, batch = tiny(name)
    conversion = mk.convert(model, "2:4", gap=3.0, calibration=[batch], init="wanda")
    assert round(100 * conversion.masked_share) == MASKED[name]
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    masked = {f"{name}.{part}" for name in masked_layers(model) for part in ("weight", "logits")}
    assert conversion.unmasked.keys() == matrices - masked
    for estimator in (mk.Reinforce(lr=10.0), mk.StraightThrough(lr=0.5, steps=3)):
        before = {key: layer.logits.detach().clone() for key, layer in masked_layers(model).items()}
        trainer = mk.MaskTrainer(model, lambda model, batch: loss_of(model, batch), [batch], estimator, seed=0)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            trainer.run(3, progress=False)
        still = {key for key, old in before.items() if torch.equal(old, model.get_submodule(key).logits)}
        assert len(still) < len(before)
        if isinstance(estimator, mk.StraightThrough):
            assert still == {key for key in before if any(part in key for part in UNUSED.get(name, ()))}
            # layers whose mask nothing has taught are named
            assert {key for x in warned for key in before if key in str(x.message)} == still
        assert all("no finite gradient other than 0 in" in str(x.message) for x in warned)
        assert len(warned) == (name in UNUSED and isinstance(estimator, mk.StraightThrough))
    expected = [loss_of(model.eval(), batch)]
    losses = [loss_of(again, batch) for again in stored(model, tmp_path / "masked")]
    for to in ("packed", "dense"):
        torch.manual_seed(0)
        one = tiny(name).model
        mk.convert(one, "2:4", init={key: mk.top_n_mask(x.logits, "2:4") for key, x in masked_layers(model).items()})
        mk.finalize(one, to=to)
        losses.append(loss_of(one, batch))
        losses += [loss_of(again, batch) for again in stored(one, tmp_path / to)]
    torch.testing.assert_close(torch.stack(losses), expected[0].expand(len(losses)), rtol=0.0, atol=1e-6)


# By the classes of transformers whose default configuration docs/architectures.md shows: percent of the matrix weights
DEFAULTS = {
    ("Llama", "ForCausalLM"): 100.0, ("Qwen3", "ForCausalLM"): 100.0, ("Mistral", "ForCausalLM"): 100.0,
    ("Gemma3Text", "Gemma3ForCausalLM"): 100.0, ("Gemma3", "ForConditionalGeneration"): 99.8,
    ("OPT", "ForCausalLM"): 100.0, ("Phi", "ForCausalLM"): 100.0, ("Phi3", "ForCausalLM"): 100.0,
    ("Bert", "ForMaskedLM"): 100.0, ("T5", "ForConditionalGeneration"): 100.0,
    ("Whisper", "ForConditionalGeneration"): 96.9, ("ViT", "ForImageClassification"): 99.1,
    ("Qwen2_5_VL", "ForConditionalGeneration"): 100.0, ("Llava", "ForConditionalGeneration"): 100.0,
    ("Mamba", "ForCausalLM"): 97.2, ("Mixtral", "ForCausalLM"): 100.0, ("Qwen3Moe", "ForCausalLM"): 100.0,
    ("DeepseekV3", "ForCausalLM"): 100.0, ("GptOss", "ForCausalLM"): 100.0, ("GPT2", "LMHeadModel"): 100.0,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), DEFAULTS)
def test_shares_of_default_configurations(name, kind):
    """Without memory for the weights. No forward shows which weights other code reads: for Mamba they are given."""
    with torch.device("meta"):
        model = getattr(transformers, kind if kind.startswith("Gemma3F") else name + kind)(
            getattr(transformers, f"{name}Config")()
        )
    pattern = mk.NMPattern("2:4")
    as_linears(model)
    layers, skipped = select_layers(model, pattern)
    packed = {name: {"pattern": "2:4", "values": "keep"} for name in layers if not name.endswith(".dt_proj")}
    put_empty_layers(model, packed, torch.float32)
    assert round(100 * coverage(model, skipped)[0], 1) == DEFAULTS[name, kind]


def stored(model: nn.Module, folder) -> list[nn.Module]:
    """The model as transformers loads it again, where it is one of theirs."""
    if not hasattr(model, "save_pretrained"):
        return []
    model.save_pretrained(folder)
    return [type(model).from_pretrained(folder)]
