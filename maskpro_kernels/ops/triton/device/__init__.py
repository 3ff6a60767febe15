"""Device functions, which kernels are built of: those that are used outside of this folder."""

from .arithmetic import (
    exp,
    ln,
)
from .byte_permutations import (
    chosen_pairs,
    placed_pairs,
)
from .exponential_race import (
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
    gumbel,
    scaled,
    top_n,
)
from .philox import (
    group_words,
    load_key,
    philox4x32,
)
from .plackett_luce import (
    exact_log_prob,
    exact_score,
    score_of_largest_2_of_4,
)
from .quadrature import (
    quadrature_log_prob,
    quadrature_score,
)
from .rounding import (
    round_group,
    round_stochastically,
    round_to_nearest,
)
