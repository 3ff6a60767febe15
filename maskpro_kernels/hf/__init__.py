"""Hugging Face models: loading and saving them, also with masks and with packed N:M weights; next-token logits; how
fast models are.

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

from ..stored_digests import without_digests
from .agreement import Agreement
from .callbacks import KeepMask, MaskCallback
from .decoding import next_logits, preallocated_cache
from .foreign_code import ForeignCode
from .hub import fetch_checkpoint, fetch_masks
from .known_origin import known_origin
from .loading import SMOLLM2, check_model, checkpoint_activations, load_model, show_bars, skeleton
from .masked import MaskedConfig, MaskedQuantizer
from .model_card import MASK_ALONE, Origin, write_card
from .packed import PackedConfig, PackedQuantizer
from .process_memory import PeakMemory, peak_memory
from .saving import check_login, check_repo_id, check_shard_size, save_model
from .shapes import model_of_fake_tensors, model_on_meta, read_config
from .speed import ModelSpeed, SpeedReport, Spread, measure_speed
from .stored_dtype import stored_dtype
from .stored_layers import check_no_other_quantization, tell_config

__all__ = [
    "MASK_ALONE",
    "SMOLLM2",
    "Agreement",
    "ForeignCode",
    "KeepMask",
    "MaskCallback",
    "MaskedConfig",
    "MaskedQuantizer",
    "ModelSpeed",
    "Origin",
    "PackedConfig",
    "PackedQuantizer",
    "PeakMemory",
    "SpeedReport",
    "Spread",
    "check_login",
    "check_model",
    "check_no_other_quantization",
    "check_repo_id",
    "check_shard_size",
    "checkpoint_activations",
    "fetch_checkpoint",
    "fetch_masks",
    "known_origin",
    "load_model",
    "measure_speed",
    "model_of_fake_tensors",
    "model_on_meta",
    "next_logits",
    "peak_memory",
    "preallocated_cache",
    "read_config",
    "save_model",
    "show_bars",
    "skeleton",
    "stored_dtype",
    "tell_config",
    "without_digests",
    "write_card",
]
