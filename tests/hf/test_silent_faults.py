"""Guards against wrong models: without a guard, its check fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.architectures import loss_of, tiny
from helpers.tiny_llama import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import maskpro_kernels as mk
from maskpro_kernels import hf
from maskpro_kernels.modules import masked_layers
from maskpro_kernels.packed import packed_linear
from maskpro_kernels.peft import beside_masks
from maskpro_kernels.unfuse import as_linears

SCALES = "model.layers.0.mlp.down_proj.scales"

pytestmark = [
    pytest.mark.usefixtures("eager_reference"),
    pytest.mark.filterwarnings("ignore:model.*of its matrix weights"),
]


def assert_comes_back(model, batch, folder: Path) -> None:
    """Saved and loaded it has the same loss."""
    expected = loss_of(model.eval(), batch)
    model.save_pretrained(folder)
    torch.testing.assert_close(loss_of(type(model).from_pretrained(folder), batch), expected, rtol=0.0, atol=1e-6)


def packed_comes_back(folder: Path) -> None:
    # transformers renames the keys of this one on disk
    model, batch = tiny("ViT")
    mk.convert(model, "2:4")
    assert_comes_back(mk.finalize(model, to="packed"), batch, folder)


def converted_it_comes_back(folder: Path) -> None:
    model, batch = tiny("LLaMA")
    mk.convert(model, "2:4")
    assert_comes_back(model, batch, folder)


def unfused_comes_back(folder: Path) -> None:
    model, batch = tiny("GPT-2")
    # a square one, whose transpose would fit too
    as_linears(model, ["transformer.h.0.attn.c_proj"])
    hf.describe(model)
    assert_comes_back(model, batch, folder)


def every_mask_matters(folder: Path) -> None:
    model, batch = tiny("Mamba")
    mk.convert(model, "2:4")
    with torch.no_grad():
        before = loss_of(model, batch)
        for name, layer in masked_layers(model).items():
            layer.logits.neg_()
            assert not torch.equal(loss_of(model, batch), before), name
            layer.logits.neg_()


def mixtures_are_masked(folder: Path) -> None:
    assert mk.convert(tiny("Mixtral").model, "2:4").masked_share > 0.9


def little_is_masked(folder: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mk.convert(tiny("convolutions").model, "2:4")
    assert any("of its matrix weights" in str(warning.message) for warning in caught)


def with_lora(convert_first: bool):
    torch.manual_seed(0)
    model = tiny_model()
    if convert_first:
        mk.convert(model, "2:4", gap=60.0)
    model = get_peft_model(model, beside_masks(LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)))
    if not convert_first:
        mk.convert(model, "2:4", gap=60.0)
    return model.eval()


def adapters_get_no_mask(folder: Path) -> None:
    assert not any("lora" in name for name in masked_layers(with_lora(convert_first=False)))


def merged_computes_the_same(folder: Path) -> None:
    for first in (True, False):
        model, ids = with_lora(first), torch.arange(8)[None]
        expected = model(ids).logits
        try:
            merged = model.merge_and_unload()
        except ValueError:
            continue
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def finalized_it_merges_in_its_layout(folder: Path) -> None:
    # GPT-2 stores weights transposed, these square ones too
    torch.manual_seed(0)
    model, batch = tiny("GPT-2")
    mk.convert(model, "2:4")
    lora = LoraConfig(r=4, target_modules=["attn.c_proj"], init_lora_weights=False)
    model = mk.finalize(get_peft_model(model, beside_masks(lora))).eval()
    expected = model(**batch).logits
    torch.testing.assert_close(model.merge_and_unload()(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def values_learn(folder: Path) -> None:
    model = tiny_model()
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed")
    values = model.model.layers[0].mlp.down_proj.values.requires_grad_()
    model(torch.arange(8)[None]).logits.square().mean().backward()
    assert values.grad is not None and values.grad.any()


def with_int8_values(folder: Path):
    """(a model, its checkpoint)."""
    model = tiny_model()
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed", values="int8").save_pretrained(folder)
    return model, folder / "model.safetensors"


def refused(folder: Path, reported: str) -> None:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        assert reported in str(error)
    else:
        raise AssertionError("a damaged checkpoint was loaded")


def damaged_scales_are_seen(folder: Path) -> None:
    _, file = with_int8_values(folder)
    tensors = load_file(file)
    tensors[SCALES][3] *= -1
    save_file(tensors, file, {"format": "pt"})
    refused(folder, "scales: expected finite numbers of at least 0")


def values_that_are_no_integers_are_seen(folder: Path) -> None:
    _, file = with_int8_values(folder)
    tensors = load_file(file)
    name = SCALES.replace("scales", "values")
    tensors[name] = tensors[name] * tensors[SCALES].float()
    save_file(tensors, file, {"format": "pt"})
    refused(folder, "values: expected torch.int8")


def integers_do_not_pass_as_weights(folder: Path) -> None:
    weight = torch.eye(8)
    kept, rounded = (mk.Sparse24Linear(mk.pack_nm(weight, "2:4", values)) for values in ("keep", "int8"))
    try:
        kept.load_state_dict(rounded.state_dict(), strict=False)
    except RuntimeError as error:
        assert "values: expected torch.float32" in str(error)
    assert torch.equal(kept.weight, weight)


def values_are_off_by_half_a_scale(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator).bfloat16() * (torch.arange(256) % 4 < 2)
    kept, rounded = mk.pack_nm(weight, "2:4").values.double(), mk.pack_nm(weight, "2:4", "int8")
    scales = rounded.scales.double()
    assert ((rounded.values.double() * scales - kept).abs() <= scales / 2).all()


def zeros_stay(folder: Path) -> None:
    model = tiny_model()
    mk.convert(model, "2:4")
    model = mk.finalize(model).requires_grad_()
    ids = torch.arange(8)
    arguments = TrainingArguments(str(folder), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}], callbacks=[hf.KeepMask("2:4")]).train()
    assert (model.model.layers[0].mlp.down_proj.weight.view(-1, 4) != 0).sum(1).eq(2).all()


class Fault(NamedTuple):
    """A guard, its replacement if it is switched off, and the sign that it is missing."""

    guard: str
    off: object
    check: Callable[[Path], None]


def nothing(*_, **__) -> None:
    pass


def of_detached_values(x, values, *others, multiply=packed_linear):
    return multiply(x, values.detach(), *others)


def with_scales_rounded_down(values, *_):
    """Of values [rows, 128]: the largest one then has no integer that is near enough."""
    scales = (values.abs().amax(-1, keepdim=True) / 127).to(values.dtype)
    return (values / scales).round().clamp(-127, 127).to(torch.int8), scales


FAULTS = [
    Fault("hf.quantizer.put_empty_layers", nothing, packed_comes_back),
    Fault("hf.describe", nothing, converted_it_comes_back),
    Fault("hf.quantizer.as_linears", nothing, unfused_comes_back),
    Fault("prune.selection.read_elsewhere", lambda *_: set(), every_mask_matters),
    Fault("prune.convert.in_linear_form", lambda _: nullcontext({}), mixtures_are_masked),
    Fault("prune.convert.MOST_OF_A_MODEL", 0.0, little_is_masked),
    Fault("prune.selection.adapter_modules", lambda _: set(), adapters_get_no_mask),
    Fault("unfuse._refuse", nothing, merged_computes_the_same),
    Fault("prune.convert.fit_adapters", nothing, finalized_it_merges_in_its_layout),
    Fault("packed.packed_linear", of_detached_values, values_learn),
    Fault("packed.quantized", with_scales_rounded_down, values_are_off_by_half_a_scale),
    Fault("packed.PackedNM.check", nothing, damaged_scales_are_seen),
    Fault("hf.quantizer.check_stored", nothing, values_that_are_no_integers_are_seen),
    Fault("packed.NMLinear._load_from_state_dict", nn.Module._load_from_state_dict, integers_do_not_pass_as_weights),
]


# A training, of which tests/hf/test_trainer.py covers as well
TRAINING = Fault("kept_zeros.KeptZeros.restore", nothing, zeros_stay)


@pytest.mark.parametrize(
    "fault",
    [*FAULTS, pytest.param(TRAINING, marks=pytest.mark.slow)],
    ids=lambda fault: f"{fault.guard}-{fault.check.__name__}",
)
def test_without_its_guard_a_fault_is_seen(fault, tmp_path, monkeypatch):
    fault.check(tmp_path / "guarded")
    monkeypatch.setattr(f"maskpro_kernels.{fault.guard}", fault.off)
    with pytest.raises(AssertionError):
        fault.check(tmp_path / "off")
