"""The operations; all but products and what follows from them have the same bits on every route."""

from .direct import direct_nm_linear
from .gradient_updates import (
    adamw_,
    column_squares,
    descend_,
    mask_slope,
    straight_through_grad,
    straight_through_update_,
    weight_gradient,
)
from .registry import (
    best_swaps,
    mask_log_prob,
    mask_score,
    masked_linear,
    masked_linear_input_grad,
    masked_linear_weight_grad,
    masked_weight,
    nm_linear,
    sample_mask,
    score_update_,
    top_n_mask,
    unpack_nm,
    unpacked,
)
