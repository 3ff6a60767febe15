"""Kernels that draw N:M masks, multiply under them, and multiply with packed N:M weights."""

from .functional.linear import codes_linear, masked_linear, straight_through_linear
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
from .modules import MaskedLinear, advance, dense, log_prob
from .ops.pattern import NMPattern
from .packed import NMLinear, PackedNM, Sparse24Linear, nm_linear, pack_24, pack_nm, sparse24_linear
