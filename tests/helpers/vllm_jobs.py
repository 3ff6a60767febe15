"""Jobs for processes with vLLM: tiny models, packed, that it and transformers continue greedily.

Run as a script with the name of a job and a folder. The last line that it prints is the result, as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from urllib.request import Request, urlopen

# read by vLLM when it is imported
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # ranks and engines of other processes share the cores
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn

import maskpro_kernels as mk
from helpers.checkpoints import compressed_folder, marlin_24_folder, masked, random_masks
from helpers.tiny_llama import tiny_text
from maskpro_kernels import hf
from maskpro_kernels.cli import main
from maskpro_kernels.prune.convert import replace_layers
from maskpro_kernels.prune.finalize import int8_output_layer

VOCABULARY, IMAGE = 96, 5
NEW_TOKENS = 12
PROMPTS = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33, 34, 35, 36, 37]]
# vLLM's attention on a CPU has heads of 32 and more
WIDTHS = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
TEXT = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **WIDTHS,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
SMALL = {
    "vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
DAMAGED = "model.layers.1.self_attn.k_proj"
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
    "Gemma 3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**GROUPED, head_dim=32, tie_word_embeddings=False, query_pre_attn_scalar=32)
    ),
    "Phi-3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED, tie_word_embeddings=False)),
    "OPT": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**{**TEXT, "init_std": 0.2}, ffn_dim=192, word_embed_proj_dim=128, do_layer_norm_before=True)
    ),
    "GPT-NeoX": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT)),
    "Mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=32)
    ),
    "Qwen3-MoE": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=32)),
    "GPT-2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL)),
    "GPT-J": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**SMALL, rotary_dim=16)),
    "BLOOM": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=128, n_layer=2, n_head=4, initializer_range=0.2)
    ),
    "Cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**GROUPED)),
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
    settings["skip_tokenizer_init"] = True
    return LLM(str(folder), **settings | options)


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


def architectures(folder: Path, *names: str) -> dict:
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


def of_all_kinds(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A LLaMA with biases: a layer of each kind; then fused layers of several kinds, and a dense layer."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": len(KINDS) + 4, "head_dim": 64}
    settings = {**GROUPED, **sizes, "initializer_range": 0.1, "attention_bias": True, "mlp_bias": True}
    model = randomized(tf.LlamaForCausalLM(tf.LlamaConfig(**settings)))
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    kinds = {f"model.layers.{i}.{name}": kind for i, kind in enumerate(KINDS) for name in names}
    keep, int8, int4 = ({"values": "keep"}, {"values": "int8"}, {"values": "int4", "group": 64})
    mixed = len(KINDS)
    # dense with packed, other values, other patterns, and all of them
    kinds |= {
        f"model.layers.{mixed}.self_attn.k_proj": ("2:4", keep),
        f"model.layers.{mixed}.mlp.up_proj": ("2:4", int4),
    }
    mixed += 1
    kinds |= {
        f"model.layers.{mixed}.{name}": ("2:4", values)
        for name, values in zip(names, (int4, int8, keep, int4, int8, int4, keep), strict=True)
    }
    mixed += 1
    kinds |= {
        f"model.layers.{mixed}.{name}": (pattern, int4)
        for name, pattern in zip(names, ("2:4", "1:4", "4:8", "8:16", "2:4", "4:8", "1:4"), strict=True)
    }
    return pack(model.to(dtype), kinds)


def kinds(folder: Path) -> dict:
    """Whether the tokens are equal, by dtype of the file and of the server."""
    result = {}
    for stored in ("float32", "bfloat16", "float16"):
        write(of_all_kinds(getattr(torch, stored)), folder / stored)
        result[stored] = served(folder / stored) == expected(folder / stored)
    return result


def casts(folder: Path) -> dict:
    """Whether the tokens of a float32 file are equal, by dtype of the server."""
    model = made("Llama")
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed")
    write(model, folder)
    return {dtype: served(folder, dtype=dtype) == expected(folder, dtype) for dtype in ("bfloat16", "float16")}


def divisible(values: dict, **settings) -> nn.Module:
    """A LLaMA whose rows of 256 values two ranks can cut, with a dense and an int8 layer."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = tf.LlamaConfig(**{**GROUPED, **sizes, "initializer_range": 0.05, "attention_bias": True, **settings})
    model = randomized(tf.LlamaForCausalLM(config))
    linears = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
    kinds = {name: ("2:4", values) for name in linears if name != "model.layers.1.self_attn.k_proj"}
    kinds["model.layers.1.mlp.up_proj"] = ("4:8", {"values": "int8"})
    return pack(model, kinds)


def ranks(folder: Path, kind: str) -> dict:
    """Whether the tokens of two ranks are equal: of layers cut in two, and of a layer on each."""
    values = {"values": kind, "group": 64} if kind == "int4" else {"values": kind}
    write(divisible(values), folder / kind)
    tokens = expected(folder / kind)
    # on a CPU vLLM 0.32 has no tensors between ranks before it has compiled
    sizes = {"tensor_parallel_size": True, "pipeline_parallel_size": False}
    return {size: served(folder / kind, **{size: 2}, enforce_eager=eager) == tokens for size, eager in sizes.items()}


def cuts(folder: Path) -> dict:
    """Nothing: the ranks report in the log why they refuse a cut."""
    for width, kind, size in ((200, "keep", 2), (512, "int8", 4)):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED | {"intermediate_size": width, "num_key_value_heads": 4}))
        place = folder / kind
        write(pack(model, {"model.layers.1.mlp.down_proj": ("2:4", {"values": kind})}), place)
        failure(served, place, tensor_parallel_size=size)
    return {}


def failure(run: Callable, *arguments, **options) -> str:
    """What a call reports."""
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        run(*arguments, **options)
    except Exception as error:
        return str(error)
    finally:
        cleanup_dist_env_and_memory()
    return ""


def damage(folder: Path) -> dict:
    """What transformers and vLLM report of damaged folders, by the damage."""
    torch.manual_seed(4)
    model = made("Llama")
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
    pack(model, {name: ("2:4", {"values": "int4", "group": 32}) for name in names})
    layer = DAMAGED

    def flipped(tensors: dict, config: dict) -> None:
        tensors[f"{layer}.bitmask"][3, 1] ^= 4

    def infinite(tensors: dict, config: dict) -> None:
        tensors[f"{layer}.scales"][3, 1] = float("inf")

    def missing(tensors: dict, config: dict) -> None:
        del tensors[f"{layer}.scales"]

    def newer(tensors: dict, config: dict) -> None:
        config["quantization_config"]["version"] = 2

    result = {}
    for change in (flipped, infinite, missing, newer):
        place = folder / change.__name__
        write(model, place)
        tensors = load_file(place / "model.safetensors")
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        change(tensors, config)
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
        result[change.__name__] = [failure(expected, place), failure(served, place)]
    return result


def refusals(folder: Path) -> dict:
    """What vLLM reports of checkpoints that transformers loads."""
    model = made("Llama")
    mk.convert(model, "2:4", targets=[DAMAGED])
    write(model, folder / "masked")
    write(pack(made("Llama"), {"lm_head": ("2:4", {"values": "keep"})}), folder / "head")
    result = {name: failure(served, folder / name) for name in ("masked", "head")}
    # of a hub that sends no headers
    from maskpro_kernels.vllm import config

    config.get_safetensors_params_metadata = lambda *_, **__: {}
    write(pack(made("Llama"), {DAMAGED: ("2:4", {"values": "int8"})}), folder / "unread")
    tensors = load_file(folder / "unread" / "model.safetensors")
    del tensors[f"{DAMAGED}.scales"]
    save_file(tensors, folder / "unread" / "model.safetensors", metadata={"format": "pt"})
    result["unread"] = failure(served, folder / "unread")
    experts = made("Qwen3-MoE")
    mk.convert(experts, "2:4")
    mk.finalize(experts, to="packed")
    write(experts, folder / "experts")
    tensors = load_file(folder / "experts" / "model.safetensors")
    (expert,) = {name.rpartition(".")[0] for name in tensors if ".1." in name and ".up_proj.2." in name}
    for name in ("values", "bitmask"):
        del tensors[f"{expert}.{name}"]
    save_file(tensors, folder / "experts" / "model.safetensors", metadata={"format": "pt"})
    result["expert"] = failure(served, folder / "experts")
    for values in ("keep", "int8"):
        large = made("Llama")
        with torch.no_grad():
            large.get_submodule(DAMAGED).weight[0, 0] = 1e5
        write(pack(large, {DAMAGED: ("2:4", {"values": values})}), folder / values)
        result[values] = failure(served, folder / values, dtype="float16")
    return result


def lifecycle(folder: Path) -> dict:
    """What is left of engines that have ended, and what they report of weights that are not of the first load."""
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory

    several = made("Llama")
    pack(several, {f"model.layers.0.self_attn.{name}_proj": ("2:4", {"values": name_of_kind}) for name, name_of_kind in
                   {"q": "keep", "k": "int8"}.items()})  # fmt: skip
    write(several, folder / "several")
    int8 = made("Llama")
    mk.convert(int8, "2:4")
    mk.finalize(int8, to="packed", output_layer="int8")
    write(int8, folder / "int8")
    experts = made("Qwen3-MoE")
    mk.convert(experts, "2:4")
    mk.finalize(experts, to="packed")
    write(experts, folder / "experts")
    sizes = {"w13": 4 * 2 * 64 * 128, "w2": 4 * 128 * 64}

    def dense_experts() -> dict[str, int]:
        """How many tensors with the weights of all experts of a layer there are."""
        addresses = {name: set() for name in sizes}
        for tensor in gc.get_objects():
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.dim() == 3:
                for name, size in sizes.items():
                    if tensor.numel() == size:
                        addresses[name].add(tensor.data_ptr())
        return {name: len(found) for name, found in addresses.items()}

    def ended(name: str) -> tuple[list[weakref.ref], dict[str, int]]:
        llm = engine(folder / name)
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        packed_names = ("QKVParallelLinear", "RoutedExperts", "ParallelLMHead")
        layers = [weakref.ref(layer) for layer in model.modules() if type(layer).__name__ in packed_names]
        # vLLM hides what there is once an engine has started
        gc.unfreeze()
        gc.collect()
        held = dense_experts()
        llm.llm_engine.engine_core.shutdown()
        return layers, held

    def reloaded(name: str) -> None:
        engine(folder / name).collective_rpc("reload_weights")

    result = {}
    # vLLM itself keeps the first engine of a process
    served(folder / "several")
    for name in ("several", "int8", "experts"):
        layers, held = ended(name)
        cleanup_dist_env_and_memory()
        gc.collect()
        alive = sum(layer() is not None for layer in layers)
        again = failure(reloaded, name)
        dummy = failure(served, folder / name, load_format="dummy")
        result[name] = {"layers": len(layers), "alive": alive, "held": held, "again": again, "dummy": dummy}
    return result


def products_of(model: nn.Module) -> dict[str, int]:
    """Number of products of each layer with packed parts."""
    methods = {name: getattr(module, "quant_method", None) for name, module in model.named_modules()}
    return {name: len(x.products) for name, x in methods.items() if hasattr(x, "products")}


def features(folder: Path) -> dict:
    """Whether the tokens are equal in one compiled engine: requests at once, adapters, prefixes."""
    from peft import LoraConfig, get_peft_model
    from vllm.lora.request import LoRARequest

    from maskpro_kernels.peft import beside_masks

    write(divisible({"values": "int4"}, num_hidden_layers=3), folder / "model")
    draw = torch.Generator().manual_seed(3)

    def prompt(length: int) -> list[int]:
        return torch.randint(7, VOCABULARY, (length,), generator=draw).tolist()

    many = [prompt(1 + i % 20) for i in range(64)]
    beginning = prompt(160)
    sharing = [beginning + prompt(5) for _ in range(3)]
    model = tf.LlamaForCausalLM.from_pretrained(folder / "model").eval()
    tokens = greedy(model, many)
    sharing_tokens = greedy(model, sharing)
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    config = beside_masks(LoraConfig(target_modules=targets, r=8, lora_alpha=32), model)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted_tokens = greedy(adapted.eval(), many[:3])
    adapted.save_pretrained(folder / "adapter")
    llm = engine(
        folder / "model", enforce_eager=False, enable_lora=True, max_lora_rank=8, max_model_len=256, max_num_seqs=64,
        enable_prefix_caching=True,
    )  # fmt: skip
    adapter = LoRARequest("adapter", 1, str(folder / "adapter"))
    (products,) = llm.apply_model(products_of)
    return {
        "products": products,
        "many": continued(llm, many) == tokens,
        "adapter": continued(llm, many[:3], lora_request=adapter) == adapted_tokens != tokens[:3],
        "without": continued(llm, many[:3]) == tokens[:3],
        "prefixes": [continued(llm, [one]) for one in sharing] == [[row] for row in sharing_tokens],
    }


def tokenizer(*special: str) -> tf.PreTrainedTokenizerFast:
    """A tokenizer of whole words, with a template of chats."""
    words = ["[PAD]", "[BOS]", "[EOS]", *special]
    words += [f"w{i}" for i in range(len(words), VOCABULARY)]
    made = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="w95"))
    made.pre_tokenizer = WhitespaceSplit()
    named = {"unk_token": "w95", "pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=made, **named, additional_special_tokens=list(special))
    fast.chat_template = "{% for message in messages %}w7 {{ message['content'] }} w8 {% endfor %}"
    return fast


def server(folder: Path) -> dict:
    """Whether vLLM's server answers a completion and a chat with the tokens of transformers."""
    model = made("Llama")
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed", values="int8")
    words = tokenizer()
    hf.save_model(model, words, folder / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # what the command `vllm serve` runs, which lacks its version in vllm-cpu 0.32
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "model"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "96", "--host", "127.0.0.1", "--port", port]
    process = subprocess.Popen([*map(str, command)])
    result = {}
    try:
        deadline = time.monotonic() + 400
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                return {"server": "did not start"}
            time.sleep(1)
        settings = {"model": str(folder / "model"), "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = _post(port, "completions", settings | {"prompt": PROMPTS[0]})
        (tokens,) = greedy(model, PROMPTS[:1])
        result["completion"] = answer["choices"][0]["text"].split() == words.decode(tokens).split()
        messages = [{"role": "user", "content": "w11 w12 w13"}]
        answer = _post(port, "chat/completions", settings | {"messages": messages})
        (tokens,) = greedy(model, [[7, 11, 12, 13, 8]])
        result["chat"] = answer["choices"][0]["message"]["content"].split() == words.decode(tokens).split()
    finally:
        process.terminate()
        process.wait(60)
    return result


def _answers(port: int) -> bool:
    try:
        return urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def _post(port: int, path: str, body: dict) -> dict:
    data = json.dumps(body).encode()
    request = Request(f"http://127.0.0.1:{port}/v1/{path}", data, {"Content-Type": "application/json"})
    return json.load(urlopen(request, timeout=120))


def processor() -> tf.Qwen2VLProcessor:
    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    sizes = {
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 4096},
    }
    return tf.Qwen2VLProcessor(
        tf.Qwen2VLImageProcessor(**sizes), tokenizer(*special), tf.Qwen2VLVideoProcessor(**sizes)
    )


def mapped(folder: Path) -> dict:
    """Whether the tokens of a model are equal whose names vLLM maps."""
    model = made("Qwen2-VL")
    mk.convert(model, "2:4")
    mk.finalize(model, to="packed", values="int8")
    write(model, folder)
    processor().save_pretrained(folder)
    return {"tokens": served(folder, skip_tokenizer_init=False) == expected(folder)}


def command(*words: str | Path) -> None:
    if status := main.main([*map(str, words)]):
        raise RuntimeError(f"maskpro {words} has ended with {status}")


def learned(folder: Path) -> dict:
    """Whether the tokens of the folder of a run are equal, and of its dense export."""
    hf.save_model(made("Llama"), tokenizer(), folder / "model")
    (folder / "text.txt").write_text(tiny_text(paragraphs=300), encoding="utf-8")
    options = "--steps 3 --batch-size 4 --seq-len 16 --calibration-batches 2 --eval-windows 5 --dtype float32 --lr 5"
    run = folder / "run"
    command("learn", "--model", folder / "model", "--data", folder / "text.txt", "--output", run, *options.split())
    command("export", run, folder / "dense")
    tokens = expected(run)
    found = {place.name: served(place) == tokens for place in (run, folder / "dense")}
    return found | {"different tokens": len({token for row in tokens for token in row})}


def orphans(folder: Path) -> dict:
    """Whether the tokens of imported checkpoints are those of their dense weights, by the format."""
    settings = GROUPED | {"intermediate_size": 384, "tie_word_embeddings": True}
    result = {}
    for name, write_folder in {
        "sparse-24-bitmask": compressed_folder,
        "marlin-24, 4 bits": marlin_24_folder,
        "marlin-24, 8 bits, a scale a row": lambda place, model: marlin_24_folder(place, model, 8, None),
    }.items():
        torch.manual_seed(6)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**settings)).eval()
        masked(model, random_masks(model))
        place = folder / name
        source = write_folder(place / "source", model)
        command("import", source, "--output", place / "packed", "--dtype", "float32")
        result[name] = served(place / "packed") == greedy(model)
    return result


def with_int8_output(model: nn.Module) -> nn.Module:
    replace_layers(model, int8_output_layer(model))
    return model


def output_layers(folder: Path) -> dict:
    """Whether the tokens are equal of models with an output layer in int8, and what is refused or reported."""
    result = {}
    for name, settings in {"tied": {"tie_word_embeddings": True}, "odd": {"vocab_size": 101}}.items():
        model = with_int8_output(divisible({"values": "int4"}, **settings))
        write(model, folder / name)
        result[name] = served(folder / name) == expected(folder / name)
    for name in ("GPT-J", "GPT-2", "Qwen2"):
        model = made(name)
        mk.convert(model, "2:4")
        mk.finalize(model, to="packed", values="int8", output_layer="int8")
        write(model, folder / name)
        result[name] = served(folder / name) == expected(folder / name)
    for name in ("OPT", "Cohere"):
        model = made(name)
        mk.convert(model, "2:4")
        mk.finalize(model, to="packed", output_layer="int8")
        write(model, folder / name)
        result[name] = failure(served, folder / name)
    result["override"] = failure(served, folder / "odd", hf_overrides={"tie_word_embeddings": True})
    result["bfloat16"] = served(folder / "odd", dtype="bfloat16") == expected(folder / "odd", "bfloat16")
    return result


def output_layer_of_ranks(folder: Path) -> dict:
    """Whether the tokens of two ranks are equal, each with half of an output layer in int8."""
    write(with_int8_output(divisible({"values": "keep"}, vocab_size=101)), folder)
    return {"tokens": served(folder, tensor_parallel_size=2) == expected(folder)}


JOBS = {
    job.__name__: job
    for job in (
        architectures, kinds, casts, ranks, cuts, features, damage, refusals, server, mapped, learned, orphans,
        output_layers, output_layer_of_ranks, lifecycle,
    )
}  # fmt: skip

if __name__ == "__main__":
    job, place, *arguments = sys.argv[1:]
    print(json.dumps(JOBS[job](Path(place), *arguments)))
