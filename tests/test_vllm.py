"""What vLLM's processes import and report of this package; `make test-vllm` serves models."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest
from helpers.children import ROOT, environment

from maskpro_kernels import vllm
from maskpro_kernels.vllm.names import matched


def run(code: str, path: str = "") -> subprocess.CompletedProcess:
    variables = environment()
    variables["PYTHONPATH"] = f"{path}:{variables['PYTHONPATH']}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=True)


def test_vllm_finds_the_function_by_an_entry_point():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (found,) = settings["project"]["entry-points"]["vllm.general_plugins"].values()
    assert found == f"{vllm.__name__}:{vllm.register.__name__}"


def test_nothing_of_vllm_is_imported_before_it_asks():
    code = "import sys, maskpro_kernels.hf, maskpro_kernels.vllm; print([x for x in sys.modules if x[:4] == 'vllm'])"
    assert run(code).stdout.strip() == "[]"


@pytest.mark.parametrize("files", [{}, {"vllm/model_executor/__init__.py": ""},
                                   {"vllm/model_executor/__init__.py": "raise RuntimeError('of a release')"},
                                   {"vllm/platforms.py": "raise OSError('of llvmlite')"}])  # fmt: skip
def test_a_vllm_with_another_interface_is_reported_in_one_line(files, tmp_path):
    files = {"vllm/__init__.py": '__version__ = "9.8.7"\n'} | files
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = run("from maskpro_kernels.vllm import register; register(); print('vLLM goes on')", str(tmp_path))
    assert done.stdout.strip() == "vLLM goes on"
    (line,) = done.stderr.splitlines()
    assert line.startswith("maskpro_kernels: packed checkpoints need vLLM 0.32, got 9.8.7: ")


def test_names_in_the_files_are_matched_with_those_in_the_config():
    """Qwen2-VL, whose towers have words and numbers in common, and Mixtral, with numbers of layers and experts."""
    config = {
        "visual.blocks.{}.mlp.down_proj": "model.visual.blocks.{}.mlp.down_proj",
        "model.layers.{}.mlp.down_proj": "model.language_model.layers.{}.mlp.down_proj",
        "lm_head": "lm_head",
        "model.layers.{}.block_sparse_moe.experts.linears.w2.3": "model.layers.{}.mlp.experts.linears.w2.3",
    }
    expected = {name.format(i): other.format(i) for name, other in config.items() for i in (0, 1, 12)}
    assert matched(expected, reversed(expected.values())) == expected
    with pytest.raises(ValueError, match="^checkpoint: expected model.layers.2.mlp.up_proj in the layers of its"):
        matched(["model.layers.2.mlp.up_proj"], expected.values())
    with pytest.raises(ValueError, match="^checkpoint: expected one layer of the name a.0.x, got b.0.x and c.0.x; "):
        matched(["b.0.x", "c.0.x"], ["a.0.x"])
