"""The public functions: arguments are checked here, once, before anything happens."""

from .linear import (
    codes_linear,
    masked_linear,
    straight_through_gradient,
    straight_through_linear,
)
from .masks import (
    expand_mask,
    mask_log_prob,
    pack_mask,
    sample_mask,
    sample_masked_weight,
    score_update_,
    shard_counter,
    top_n_mask,
)
