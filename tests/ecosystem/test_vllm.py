"""vLLM serves packed checkpoints with the tokens of transformers; `make test-vllm` runs this."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.children import BENCHMARKS, ROOT, environment
from verdict import served

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

JOBS = ROOT / "tests" / "helpers" / "vllm_jobs.py"
ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 3", "Phi-3", "OPT", "GPT-NeoX", "Mixtral", "Qwen3-MoE")
ARCHITECTURES += ("GPT-2", "GPT-J", "BLOOM", "Cohere")


def run(job: str, folder: Path, *arguments: str) -> tuple[dict, str]:
    """(result of a job, what it printed besides), in a process of its own."""
    command = [sys.executable, str(JOBS), job, str(folder), *arguments]
    variables = environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    *_, last = done.stdout.splitlines()
    return json.loads(last), done.stdout + done.stderr


@pytest.fixture(scope="module")
def of_architectures(tmp_path_factory):
    return run("architectures", tmp_path_factory.mktemp("architectures"), *ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_those_of_transformers(name, of_architectures):
    results, _ = of_architectures
    equal, different_tokens = results[name]
    # a model that repeats one token would show nothing
    assert equal and different_tokens > 4


def test_the_bytes_of_unpacked_experts_are_reported(of_architectures):
    _, printed = of_architectures
    assert printed.count("maskpro_kernels: the experts of 2 layers were unpacked: they take ") == 2


def test_weights_are_moved_after_the_last_layer_of_each_load(monkeypatch):
    from maskpro_kernels.vllm import linear

    moved = []
    monkeypatch.setattr(linear, "move_into_huge_pages", lambda tensors: moved.append(list(tensors)))
    pages = linear.HugePages()

    def load(tensors: str, new_layers: int) -> None:
        for _ in range(new_layers):
            pages.add_layer()
        for tensor in tensors:
            pages.add_loaded([tensor])

    load("ab", new_layers=2)
    load("ab", new_layers=0)
    # of a second model of the same configuration
    load("c", new_layers=1)
    load("abc", new_layers=0)
    assert moved == [["a", "b"], ["a", "b"], ["c"], ["a", "b", "c"]]


def test_names_that_vllm_maps(tmp_path):
    results, _ = run("mapped", tmp_path)
    assert results == {"tokens": True}


def test_all_kinds_of_values_and_patterns_and_fused_layers_of_several(tmp_path):
    results, _ = run("kinds", tmp_path)
    assert results == dict.fromkeys(("float32", "bfloat16", "float16"), True)


def test_a_dtype_other_than_that_of_the_file(tmp_path):
    results, _ = run("casts", tmp_path)
    assert results == dict.fromkeys(("bfloat16", "float16"), True)


@pytest.mark.parametrize("values", ["keep", "int4"])
def test_two_ranks_have_the_tokens_of_one(values, tmp_path):
    results, _ = run("ranks", tmp_path, values)
    assert results == {"tensor_parallel_size": True, "pipeline_parallel_size": True}


def test_a_cut_that_is_not_possible_is_refused(tmp_path):
    _, printed = run("cuts", tmp_path)
    layer = "model.layers.1.mlp.down_proj"
    of_bytes = f"expected one of 1, 5, 25 for the 200 columns of {layer}, got 2: a byte of the bitmask would be on two"
    of_blocks = f"expected one of 1, 2 for the 512 columns of {layer}, got 4: "
    assert f"ValueError: tensor_parallel_size: {of_bytes}" in printed
    assert f"ValueError: tensor_parallel_size: {of_blocks}" in printed


def test_adapters_prefixes_and_many_requests_in_a_compiled_engine(tmp_path):
    results, _ = run("features", tmp_path)
    products = results.pop("products")
    assert results == dict.fromkeys(("many", "adapter", "without", "prefixes"), True)
    # of layers whose parts are stored in several ways
    several = {name: count for name, count in products.items() if count > 1 and not name.endswith(".base_layer")}
    assert several == {"model.layers.1.self_attn.qkv_proj": 3, "model.layers.1.mlp.gate_up_proj": 2}
    assert products["model.layers.0.self_attn.qkv_proj"] == products["model.layers.0.mlp.gate_up_proj"] == 1


def test_the_server_answers(tmp_path):
    results, _ = run("server", tmp_path)
    assert results == {"completion": True, "chat": True}


def test_the_folder_of_a_run_and_its_dense_export(tmp_path):
    """vLLM reads every safetensors file beside the model."""
    results, _ = run("learned", tmp_path)
    assert results.pop("different tokens") > 4
    assert results == {"run": True, "dense": True}


def test_checkpoints_that_vllm_no_longer_reads_have_the_tokens_of_their_dense_weights(tmp_path):
    results, _ = run("orphans", tmp_path)
    assert len(results) == 3 and all(results.values()), results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_make_verdict_serves(dtype):
    """On a GPU in CUDA graphs."""
    command = [sys.executable, str(BENCHMARKS / "verdict" / "served.py"), dtype]
    variables = environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    served.check(figures, on_gpu=False)
    assert figures["graphs"] == "NONE"


def test_damaged_checkpoints_are_refused_as_by_transformers(tmp_path):
    results, _ = run("damage", tmp_path)
    assert len(results) == 4
    for of_transformers, of_vllm in results.values():
        assert of_transformers and of_transformers in of_vllm


def test_checkpoints_that_vllm_cannot_serve_are_refused(tmp_path):
    results, _ = run("refusals", tmp_path)
    assert "expected packed layers for vLLM, got masks in model.layers.1.self_attn.k_proj" in results["masked"]
    assert "got 'lm_head', which is ParallelLMHead there" in results["head"]
    assert "checkpoint: expected scales of model.layers.1.self_attn.k_proj, got none; copy" in results["unread"]


def test_an_output_layer_in_int8(tmp_path):
    results, _ = run("output_layers", tmp_path)
    refused = {name: results.pop(name) for name in ("OPT", "Cohere")}
    assert results == dict.fromkeys(("tied", "odd", "GPT-J", "GPT-2", "Qwen2", "bfloat16"), True)
    for message in refused.values():
        assert "expected an output layer in the model's dtype for this model of vLLM, got int8 in lm_head" in message


def test_two_ranks_share_an_output_layer_in_int8(tmp_path):
    results, _ = run("output_layer_of_ranks", tmp_path)
    assert results == {"tokens": True}
