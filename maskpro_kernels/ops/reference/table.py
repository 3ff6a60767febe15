"""Operations in plain torch, on a CPU for which LLVM does not compile."""

from .groups import nm_linear, nm_linear_input_grad, unpack_nm
from .gumbel_top_k import masked_weight, sample_mask, top_n_mask
from .layers import draw_layers_, update_layers_
from .plackett_luce import mask_log_prob, mask_score, score_update_
from .products import (
    masked_linear,
    masked_linear_input_grad,
    masked_linear_weight_grad,
    straight_through_grad,
    straight_through_update_,
    weight_gradient,
)
from .straight_through import adamw_, descend_, descend_by_slope_, mask_slope
from .swaps import best_swaps
