"""The dense model in three bits: numbers of each group, and a lower error of the outputs than by the nearest ones."""

from __future__ import annotations

import dense_gptq
import pytest
import torch
from helpers.command import learn
from helpers.tiny_llama import write_inputs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from maskpro_kernels.cli import main

GROUP = 16


@pytest.mark.usefixtures("eager_reference")
def test_each_group_has_eight_numbers_that_fit_the_inputs(tmp_path, monkeypatch):
    inputs, run, output = write_inputs(tmp_path / "inputs"), tmp_path / "run", tmp_path / "rounded"
    assert main.main(learn(inputs, run, "--data", f"{inputs / 'text.txt'},self")) == 0
    monkeypatch.setattr("sys.argv", ["dense_gptq", str(run), str(output), "--group", str(GROUP)])
    dense_gptq.main()
    dense, rounded = (AutoModelForCausalLM.from_pretrained(folder) for folder in (inputs / "model", output))
    names = [name for name, module in dense.named_modules() if type(module) is torch.nn.Linear and name != "lm_head"]
    for name in names:
        weight = rounded.get_submodule(name).weight.detach()
        assert not torch.equal(weight, dense.get_submodule(name).weight)
        assert all(len(group.unique()) <= 8 for row in weight for group in row.split(GROUP))
    # inputs that do not change with the weights
    first, tokens = dense.model.layers[0], load_file(run / "progress" / "samples.safetensors")["tokens"]
    x = first.input_layernorm(dense.model.embed_tokens(tokens)).flatten(0, 1).detach()
    weight = first.self_attn.q_proj.weight.detach()
    near = torch.cat([dense_gptq.nearest(part, *dense_gptq.range_of(part)) for part in weight.split(GROUP, 1)], 1)
    own = rounded.model.layers[0].self_attn.q_proj.weight.detach()
    assert (x @ (own - weight).T).norm() < (x @ (near - weight).T).norm() < 0.5 * (x @ weight.T).norm()
