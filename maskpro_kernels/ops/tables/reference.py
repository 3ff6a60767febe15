"""Operations in plain torch, on a CPU for which LLVM does not compile."""

from ..reference.curvature import curvature_factors
from ..reference.groups import nm_linear, nm_linear_input_grad, unpack_nm
from ..reference.gumbel_top_k import masked_weight, sample_mask, top_n_mask
from ..reference.layers import draw_layers_, update_layers_
from ..reference.plackett_luce import mask_log_prob, mask_score, score_update_
from ..reference.slopes import adamw_, descend_, descend_by_slope_, mask_slope
from ..reference.swaps import best_swaps
from ..unfused import (
    int8_linear,
    masked_linear,
    masked_linear_input_grad,
    masked_linear_weight_grad,
    straight_through_grad,
    straight_through_update_,
    weight_gradient,
)
