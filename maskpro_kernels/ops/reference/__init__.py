"""Every operation in plain torch: the specification, which all other routes equal bit for bit."""

from .adamw import (
    adamw_,
    adamw_scalars,
    group_adamw,
)
from .arithmetic import (
    EXP_POLYNOMIAL,
    EXP_UNDERFLOW,
    INTEGERS,
    LN2,
    LN2_HIGH,
    LN2_LOW,
    LN_POLYNOMIAL,
    LOG2_E,
    LOWEST_FLOAT32,
    SMALLEST_NORMAL,
    SQRT_HALF_BITS,
    exp,
    ln,
    saturated,
)
from .exponential_race import (
    BERNOULLI,
    LARGEST_LOG_ARRIVAL,
    arrival_ratio,
    dropped_softmax,
    exponential_race_score,
)
from .groups import (
    columns,
    decode,
    encode,
    fixed_sum,
    group_index,
    grouped,
    uncolumns,
)
from .gumbel_top_k import (
    TWO_POW_MINUS_32,
    code_masked_weight,
    drawn_keys,
    group_code_masked_weight,
    group_drawn,
    group_sample_mask,
    group_sample_masked_weight,
    group_top_n_mask,
    group_top_n_masked_weight,
    gumbel,
    masked,
    sample_mask,
    sample_masked_weight,
    scaled,
    top_n,
    top_n_mask,
    top_n_masked_weight,
)
from .packing import (
    SCALED,
    dequantized,
    group_unpacked,
    packed_part,
    unpack_nm,
)
from .plackett_luce import (
    EXACT_SCORE_MAX_N,
    EXPONENT_CLAMP,
    NEAR_CERTAIN,
    RECIPROCAL_SCALE,
    dropped_total,
    exact_log_prob,
    exact_score,
    extremes,
    gather_slots,
    kept_positions,
    members,
    order_sum,
    plackett_luce_terms,
    scatter_slots,
    slot_columns,
    slot_score,
)
from .quadrature import (
    FIRST_NODE,
    LAST_NODE,
    LOWEST_LOG_ARRIVAL,
    ONE_MINUS_EXP,
    log_arrivals,
    node_exponent,
    node_weight,
    nodes,
    one_minus_exp_ratio,
    peak_exponent,
    quadrature_grid,
    quadrature_log_prob,
    quadrature_score,
)
from .rounding import (
    BFLOAT16_MAX,
    FLOAT16_MAX,
    FLOAT16_SMALLEST_NORMAL,
    FLOAT16_SUBNORMAL_STEP,
    group_round_logits,
    round_stochastically,
)
from .score import (
    group_mask_log_prob,
    group_mask_score,
    group_score_terms,
    group_updated_logits,
    mask_log_prob,
    mask_score,
    score_terms,
    score_update_,
)
from .straight_through import (
    bounded_step,
    descend_,
    group_descended_logits,
    group_mask_slope,
    group_straight_through_logits,
    mask_slope,
    straight_through_grad,
    straight_through_update_,
)
from .swaps import (
    best_swaps,
)
