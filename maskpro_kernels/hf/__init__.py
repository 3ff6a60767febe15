"""Hugging Face models: loading and saving them, also with masks and with packed N:M weights; how fast models are.

After ``import maskpro_kernels.hf`` transformers' ``from_pretrained`` loads what ``save_pretrained`` has written of a
converted model, or of one with packed weights. The import raises ModuleNotFoundError without transformers, of the extra
``hf``.
"""

from ..extras import require

try:
    import transformers as _
except ModuleNotFoundError:
    require("maskpro_kernels.hf", "transformers")
    raise

from .callbacks import KeepMask, MaskCallback
from .decoding import next_logits, preallocated_cache
from .loading import SMOLLM2, check_model, checkpoint_activations, fetch, load_model, show_bars
from .quantizer import SparseConfig, SparseQuantizer, check_not_quantized, describe
from .saving import model_card, save_model
from .speed import measure_speed

__all__ = [
    "SMOLLM2", "KeepMask", "MaskCallback", "SparseConfig", "SparseQuantizer", "check_model", "check_not_quantized",
    "checkpoint_activations", "describe", "fetch", "load_model", "measure_speed", "model_card", "next_logits",
    "preallocated_cache", "save_model", "show_bars",
]  # fmt: skip
