"""What vLLM generates with a packed model, and how far it is from the same weights without rounding.

    python benchmarks/verdict/served.py bfloat16

prints the figures of ``check`` as JSON in its last line. vLLM runs in the process, compiled, and on a GPU in CUDA
graphs. transformers runs on the CPU.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile

VOCABULARY = 96
HIDDEN = 256
LAYERS = 2
NEW_TOKENS = 12
PROMPTS = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33, 34, 35, 36, 37]]
# As each projection is stored
KINDS = {
    "self_attn": {"values": "keep"},
    "gate_proj": {"values": "int8"},
    "up_proj": {"values": "int8"},
    "down_proj": {"values": "int4", "group": 64},
}
# Of vLLM, read when it is imported
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# Error of a log-probability in float32, where torch has none beside itself
ROUNDING = 1e-4


def check(figures: dict, on_gpu: bool) -> None:
    """Raise AssertionError unless vLLM errs at most twice as much as torch in the same dtype, as products may.

    Errors are those of the log-probabilities of all tokens at each place. Equal tokens are not asked for: where two are
    almost equally likely, rounding decides.
    """
    limit = 2 * figures["torch error"] + ROUNDING
    assert figures["error"] <= limit, f"log-probabilities: error {figures['error']:.3g}, expected at most {limit:.3g}"
    assert figures["different tokens"] > 4, f"{figures['different tokens']} different tokens, expected more"
    assert not on_gpu or figures["graphs"] != "NONE", "no CUDA graphs"


def packed_model(dtype):
    """A random LLaMA whose layers are stored in all kinds."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    import maskpro_kernels as mk
    from maskpro_kernels import hf

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.08,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    for name, layer in list(model.named_modules()):
        kind = next((kind for part, kind in KINDS.items() if part in name), None)
        if isinstance(layer, nn.Linear) and kind is not None:
            mask = mk.expand_mask(mk.top_n_mask(layer.weight.detach().abs(), "2:4"), "2:4")
            layer.weight.data *= mask
            model.set_submodule(name, mk.NMLinear.from_dense(layer, "2:4", **kind))
    hf.describe(model)
    return model


def generated(folder: str, dtype: str) -> tuple[list[list[int]], list[list[list[float]]], str]:
    """(tokens, log-probabilities of all tokens at each of their places, kind of CUDA graphs) of vLLM."""
    from vllm import LLM, SamplingParams

    # little memory: others use the GPU meanwhile
    llm = LLM(
        folder, dtype=dtype, enforce_eager=False, max_model_len=64, max_num_seqs=4, skip_tokenizer_init=True,
        gpu_memory_utilization=0.05, kv_cache_memory_bytes=64 << 20, max_logprobs=VOCABULARY,
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=VOCABULARY
    )
    requests = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = [request.outputs[0] for request in llm.generate(requests, sampling, use_tqdm=False)]
    tokens = [list(output.token_ids) for output in outputs]
    log_probs = [
        [[of_place[token].logprob for token in range(VOCABULARY)] for of_place in output.logprobs] for output in outputs
    ]
    return tokens, log_probs, llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name


def measured(dtype: str) -> dict:
    """Figures of ``check``."""
    import torch

    from maskpro_kernels.hf.quantizer import guarded_state_dict
    from maskpro_kernels.prune.finalize import unpack

    model = packed_model(getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=guarded_state_dict(model))
        tokens, log_probs, graphs = generated(folder, dtype)
    rounded = model.to("cpu")
    unpack(rounded)
    exact = copy.deepcopy(rounded).float()
    errors = []
    torch_errors = []
    with torch.no_grad():
        for prompt, new, found in zip(PROMPTS, tokens, log_probs, strict=True):
            inputs = torch.tensor([prompt + new])
            # from which each new token comes
            places = slice(len(prompt) - 1, -1)
            expected = exact(inputs).logits[0, places].log_softmax(-1)
            of_torch = rounded(inputs).logits[0, places].float().log_softmax(-1)
            errors.append((torch.tensor(found) - expected).abs().max())
            torch_errors.append((of_torch - expected).abs().max())
    return {
        "graphs": graphs,
        "different tokens": len({token for row in tokens for token in row}),
        "error": float(max(errors)),
        "torch error": float(max(torch_errors)),
    }


if __name__ == "__main__":
    os.environ |= SETTINGS
    print(json.dumps(measured(sys.argv[1])))
