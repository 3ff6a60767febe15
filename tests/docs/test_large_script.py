"""The script for a model of 70 billion parameters, as it stands in the document, on a tiny one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.children import ROOT, search_path
from helpers.tiny_llama import write_inputs
from transformers import AutoModelForCausalLM

BEGIN = "# torchrun --nproc-per-node 8 learn_70b.py "


def run_script(ranks: int, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0"]
        + ["learn_70b.py", "model", "text.txt", "run"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_script_learns_on_four_ranks_and_goes_on_with_two(tmp_path):
    text = (ROOT / "docs" / "large-models.md").read_text(encoding="utf-8")
    (script,) = re.findall(rf"^```python\n({re.escape(BEGIN)}.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "learn_70b.py").write_text(script, encoding="utf-8")
    write_inputs(tmp_path)
    run_script(4, tmp_path)
