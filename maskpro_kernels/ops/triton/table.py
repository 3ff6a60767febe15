"""Operations as Triton kernels."""

from ..reference.straight_through import mask_slope
from .adamw_and_swaps import adamw_, best_swaps
from .grouped import draw_layers_, update_layers_
from .masked_gemm import masked_linear, masked_linear_input_grad, masked_linear_weight_grad
from .packed import nm_linear, nm_linear_input_grad, unpack_nm
from .sampling import mask_log_prob, mask_score, masked_weight, sample_mask, score_update_, top_n_mask
from .straight_through import descend_, straight_through_grad, straight_through_update_, weight_gradient
