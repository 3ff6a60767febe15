"""Tiny models with random weights of many architectures, each with the call of one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers as tf
from torch import nn

VOCABULARY, IMAGE = 64, 5
WIDTHS = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, **WIDTHS}
GROUPED = {**TEXT, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
VISION = {"num_hidden_layers": 2, "image_size": 16, "patch_size": 8, **WIDTHS}


class Tiny(NamedTuple):
    """A model and the keywords of one batch, with labels if the model has a loss."""

    model: nn.Module
    batch: dict


def tokens(rows: int = 2, length: int = 8) -> torch.Tensor:
    # none of the special tokens, of which an image is one
    return torch.randint(IMAGE + 1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def of_text(kind, config) -> Tiny:
    ids = tokens()
    return Tiny(kind(config), {"input_ids": ids, "labels": ids})


def with_an_image(kind, config, places: int, **vision) -> Tiny:
    ids = tokens(length=8 + places)
    ids[:, :places] = IMAGE
    return Tiny(kind(config), {"input_ids": ids, "labels": ids, **vision})


def gemma3() -> Tiny:
    text = {**GROUPED, "head_dim": 8}
    config = tf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_id=IMAGE)
    tiny = with_an_image(tf.Gemma3ForConditionalGeneration, config, 4, pixel_values=images())
    # it begins as zeros, which block the gradient of the images
    nn.init.normal_(tiny.model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    types = (tiny.batch["input_ids"] == IMAGE).long()
    return Tiny(tiny.model, tiny.batch | {"token_type_ids": types})


def llava() -> Tiny:
    config = tf.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={"model_type": "llama", **GROUPED},
        image_token_index=IMAGE,
    )
    return with_an_image(tf.LlavaForConditionalGeneration, config, 4, pixel_values=images())


def qwen2_5_vl() -> Tiny:
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    special = dict.fromkeys(("vision_start_token_id", "vision_end_token_id", "video_token_id"), 3)
    config = tf.Qwen2_5_VLConfig(
        text_config={**GROUPED, "rope_parameters": rotary}, vision_config=vision, image_token_id=IMAGE, **special
    )
    # 4 x 4 patches of 3 channels, 2 frames and 4 x 4 pixels an image; 2 x 2 of them become a token
    patches = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(2))
    where = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    tiny = with_an_image(tf.Qwen2_5_VLForConditionalGeneration, config, 4, **where)
    types = (tiny.batch["input_ids"] == IMAGE).int()
    return Tiny(tiny.model, tiny.batch | {"mm_token_type_ids": types})


def t5() -> Tiny:
    config = tf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return of_text(tf.T5ForConditionalGeneration, config)


def whisper() -> Tiny:
    names = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    sizes = dict(zip(names, (2, 2, 4, 4), strict=True)) | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = tf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, num_mel_bins=8, max_source_positions=16, max_target_positions=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **sizes,
    )  # fmt: skip
    sound = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2))
    return Tiny(tf.WhisperForConditionalGeneration(config), {"input_features": sound, "labels": tokens()})


def vit() -> Tiny:
    return Tiny(
        tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=4)),
        {"pixel_values": images(), "labels": torch.tensor([0, 3])},
    )


def deepseek_v3() -> Tiny:
    config = tf.DeepseekV3Config(
        **TEXT, num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8,
    )  # fmt: skip
    return of_text(tf.DeepseekV3ForCausalLM, config)


def zamba2() -> Tiny:
    config = tf.Zamba2Config(
        **TEXT, num_key_value_heads=4, layers_block_type=["hybrid", "hybrid"], num_mem_blocks=1, adapter_rank=8,
        mamba_d_state=8, mamba_headdim=16, n_mamba_heads=4, mamba_ngroups=1, chunk_size=8, pad_token_id=0,
    )  # fmt: skip
    return of_text(tf.Zamba2ForCausalLM, config)


def jamba() -> Tiny:
    config = tf.JambaConfig(
        **GROUPED, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=4, mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False, pad_token_id=0,
    )  # fmt: skip
    return of_text(tf.JambaForCausalLM, config)


def bart() -> Tiny:
    names = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    sizes = dict(zip(names, (2, 2, 4, 4), strict=True)) | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = tf.BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=32, **sizes, **special)
    return of_text(tf.BartForConditionalGeneration, config)


class Convolutions(nn.Module):
    """A small net as timm builds them, whose convolutions hold most of its weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def forward(self, pixel_values, labels):
        features = self.blocks(self.stem(pixel_values)).mean((2, 3))
        return nn.functional.cross_entropy(self.head(features), labels)


def convolutions() -> Tiny:
    return Tiny(Convolutions(), {"pixel_values": images(), "labels": torch.tensor([0, 3])})


SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
MAKERS: dict[str, Callable[[], Tiny]] = {
    "LLaMA": lambda: of_text(tf.LlamaForCausalLM, tf.LlamaConfig(**GROUPED)),
    "Qwen3": lambda: of_text(tf.Qwen3ForCausalLM, tf.Qwen3Config(**GROUPED, head_dim=8)),
    "Mistral": lambda: of_text(tf.MistralForCausalLM, tf.MistralConfig(**GROUPED)),
    "Gemma 3": lambda: of_text(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**GROUPED, head_dim=8)),
    "Gemma 3 with images": gemma3,
    "GPT-2": lambda: of_text(tf.GPT2LMHeadModel, tf.GPT2Config(**SMALL)),
    "OPT": lambda: of_text(
        tf.OPTForCausalLM, tf.OPTConfig(**TEXT, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32)
    ),
    "Phi": lambda: of_text(tf.PhiForCausalLM, tf.PhiConfig(**TEXT)),
    "Phi-3": lambda: of_text(tf.Phi3ForCausalLM, tf.Phi3Config(**GROUPED, pad_token_id=0)),
    "BERT": lambda: of_text(tf.BertForMaskedLM, tf.BertConfig(**TEXT)),
    "T5": t5,
    "Whisper": whisper,
    "ViT": vit,
    "Qwen2.5-VL": qwen2_5_vl,
    "LLaVA": llava,
    "Mixtral": lambda: of_text(
        tf.MixtralForCausalLM, tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "Qwen3-MoE": lambda: of_text(tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=8)),
    "DeepSeek-V3": deepseek_v3,
    "gpt-oss": lambda: of_text(
        tf.GptOssForCausalLM,
        tf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0),
    ),
    "Mamba": lambda: of_text(
        tf.MambaForCausalLM,
        tf.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=8, pad_token_id=0
        ),
    ),
    "Falcon": lambda: of_text(tf.FalconForCausalLM, tf.FalconConfig(**TEXT, ffn_hidden_size=48, alibi=False)),
    "Zamba2": zamba2,
    "Jamba": jamba,
    "BART": bart,
    "Qwen2": lambda: of_text(tf.Qwen2ForCausalLM, tf.Qwen2Config(**GROUPED)),
    "Gemma": lambda: of_text(tf.GemmaForCausalLM, tf.GemmaConfig(**GROUPED, head_dim=8)),
    "Gemma 2": lambda: of_text(tf.Gemma2ForCausalLM, tf.Gemma2Config(**GROUPED, head_dim=8)),
    "OLMo 2": lambda: of_text(tf.Olmo2ForCausalLM, tf.Olmo2Config(**GROUPED, pad_token_id=0)),
    "StableLM": lambda: of_text(tf.StableLmForCausalLM, tf.StableLmConfig(**GROUPED)),
    "StarCoder2": lambda: of_text(tf.Starcoder2ForCausalLM, tf.Starcoder2Config(**GROUPED)),
    "Cohere": lambda: of_text(tf.CohereForCausalLM, tf.CohereConfig(**GROUPED)),
    "Granite": lambda: of_text(tf.GraniteForCausalLM, tf.GraniteConfig(**GROUPED)),
    "SmolLM3": lambda: of_text(tf.SmolLM3ForCausalLM, tf.SmolLM3Config(**GROUPED, pad_token_id=0)),
    "Nemotron": lambda: of_text(tf.NemotronForCausalLM, tf.NemotronConfig(**GROUPED, head_dim=8)),
    "GLM": lambda: of_text(tf.GlmForCausalLM, tf.GlmConfig(**GROUPED, head_dim=8, pad_token_id=0)),
    "GPT-NeoX": lambda: of_text(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**TEXT)),
    "GPT-J": lambda: of_text(tf.GPTJForCausalLM, tf.GPTJConfig(**SMALL, rotary_dim=4)),
    "BLOOM": lambda: of_text(
        tf.BloomForCausalLM, tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    ),
    "Qwen2-MoE": lambda: of_text(
        tf.Qwen2MoeForCausalLM, tf.Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=24)
    ),
    "OLMoE": lambda: of_text(
        tf.OlmoeForCausalLM, tf.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, pad_token_id=0)
    ),
    "Mamba 2": lambda: of_text(
        tf.Mamba2ForCausalLM,
        tf.Mamba2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            num_heads=4,
            head_dim=16,
            n_groups=1,
            chunk_size=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),  # fmt: skip
    ),
    "RoBERTa": lambda: of_text(
        tf.RobertaForMaskedLM, tf.RobertaConfig(**TEXT, max_position_embeddings=32, pad_token_id=0)
    ),
    "ELECTRA": lambda: of_text(tf.ElectraForMaskedLM, tf.ElectraConfig(**TEXT, embedding_size=16)),
    "convolutions": convolutions,
}


def tiny(name: str) -> Tiny:
    """A model in eval mode, the same at each call."""
    torch.manual_seed(0)
    made = MAKERS[name]()
    return Tiny(made.model.eval(), made.batch)


def loss_of(model: nn.Module, batch: dict) -> torch.Tensor:
    out = model(**batch)
    return out if isinstance(out, torch.Tensor) else out.loss
