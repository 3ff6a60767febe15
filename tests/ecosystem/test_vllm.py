"""vLLM serves packed checkpoints with the tokens of transformers; `make test-vllm` runs this."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.children import BENCHMARKS, ROOT, environment
from verdict import served

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

JOBS = ROOT / "tests" / "helpers" / "vllm_jobs.py"
ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 3", "Phi-3", "OPT", "GPT-NeoX", "Mixtral", "Qwen3-MoE")
ARCHITECTURES += ("GPT-2", "GPT-J", "BLOOM", "Cohere")
DAMAGED = "model.layers.1.self_attn.k_proj"


def run(job: str, folder: Path, *arguments: str) -> tuple[dict, str]:
    """(result of a job, what it printed besides), in a process of its own."""
    command = [sys.executable, str(JOBS), job, str(folder), *arguments]
    variables = environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    *_, last = done.stdout.splitlines()
    printed = done.stdout + done.stderr
    assert "vLLM's model has no place" not in printed
    return json.loads(last), printed


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


def test_weights_on_a_cpu_are_moved_some_at_a_time(monkeypatch):
    from maskpro_kernels.vllm import linear

    moved = []
    monkeypatch.setattr(linear, "move_into_huge_pages", lambda tensors: moved.append(list(tensors)))
    pages = linear.HugePages()
    small, large = (torch.empty(count << 20, dtype=torch.uint8) for count in (3, 7))
    for tensors in ([small, large.to("meta")], [small, small], [large], [small]):
        pages.add(iter(tensors))
    assert [[tensor.nbytes >> 20 for tensor in tensors] for tensors in moved] == [[3, 3, 3], [7, 3]]


def test_the_rest_is_imported_for_packed_checkpoints_alone():
    code = (
        "import sys; from maskpro_kernels.vllm import register; register(); print('maskpro_kernels.hf' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout.splitlines()[-1] == "False" and "packed checkpoints need" not in done.stdout + done.stderr


def test_parts_of_another_name_are_refused():
    from maskpro_kernels.vllm.linear import PackedLinearMethod

    method = PackedLinearMethod("layer", [None, None, None], pages=None)
    method.sizes = [4, 2, 2]
    assert method._places(("k",)) == [1] and method._places((2,)) == [2] and method._places(()) == [0, 1, 2]
    for part in ("index_q", 3):
        with pytest.raises(ValueError, match=f"^vLLM: expected parts q, k, v or 0 to 2 of .* layer, got {part!r}$"):
            method._places((part,))


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
    of_bytes = f"expected 1 or 5 or 25 for the 200 columns of {layer}, got 2: a byte of the bitmask would be on two"
    of_blocks = f"expected 1 or 2 for the 512 columns of {layer}, got 4: "
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
    expert = "model.layers.1.mlp.experts.linears.up_proj.2"
    assert f"checkpoint: expected all tensors of {expert}, got none; copy" in results["expert"]
    for name, values in (("values", "keep"), ("scales", "int8")):
        expected = f"dtype: expected one that has the weights of {DAMAGED}.{name}, up to "
        assert expected in results[values] and ", got torch.float16; serve" in results[values]


def test_an_output_layer_in_int8(tmp_path):
    results, _ = run("output_layers", tmp_path)
    assert "expected false for a checkpoint with its output layer lm_head in int8, got true" in results.pop("override")
    refused = {name: results.pop(name) for name in ("OPT", "Cohere")}
    assert results == dict.fromkeys(("tied", "odd", "GPT-J", "GPT-2", "Qwen2", "bfloat16"), True)
    for message in refused.values():
        assert "expected an output layer in the model's dtype for this model of vLLM, got int8 in lm_head" in message


def test_engines_that_end_leave_no_layer_and_load_no_weights_again(tmp_path):
    results, _ = run("lifecycle", tmp_path)
    for name, figures in results.items():
        assert figures["layers"] > 1 and figures["alive"] == 0, (name, figures)
        assert "reload_weights: expected a model without packed layers, got " in figures["again"], name
        expected = "load_format: expected one that reads the tensors of a packed checkpoint, such as auto, got dummy"
        assert expected in figures["dummy"], name
    # one for each of two layers
    assert results["experts"]["held"] == {"w13": 2, "w2": 2}


def test_two_ranks_share_an_output_layer_in_int8(tmp_path):
    results, _ = run("output_layer_of_ranks", tmp_path)
    assert results == {"tokens": True}
