"""Device functions, which kernels are built of."""

from .arithmetic import (
    exp,
    ln,
)
from .byte_permutations import (
    chosen_pairs,
    permuted_bytes,
    placed_pairs,
)
from .exponential_race import (
    arrival_ratio,
    dropped_softmax,
    exponential_race_score,
)
from .groups import (
    decode,
    decode_tile,
    encode,
    join_columns,
    split_columns,
)
from .gumbel_top_k import (
    descending,
    drawn_code,
    drawn_code_and_flips,
    drawn_keys,
    drawn_score_2_of_4,
    expected,
    flipped,
    gumbel,
    scaled,
    top_n,
)
from .philox import (
    group_words,
    load_key,
    load_key_again,
    philox4x32,
)
from .plackett_luce import (
    add_term,
    dropped_total,
    exact_log_prob,
    exact_score,
    gather_slots,
    kept_positions,
    largest_dropped,
    order_sum,
    plackett_luce_terms,
    scatter_slots,
    score_of_largest_2_of_4,
    slot_score,
    smallest_kept,
)
from .quadrature import (
    log_arrivals,
    node_exponent,
    node_weight,
    one_minus_exp_ratio,
    peak_exponent,
    quadrature_log_prob,
    quadrature_score,
)
from .rounding import (
    round_group,
    round_stochastically,
    round_to_nearest,
)
