"""Learn N:M sparsity masks of language models, and their weights if asked; pack N:M checkpoints and serve them."""

from .functional.linear import codes_linear, masked_linear, straight_through_gradient, straight_through_linear
from .functional.masks import (
    expand_mask,
    mask_log_prob,
    pack_mask,
    sample_mask,
    sample_masked_weight,
    score_update_,
    shard_counter,
    top_n_mask,
)
from .learn.estimator import StepRecord
from .learn.model_masks import ModelMasks
from .learn.optimizer import MaskOptimizer
from .learn.reinforce import Reinforce
from .learn.straight_through import StraightThrough
from .learn.trainer import MaskTrainer
from .modules import MaskedLinear, advance, dense, log_prob
from .ops.pattern import NMPattern
from .packed import Int8Linear, NMLinear, PackedNM, Sparse24Linear, nm_linear, pack_24, pack_nm, sparse24_linear
from .prune.convert import Conversion, convert
from .prune.finalize import finalize
from .prune.refit import refit

__version__ = "0.1.0"

__all__ = [
    "Conversion", "Int8Linear", "MaskOptimizer", "MaskTrainer", "MaskedLinear", "ModelMasks", "NMLinear", "NMPattern",
    "PackedNM", "Reinforce", "Sparse24Linear", "StepRecord", "StraightThrough", "advance", "codes_linear", "convert",
    "dense", "expand_mask", "finalize", "log_prob", "mask_log_prob", "masked_linear", "nm_linear",
    "pack_24", "pack_mask", "pack_nm", "refit", "sample_mask", "sample_masked_weight", "score_update_", "shard_counter",
    "sparse24_linear", "straight_through_gradient", "straight_through_linear", "top_n_mask",
]  # fmt: skip
