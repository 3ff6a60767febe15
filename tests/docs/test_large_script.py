"""The document's script for a model of 70 billion parameters, on a tiny one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.children import ROOT, environment
from helpers.tiny_llama import write_inputs
from transformers import AutoModelForCausalLM

from maskpro_kernels import expand_mask, top_n_mask

BEGIN = "# torchrun --nproc-per-node 8 learn_70b.py "


def run_script(ranks: int, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        + ["learn_70b.py", "model", "text.txt", "run"],
        cwd=folder,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_script_learns_on_four_ranks_and_continues_with_two(tmp_path):
    text = (ROOT / "docs" / "large-models.md").read_text(encoding="utf-8")
    (script,) = re.findall(rf"^```python\n({re.escape(BEGIN)}.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "learn_70b.py").write_text(script, encoding="utf-8")
    write_inputs(tmp_path)
    run_script(4, tmp_path)
    written = (tmp_path / "run" / "model" / "model-00001-of-00001.safetensors").read_bytes()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert sparse.dtype == torch.bfloat16
    changed = 0
    for name, weight in sparse.named_parameters():
        own = dense.get_parameter(name)
        if "proj" in name:
            kept = weight != 0
            assert (kept.view(-1, 4).sum(1) <= 2).all() and torch.equal(weight[kept], own[kept])
            changed += int((kept != expand_mask(top_n_mask(own.abs(), "2:4"), "2:4")).sum())
        else:
            assert torch.equal(weight, own)
    assert changed > 0
    shutil.rmtree(tmp_path / "run" / "model")
    run_script(2, tmp_path)
    assert (tmp_path / "run" / "model" / "model-00001-of-00001.safetensors").read_bytes()[-1000:] == written[-1000:]
    assert len(list((tmp_path / "run" / "progress").glob("snapshot-*"))) == 2
