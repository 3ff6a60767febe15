"""Reference of each operation in plain torch: the specification, which all other routes match bit for bit."""

from .arithmetic import LN2, SMALLEST_NORMAL, exp, group_round_logits, ln, round_stochastically, saturated
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
    input_grad,
    kept_values,
    nm_linear,
    numbers_of,
    packed_part,
    scaled_group,
    uncolumns,
    unpack_nm,
)
from .gumbel_top_k import (
    code_masked_weight,
    group_drawn,
    group_sample_mask,
    group_top_n_mask,
    gumbel,
    sample_mask,
    sample_masked_weight,
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
from .straight_through import (
    adamw_,
    adamw_scalars,
    descend_,
    group_adamw,
    group_descended_logits,
    group_mask_slope,
    group_straight_through_logits,
    straight_through_grad,
    straight_through_update_,
)
from .swaps import best_swaps, group_best_swaps
