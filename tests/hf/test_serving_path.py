"""The path of a user with a real model: save, load, write, fine-tune beside the mask, measure.

In processes of their own, for here the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SAVE = """
import sys
from pathlib import Path
import torch
from maskpro_kernels import convert, finalize
from maskpro_kernels.hf import load_model, save_model
from maskpro_kernels.prune.finalize import pack, repack

folder = Path(sys.argv[1])
model, tokenizer = load_model("smollm2-135m", torch.bfloat16)
convert(model, "2:4", init="magnitude")
save_model(finalize(model), tokenizer, folder / "dense")
pack(model, "2:4")
save_model(model, tokenizer, folder / "keep")
repack(model, "int8")
save_model(model, tokenizer, folder / "int8")
"""

CHILD = """
import io, sys
from contextlib import redirect_stdout
import peft, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
import maskpro_kernels.hf
from maskpro_kernels.packed import NMLinear
from maskpro_kernels.peft import beside_masks

folder, adapter = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = tokenizer("The documentation of Python", return_tensors="pt")["input_ids"]
said = io.StringIO()
with redirect_stdout(said):
    written = model.generate(tokens, max_new_tokens=6, do_sample=False, streamer=TextStreamer(tokenizer))
assert written.shape[1] == tokens.shape[1] + 6 and "documentation" in said.getvalue()

layer = model.model.layers[0].self_attn.q_proj
assert isinstance(layer, NMLinear)
stored = {name: part.clone() for name, part in layer.state_dict().items()}
config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
tuned = peft.get_peft_model(model, beside_masks(config))
optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=5e-4)
losses = []
for _ in range(3):
    loss = tuned(written, labels=written).loss
    losses.append(float(loss.detach()))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert losses[-1] < losses[0], losses
for name, before in stored.items():
    assert torch.equal(layer.state_dict()[name], before), name
tuned.save_pretrained(adapter)

again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
again = peft.PeftModel.from_pretrained(again, adapter, config=beside_masks(peft.PeftConfig.from_pretrained(adapter)))
with torch.no_grad():
    torch.testing.assert_close(again(written).logits, tuned.eval()(written).logits)
print("done")
"""


def run(*command: str) -> str:
    """Output of a process that multiplies CPU tensors like users."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints of SmolLM2 at 2:4: dense, packed, and packed in int8."""
    folder = tmp_path_factory.mktemp("path")
    run("-c", SAVE, str(folder))
    return folder


@pytest.mark.parametrize("values", ["keep", "int8"])
def test_a_packed_checkpoint_writes_and_is_tuned(folder, values, tmp_path):
    assert run("-c", CHILD, str(folder / values), str(tmp_path / "adapter")).endswith("done\n")


def test_dense_and_packed_are_set_side_by_side(folder):
    names = [str(folder / name) for name in ("dense", "keep", "int8")]
    few = ("--prompt-tokens", "16", "--new-tokens", "8", "--rounds", "1")
    said = run("-m", "maskpro_kernels", "speed", *names, *few)
    assert "same weights as" in said and "weights rounded to integers, else those of" in said
