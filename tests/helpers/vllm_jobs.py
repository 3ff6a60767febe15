"""Jobs for processes with vLLM: tiny models, packed, that it and transformers continue greedily.

Run as a script with the name of a job and a folder. The last line that it prints is the result, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

# read by vLLM when it is imported
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

import torch
import transformers as tf
from torch import nn

import maskpro_kernels as mk
from maskpro_kernels import hf

VOCABULARY, IMAGE = 96, 5
NEW_TOKENS = 12
PROMPTS = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33, 34, 35, 36, 37]]
# vLLM's attention on a CPU has heads of 32 and more
WIDTHS = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
TEXT = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **WIDTHS,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
# (pattern, options of ``pack_nm``)
KINDS = [
    (pattern, options)
    for pattern in ("2:4", "1:4", "4:8", "8:16")
    for options in ({"values": "keep"}, {"values": "int8"}, *({"values": "int4", "group": g} for g in (32, 64, 128)))
]


def qwen2_vl() -> nn.Module:
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "patch_size": 4}
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    special = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}
    config = tf.Qwen2VLConfig(text_config={**GROUPED, "rope_parameters": rotary}, vision_config=vision, **special)
    return tf.Qwen2VLForConditionalGeneration(config)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "Mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, head_dim=32)),
    "Qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)),
    "Qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=32)),
    "Gemma 3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED, head_dim=32)),
    "Phi-3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED, tie_word_embeddings=False)),
    "OPT": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**{**TEXT, "init_std": 0.2}, ffn_dim=192, word_embed_proj_dim=128, do_layer_norm_before=True)
    ),
    "GPT-NeoX": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT)),
    "Mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=32)
    ),
    "Qwen3-MoE": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=32)),
    "Qwen2-VL": qwen2_vl,
}


def randomized(model: nn.Module) -> nn.Module:
    """A model with random biases and without dropout."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomized(ARCHITECTURES[name]())


def packed(layer: nn.Linear, pattern: str, **options) -> mk.NMLinear:
    codes = mk.top_n_mask(layer.weight.detach().abs(), pattern)
    layer.weight.data *= mk.expand_mask(codes, pattern)
    return mk.NMLinear.from_dense(layer, pattern, **options)


def pack(model: nn.Module, names: dict[str, tuple[str, dict]]) -> nn.Module:
    """Pack layers by name, each in its own way."""
    for name, (pattern, options) in names.items():
        model.set_submodule(name, packed(model.get_submodule(name), pattern, **options))
    hf.describe(model)
    return model


def write(model: nn.Module, folder: Path) -> None:
    model.generation_config = tf.GenerationConfig()
    model.save_pretrained(folder, state_dict=hf.quantizer.guarded_state_dict(model))


def greedy(model: nn.Module, prompts: list[list[int]] = PROMPTS, new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    rows = []
    with torch.inference_mode():
        for prompt in prompts:
            options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
            rows.append(out[0, len(prompt) :].tolist())
    return rows


def expected(folder: Path, dtype: str = "float32") -> list[list[int]]:
    """Tokens of transformers from a folder."""
    config = tf.AutoConfig.from_pretrained(folder)
    kind = getattr(tf, config.architectures[0])
    return greedy(kind.from_pretrained(folder, dtype=getattr(torch, dtype)).eval())


def engine(folder: Path, **options):
    from vllm import LLM

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 96, "max_num_seqs": 8}
    return LLM(str(folder), skip_tokenizer_init=True, **settings | options)


def continued(llm, prompts: list[list[int]] = PROMPTS, new_tokens: int = NEW_TOKENS, **options) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(out.outputs[0].token_ids) for out in llm.generate(requests, sampling, use_tqdm=False, **options)]


def served(folder: Path, **options) -> list[list[int]]:
    """Tokens of vLLM from a folder."""
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory

    llm = engine(folder, **options)
    tokens = continued(llm)
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()
    return tokens


def architecture(folder: Path, *names: str) -> dict:
    """Whether the tokens are equal, by architecture."""
    result = {}
    for name in names:
        index = list(ARCHITECTURES).index(name)
        pattern, options = KINDS[index * 7 % len(KINDS)]
        if options.get("group", 32) > 32:
            options = {**options, "group": 32}
        model = made(name)
        mk.convert(model, pattern)
        mk.finalize(model, to="packed", values=options["values"])
        write(model, folder / name)
        tokens = expected(folder / name)
        result[name] = [served(folder / name) == tokens, len({token for row in tokens for token in row})]
    return result


JOBS = {"architecture": architecture}

if __name__ == "__main__":
    job, place, *arguments = sys.argv[1:]
    print(json.dumps(JOBS[job](Path(place), *arguments)))
