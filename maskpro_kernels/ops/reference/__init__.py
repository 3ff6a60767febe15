"""Reference of each operation in plain torch: the specification, which all other routes match bit for bit."""

from .arithmetic import LN2, SMALLEST_NORMAL, exp, group_round_logits, ln, round_stochastically, saturated, scalar
from .curvature import curvature_factors, token_squares
from .groups import (
    INT4_GROUPS,
    INTEGERS,
    SCALED,
    columns,
    decode,
    dequantized,
    encode,
    fixed_sum,
    group_unpacked,
    kept_values,
    nm_linear,
    nm_linear_input_grad,
    numbers_of,
    packed_part,
    scaled_group,
    uncolumns,
    unpack_nm,
)
from .gumbel_top_k import (
    group_drawn,
    group_sample_mask,
    group_top_n_mask,
    gumbel,
    masked_weight,
    sample_mask,
    scaled,
    top_n,
    top_n_mask,
)
from .plackett_luce import (
    EXACT_SCORE_MAX_N,
    EXPONENT_CLAMP,
    RECIPROCAL_SCALE,
    exact_score,
    group_mask_log_prob,
    group_mask_score,
    group_score_terms,
    group_updated_logits,
    mask_log_prob,
    mask_score,
    score_update_,
)
from .slopes import (
    adamw_,
    adamw_scalars,
    descend_,
    descend_by_slope_,
    group_adamw,
    group_descended_logits,
    group_mask_slope,
    group_straight_through_logits,
    mask_slope,
)
from .swaps import best_swaps, group_best_swaps
