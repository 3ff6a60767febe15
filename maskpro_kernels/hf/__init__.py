"""Hugging Face models: load and save them, also with masks or packed N:M weights, and measure their speed.

After ``import maskpro_kernels.hf``, transformers' ``from_pretrained`` loads checkpoints of converted models and of
models with packed weights. Without transformers, of the extra ``hf``, the import raises ModuleNotFoundError.
"""

from ..extras import require

try:
    import transformers as _
except ModuleNotFoundError:
    require("maskpro_kernels.hf", "transformers")
    raise

from .callbacks import KeepMask, MaskCallback
from .decoding import next_logits, preallocated_cache
from .loading import SMOLLM2, SMOLLM2_ID, check_model, checkpoint_activations, fetch, load_model, show_bars
from .quantizer import SparseConfig, SparseQuantizer, check_not_quantized, describe
from .saving import model_card, save_model
from .timing import measure_speed

__all__ = [
    "SMOLLM2", "SMOLLM2_ID", "KeepMask", "MaskCallback", "SparseConfig", "SparseQuantizer", "check_model",
    "check_not_quantized", "checkpoint_activations", "describe", "fetch", "load_model", "measure_speed", "model_card",
    "next_logits", "preallocated_cache", "save_model", "show_bars",
]  # fmt: skip
