"""LoRA of peft beside masked and packed layers: it trains, is saved and loaded, and merges only where zeros stay."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from helpers.architectures import tiny
from helpers.bits import assert_same_bits
from helpers.tiny_llama import tiny_model, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig
from torch import nn
from transformers import AutoModelForCausalLM

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.kept_zeros import KeptZeros
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.peft import SparseLoraLinear, beside_masks
from maskpro_kernels.prune.finalize import unpack
from maskpro_kernels.text.perplexity import causal_lm_loss
from maskpro_kernels.unfuse import ADAPTER

pytestmark = [pytest.mark.ecosystem, pytest.mark.usefixtures("eager_reference")]

LAYER = "model.layers.0.mlp.down_proj"
TARGETS = ["q_proj", "down_proj"]


def config(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options)


def tokens() -> torch.Tensor:
    return torch.randint(0, 30, (4, 9), generator=torch.Generator().manual_seed(0))


def sparse(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_model()
    mk.convert(model, "2:4", gap=60.0)
    if kind == "masked":
        return model
    return mk.finalize(model, to="packed", values="int8") if kind == "int8" else mk.finalize(model, to=kind)


def train(model: nn.Module, steps: int = 5) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = causal_lm_loss(model, tokens())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("kind", ["masked", "packed", "int8"])
def test_lora_beside_sparse_layers_trains_is_saved_and_loaded(kind, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(sparse(kind), beside_masks(config()))
    dense = sparse(kind)
    if kind == "masked":
        mk.finalize(dense)
    else:
        unpack(dense)
    expected = get_peft_model(dense, config())
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    losses = train(model.train())
    assert losses[-1] < losses[0]
    # as beside the dense layers with the same zeros
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(train(expected.train())), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(sparse(kind), tmp_path, config=beside_masks(LoraConfig.from_pretrained(tmp_path)))
    assert_same_bits(again.eval()(tokens()).logits, model.eval()(tokens()).logits)


@pytest.mark.parametrize("kind", ["masked", "packed", "int8"])
def test_merging_into_a_sparse_layer_is_refused(kind):
    model = get_peft_model(sparse(kind), beside_masks(config()))
    train(model, 1)
    before = model(tokens()).logits
    for merge in (model.merge_adapter, copy.deepcopy(model).merge_and_unload):
        with pytest.raises(ValueError, match=r"merge: expected a dense base layer, got a masked .*KeptZeros"):
            merge()
    assert_same_bits(model(tokens()).logits, before)


def test_lora_beside_an_output_layer_in_int8():
    torch.manual_seed(0)
    model = tiny_model()
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed", values="int8", output_layer="int8")
    for everywhere in ("all-linear", ["lm_head", "q_proj"]):
        adapted = get_peft_model(copy.deepcopy(model), beside_masks(config(target_modules=everywhere), model))
        head = adapted.base_model.model.lm_head
        # as for a dense model, "all-linear" leaves out the output layer
        assert isinstance(head, SparseLoraLinear) == (everywhere != "all-linear")
        losses = train(adapted.train())
        assert losses[-1] < losses[0]
        with pytest.raises(ValueError, match="merge: expected a dense base layer"):
            adapted.merge_adapter()


@pytest.mark.parametrize("convert_first", [True, False])
def test_what_is_finalized_merges_again(convert_first):
    torch.manual_seed(0)
    model = get_peft_model(sparse("masked") if convert_first else tiny_model(), beside_masks(config()))
    if not convert_first:
        mk.convert(model, "2:4", gap=60.0)
    train(model, 1)
    mk.finalize(model)
    expected = model.eval()(tokens()).logits
    torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def test_adapters_that_are_merged_are_refused():
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), config())
    model.merge_adapter()
    with pytest.raises(ValueError, match="model: expected adapters that are not merged, got a merged one in .*_proj"):
        mk.convert(model, "2:4")
    assert not any(isinstance(module, mk.MaskedLinear) for module in model.modules())


def test_what_is_trained_as_a_whole_gets_no_mask():
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), config(modules_to_save=["up_proj"]))
    conversion = mk.convert(model, "2:4")
    assert not any("modules_to_save" in name for name in conversion.converted)
    assert any("up_proj.original_module" in name for name in conversion.converted)
    assert [p for name, p in model.named_parameters() if "modules_to_save" in name][0].requires_grad


def test_masks_learned_beside_lora_do_not_touch_the_adapters():
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), config())
    conversion = mk.convert(model, "2:4", gap=60.0)
    adapters = {name for name, reason in conversion.skipped.items() if reason == ADAPTER}
    assert len(adapters) == 2 * 2 * len(TARGETS) and all("lora_" in name for name in adapters)
    masked = masked_layers(model)
    assert len(masked) == 14 and f"base_model.{LAYER.replace('model', 'model.model', 1)}.base_layer" in masked
    with pytest.raises(ValueError, match="merge: expected a dense base layer"):
        model.merge_and_unload()
    estimator = mk.StraightThrough(lr=0.5, steps=2)
    mk.MaskTrainer(model, causal_lm_loss, [tokens()], estimator, seed=0).run(2, progress=False)


def test_a_merge_into_a_dense_export_keeps_its_zeros():
    torch.manual_seed(0)
    plain = sparse("dense")
    zeros = plain.get_submodule(LAYER).weight == 0
    model = get_peft_model(plain, config())
    kept = KeptZeros(model, "2:4")
    assert len(kept.held) == 14 and not any("lora_" in name for name in kept.held)
    train(model)
    merged = model.merge_and_unload()
    # the fault that it is there for
    assert not torch.equal(merged.get_submodule(LAYER).weight == 0, zeros)
    kept.restore()
    assert torch.equal(merged.get_submodule(LAYER).weight == 0, zeros)


REFUSED = {
    "use_dora: expected False": {"use_dora": True},
    "kasa_config: expected None": {"kasa_config": KasaConfig()},
    **{
        f"init_lora_weights: expected .* got '{name}'": {"init_lora_weights": name}
        for name in ("pissa", "pissa_niter_4", "olora", "orthogonal", "mica")
    },
}


@pytest.mark.parametrize("reported", REFUSED)
def test_what_reads_or_changes_the_base_weight_is_refused_before_anything_changes(reported):
    with pytest.raises(ValueError, match=reported):
        beside_masks(config(**REFUSED[reported]))
    # a dense layer alone may have it
    assert get_peft_model(sparse("masked"), config(**REFUSED[reported], target_modules=["lm_head"]))
    assert get_peft_model(sparse("masked"), beside_masks(config(target_modules=["lm_head", "q_proj"])))


@pytest.mark.parametrize("kind", ["masked", "packed", "int8"])
@pytest.mark.parametrize("reported", [reported for reported in REFUSED if "kasa" not in reported])
def test_a_second_adapter_is_held_to_the_same(reported, kind, tmp_path):
    model = get_peft_model(sparse(kind), beside_masks(config(target_modules=["embed_tokens", "q_proj"])))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # the layers have an adapter, so peft asks none for a second one
    with pytest.raises(ValueError, match=reported):
        model.add_adapter("two", config(**REFUSED[reported], target_modules=["q_proj"]))
    assert "two" not in model.peft_config and model.state_dict().keys() == before.keys()
    # one that was trained beside a dense model
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | REFUSED[reported]))
    with pytest.raises(ValueError, match=reported):
        model.load_adapter(tmp_path, "two")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    model.add_adapter("two", config(target_modules=["q_proj"]))


def test_a_configuration_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="config: expected peft.LoraConfig, got dict"):
        beside_masks({})


def test_the_import_changes_nothing_of_peft():
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] is peft.LoraModel
    with pytest.raises(ValueError, match="Target module MaskedLinear"):
        get_peft_model(sparse("masked"), config())


@pytest.mark.parametrize("kind", ["masked", "packed", "int8"])
def test_a_saved_adapter_is_loaded_by_its_configuration(kind, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    sparse(kind).save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), beside_masks(config()))
    train(model, 2)
    model.save_pretrained(adapter)
    expected = model.eval()(tokens()).logits
    again = AutoModelForCausalLM.from_pretrained(base)
    again.load_adapter(adapter, peft_config=beside_masks(LoraConfig.from_pretrained(adapter), again))
    assert_same_bits(again.eval()(tokens()).logits, expected)
    again = AutoModelForCausalLM.from_pretrained(base)
    again = PeftModel.from_pretrained(again, adapter, config=beside_masks(LoraConfig.from_pretrained(adapter), again))
    assert_same_bits(again.eval()(tokens()).logits, expected)
    with pytest.raises(ValueError, match="merge: expected a dense base layer"):
        again.merge_and_unload()


def test_all_linear_layers_are_the_sparse_ones_too():
    shorthand = LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(ValueError, match="model: expected the one that gets the adapter, .* got None"):
        beside_masks(shorthand)
    model = sparse("packed")
    model = get_peft_model(model, beside_masks(shorthand, model))
    adapted = {name for name, layer in model.named_modules() if isinstance(layer, SparseLoraLinear)}
    assert len(adapted) == 14 and not any("lm_head" in name for name, _ in model.named_modules() if "lora_A" in name)
    model.add_adapter("two", beside_masks(LoraConfig(r=2, target_modules="all-linear"), model))
    assert {name for name, layer in model.named_modules() if "two" in getattr(layer, "lora_A", {})} == adapted


def test_a_configuration_serves_models_of_any_depth():
    for targets in (["q_proj"], r".*\.q_proj", "all-linear"):
        shared = LoraConfig(r=2, target_modules=targets)
        before = copy.copy(shared.target_modules)
        model = sparse("packed")
        get_peft_model(model, beside_masks(shared, model))
        assert shared.target_modules == before


def test_targets_of_a_model_with_experts_are_whole_names(tmp_path):
    def made():
        model = tiny("gpt-oss").model
        mk.convert(model, "2:4")
        # a name that ends with that of a target
        model.extra = nn.ModuleDict({"model": nn.ModuleDict({"layers": copy.deepcopy(model.model.layers)})})
        return model

    def adapted(model):
        return {name for name, layer in model.named_modules() if "default" in getattr(layer, "lora_A", ())}

    config = LoraConfig(r=2, target_modules=r"model\.layers\.0\.self_attn\.q_proj")
    model = made()
    model = get_peft_model(model, beside_masks(config, model))
    assert adapted(model) == {"base_model.model.model.layers.0.self_attn.q_proj"}
    model.save_pretrained(tmp_path)
    again = made()
    again = PeftModel.from_pretrained(again, tmp_path, config=beside_masks(LoraConfig.from_pretrained(tmp_path), again))
    assert adapted(again) == adapted(model)


@pytest.mark.parametrize("kind", ["masked", "packed"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_layers_of_experts_are_among_the_targets(name, kind, tmp_path):
    def made():
        model, batch = tiny(name)
        mk.convert(model, "2:4", gap=60.0)
        return (model if kind == "masked" else mk.finalize(model, to="packed")), batch

    def adapted(model, adapter="default"):
        return {name for name, layer in model.named_modules() if adapter in getattr(layer, "lora_A", ())}

    # attention, experts, routers; peft counts 14 of the dense model, where all experts have one
    for targets, count in (("all-linear", 8 + 24 + 2), (["gate_proj", "up_proj", "down_proj"], 24), (["up_proj"], 8)):
        model, batch = made()
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        with warnings.catch_warnings(action="error", category=RuntimeWarning):
            model = get_peft_model(model, beside_masks(config, model)).eval()
        assert len(adapted(model)) == count
        sparse = {key for key, layer in model.named_modules() if isinstance(layer, SparseLoraLinear)}
        assert len(sparse) == count - 2 * (targets == "all-linear")
        folder = tmp_path / str(count)
        model.save_pretrained(folder)
        again, _ = made()
        saved = beside_masks(LoraConfig.from_pretrained(folder), again)
        again = PeftModel.from_pretrained(again, folder, config=saved).eval()
        assert_same_bits(again(**batch).logits, model(**batch).logits)
        model.add_adapter("two", beside_masks(LoraConfig(r=2, target_modules=targets), model))
        assert adapted(model, "two") == adapted(model)


def test_modules_that_an_adapter_reads_past_their_forward_do_not_change():
    mixture = tiny("Mixtral")
    options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = get_peft_model(mixture.model, beside_masks(LoraConfig(r=2, **options)))
    with pytest.warns(UserWarning, match="of its matrix weights"):
        mk.convert(model, "2:4")
    model(**mixture.batch)


def test_lora_on_masked_experts_is_saved_and_merged_after_finalize(tmp_path):
    torch.manual_seed(0)
    # of Mixtral peft knows other names, by which it finds no such layers
    model, batch = tiny("gpt-oss")
    mk.convert(model, "2:4")
    options = {"target_modules": r".*linears\.down_proj\.[0-9]+", "init_lora_weights": False}
    model = mk.finalize(get_peft_model(model, beside_masks(LoraConfig(r=2, **options)))).eval()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    # still unfused, and stored as such
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["masked", "packed", "int8"])
@pytest.mark.parametrize("options", [{}, {"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_a_model_with_adapters_in_it_is_not_saved(options, kind, tmp_path):
    model, folder = get_peft_model(sparse(kind), beside_masks(config(**options))), tmp_path / "out"
    with pytest.raises(ValueError, match=r"model: expected one without adapters of peft .*; save the adapter .*unload"):
        hf.save_model(model.base_model.model, tiny_tokenizer(), folder)
    assert not folder.exists()
    # as the message says
    model.save_pretrained(tmp_path / "adapter")
    plain = model.unload()
    plain.save_pretrained(folder)
    assert_same_bits(AutoModelForCausalLM.from_pretrained(folder)(tokens()).logits, plain(tokens()).logits)


def test_a_checkpoint_with_adapters_in_it_is_not_loaded(tmp_path):
    """That of save_pretrained of the model inside, which transformers lets pass."""
    get_peft_model(sparse("packed"), beside_masks(config())).base_model.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="checkpoint: expected one without adapters of peft, .*unload"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_adapters_that_transformers_has_added_are_saved_alone(tmp_path, monkeypatch):
    # it asks for the newest peft
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)
    model = sparse("packed")
    model.add_adapter(beside_masks(config(init_lora_weights=False), model))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "config.json").exists()
    again = sparse("packed")
    again.load_adapter(tmp_path, peft_config=beside_masks(LoraConfig.from_pretrained(tmp_path), again))
    assert_same_bits(again(tokens()).logits, model.eval()(tokens()).logits)
