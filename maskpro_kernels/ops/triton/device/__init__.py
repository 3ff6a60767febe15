"""Device functions that kernels call, exported for use outside of this folder."""

from .arithmetic import exp, ln
from .byte_permutations import chosen_pairs, permuted_bytes, placed_pairs
from .gumbel_top_k import (
    decode,
    decode_tile,
    descending,
    drawn_code,
    drawn_code_and_flips,
    drawn_keys,
    encode,
    gumbel,
    join_columns,
    scaled,
    split_columns,
    top_n,
)
from .philox import group_words, load_key, philox4x32
from .rounding import round_group, round_stochastically, round_to_nearest
from .score import (
    drawn_score_2_of_4,
    exact_log_prob,
    exact_score,
    exponential_race_score,
    quadrature_log_prob,
    quadrature_score,
    score_of_largest_2_of_4,
)
