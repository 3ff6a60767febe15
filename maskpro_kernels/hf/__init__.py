"""Hugging Face models: loading and saving them, also with masks and with packed N:M weights; next-token logits.

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

from .callbacks import KeepMask
from .decoding import next_logits, preallocated_cache
from .loading import SMOLLM2, checkpoint_activations, load_model, save_model, show_bars
from .masked import MaskedConfig, MaskedQuantizer
from .packed import PackedConfig, PackedQuantizer
from .stored_layers import check_no_other_quantization, tell_config

__all__ = [
    "SMOLLM2",
    "KeepMask",
    "MaskedConfig",
    "MaskedQuantizer",
    "PackedConfig",
    "PackedQuantizer",
    "check_no_other_quantization",
    "checkpoint_activations",
    "load_model",
    "next_logits",
    "preallocated_cache",
    "save_model",
    "show_bars",
    "tell_config",
]
