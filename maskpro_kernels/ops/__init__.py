"""Operations. All but products, and results of products, have the same bits on every route."""

from .definitions import (
    best_swaps,
    codes_under,
    curvature_factors,
    descend_,
    differentiable_nm_linear,
    int8_linear,
    mask_log_prob,
    mask_score,
    mask_slope,
    masked_linear,
    masked_linear_input_grad,
    masked_linear_weight_grad,
    masked_weight,
    nm_linear,
    sample_mask,
    save_mask,
    saved_mask,
    score_update_,
    straight_through_grad,
    straight_through_update_,
    top_n_mask,
    unpack_nm,
    unpacked,
    weight_gradient,
)
from .reference import token_squares
