"""TRL's SFTTrainer on sparse models: masks learn, zeros stay, packed values and adapters train."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import assert_same_bits
from helpers.tiny_llama import WORDS, tiny_model, tiny_tokenizer

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

import maskpro_kernels as mk  # noqa: E402
from maskpro_kernels import ops  # noqa: E402
from maskpro_kernels.hf import KeepMask, MaskCallback  # noqa: E402
from maskpro_kernels.kept_zeros import KeptZeros  # noqa: E402
from maskpro_kernels.learn import optimizer  # noqa: E402
from maskpro_kernels.modules import masked_layers  # noqa: E402
from maskpro_kernels.peft import beside_masks  # noqa: E402

pytestmark = [pytest.mark.ecosystem, pytest.mark.usefixtures("eager_reference")]

LAYER = "model.layers.0.mlp.down_proj"
STEPS = 5


def tuned(model, folder, callbacks=(), resume=None, prompts=False, **options):
    """A run of supervised fine-tuning of 5 steps, of two batches each; of texts, or of prompts with completions."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[PAD]"
    words = torch.randint(0, len(WORDS), (24, 12), generator=torch.Generator().manual_seed(0)).tolist()
    names = {"text": slice(None)} if not prompts else {"prompt": slice(9), "completion": slice(9, None)}
    texts = datasets.Dataset.from_list(
        [{name: " ".join(WORDS[index] for index in row[part]) for name, part in names.items()} for row in words]
    )
    defaults = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, "gradient_checkpointing": False,
    }  # fmt: skip
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(str(folder), **defaults | options), train_dataset=texts, processing_class=tokenizer,
        callbacks=list(callbacks), peft_config=None,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def converted(gap: float = 4.0):
    model = tiny_model()
    mk.convert(model, "2:4", gap=gap)
    return model


def logits(model) -> list[torch.Tensor]:
    return [layer.logits.detach().clone() for layer in masked_layers(model).values()]


def test_masks_learn_and_continue_with_the_same_bits(tmp_path):
    model, before = converted(), tiny_model().state_dict()
    saving = {"learning_rate": 0.3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3}
    whole = tuned(model, tmp_path / "run", [MaskCallback()], **saving)
    assert all(not torch.equal(now, old) for now, old in zip(logits(model), logits(converted()), strict=True))
    assert_same_bits({name: model.state_dict()[name] for name in before}, before)
    assert {int(layer.counter_state.step) for layer in masked_layers(model).values()} == {STEPS}
    assert "mask_moved" in next(entry for entry in whole.state.log_history if "loss" in entry)
    again = tuned(converted(), tmp_path / "again", [MaskCallback()], str(tmp_path / "run/checkpoint-3"), **saving)
    assert_same_bits(logits(again.model), logits(model))


def test_the_curvature_of_completions_is_that_of_their_tokens(tmp_path, monkeypatch):
    """F beside T times the sum over rows of g^2 x^2, of which it is the estimate by factors."""
    model, labels, sums, shares = converted(gap=60.0), [], {}, set()
    model.register_forward_pre_hook(lambda *call: labels.append(call[-1]["labels"]), with_kwargs=True)
    real = optimizer.straight_through_gradient

    def recorded(grad, x, weight, mask, curvature, tokens):
        count = float((labels[-1][:, 1:] != -100).sum())
        assert curvature == 1.0 and 0 < float(tokens) == count
        shares.add(count / int(grad.any(1).sum()))
        first, second = ops.curvature_factors(grad, x, curvature, tokens, None)
        f, exact = sums.setdefault(id(weight), [0.0, 0.0])
        sums[id(weight)] = [f + torch.outer(first, second), exact + count * grad.square().T @ x.square()]
        return real(grad, x, weight, mask, curvature, tokens)

    monkeypatch.setattr(optimizer, "straight_through_gradient", recorded)
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 0.3}
    tuned(model, tmp_path, [MaskCallback()], prompts=True, **options)
    # rows of prompts have a gradient by the attention of later ones
    assert len(sums) == 14 and max(shares) == 1.0 and min(shares) < 0.6
    every = torch.cat([(f / exact).flatten() for f, exact in sums.values()])
    assert float(every.median()) == pytest.approx(1.0, abs=0.15)


def test_zeros_stay(tmp_path):
    model = mk.finalize(converted()).requires_grad_()
    zeros = model.get_submodule(LAYER).weight == 0
    before = model.get_submodule(LAYER).weight.clone()
    tuned(model, tmp_path, [KeepMask("2:4")])
    now = model.get_submodule(LAYER).weight
    assert torch.equal(now == 0, zeros) and not torch.equal(now, before)
    assert len(KeptZeros(model, "2:4").held) == 14


def test_packed_values_learn(tmp_path):
    model = mk.finalize(converted(), to="packed").requires_grad_(False)
    layer = model.get_submodule(LAYER)
    layer.values.requires_grad_()
    values, bitmask = layer.values.clone(), layer.bitmask.clone()
    tuned(model, tmp_path)
    assert (layer.values != values).any() and torch.equal(layer.bitmask, bitmask)


@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_lora_beside_sparse_layers_learns(kind, tmp_path):
    model = converted(gap=60.0) if kind == "masked" else mk.finalize(converted(), to="packed")
    config = beside_masks(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    model = peft.get_peft_model(model, config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tuned(model, tmp_path)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all("lora_" in name for name in changed)
