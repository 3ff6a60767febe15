"""The path of a user with a real model: learn, export, load, write, fine-tune beside the mask, measure."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stdout

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import maskpro_kernels.hf  # noqa: F401  transformers knows packed checkpoints by it
from maskpro_kernels.cli.main import main
from maskpro_kernels.packed import NMLinear
from maskpro_kernels.peft import beside_masks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("eager_reference")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of one step of SmolLM2, and its packed checkpoints."""
    folder = tmp_path_factory.mktemp("path")
    learn = "learn --model smollm2-135m --data pydoc --init magnitude --steps 1 --batch-size 2 --eval-windows 1 --quiet"
    assert main([*learn.split(), "--output", str(folder / "run")]) == 0
    for values in ("keep", "int8"):
        target = ["export", str(folder / "run"), str(folder / values), "--to", "packed", "--values", values, "--quiet"]
        assert main(target) == 0
    return folder


@pytest.mark.parametrize("values", ["keep", "int8"])
def test_a_packed_checkpoint_writes_is_tuned_and_measured(folder, values, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(folder / values, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder / values)
    tokens = tokenizer("The documentation of Python", return_tensors="pt")["input_ids"]
    said = io.StringIO()
    with redirect_stdout(said):
        written = model.generate(tokens, max_new_tokens=6, do_sample=False, streamer=TextStreamer(tokenizer))
    assert written.shape[1] == tokens.shape[1] + 6 and said.getvalue().strip()

    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, NMLinear)
    stored = copy.deepcopy(layer.state_dict())
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, beside_masks(config))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = tuned(written, labels=written).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    # the mask and what it keeps stay
    for name, before in stored.items():
        assert torch.equal(layer.state_dict()[name], before)
    tuned.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(folder / values, dtype=torch.bfloat16)
    config = beside_masks(peft.PeftConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter", config=config)
    with torch.no_grad():
        torch.testing.assert_close(again(written).logits, tuned.eval()(written).logits)


def test_dense_and_packed_are_set_side_by_side(folder, capsys):
    names = [str(folder / name) for name in ("run", "keep", "int8")]
    assert main(["speed", *names, "--prompt-tokens", "16", "--new-tokens", "8", "--rounds", "1", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "same weights as" in said and "other weights than" in said
