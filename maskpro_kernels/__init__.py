"""Fused kernels for learning and running N:M sparse language models."""

from .convert import Conversion, convert, finalize
from .estimators import Reinforce, StraightThrough
from .functional import (
    codes_linear,
    expand_mask,
    mask_log_prob,
    masked_linear,
    pack_mask,
    sample_mask,
    sample_masked_weight,
    score_update_,
    shard_counter,
    straight_through_gradient,
    straight_through_linear,
    top_n_linear,
    top_n_mask,
)
from .modules import MaskedLinear, NMLinear, Sparse24Linear, advance, log_prob
from .packed import PackedNM, nm_linear, pack_24, pack_nm, sparse24_linear
from .pattern import NMPattern
from .trainer import MaskTrainer, StepRecord

__version__ = "0.1.0"

__all__ = [
    "Conversion",
    "MaskTrainer",
    "MaskedLinear",
    "NMLinear",
    "NMPattern",
    "PackedNM",
    "Reinforce",
    "Sparse24Linear",
    "StepRecord",
    "StraightThrough",
    "advance",
    "codes_linear",
    "convert",
    "expand_mask",
    "finalize",
    "log_prob",
    "mask_log_prob",
    "masked_linear",
    "nm_linear",
    "pack_24",
    "pack_mask",
    "pack_nm",
    "sample_mask",
    "sample_masked_weight",
    "score_update_",
    "shard_counter",
    "sparse24_linear",
    "straight_through_gradient",
    "straight_through_linear",
    "top_n_linear",
    "top_n_mask",
]
