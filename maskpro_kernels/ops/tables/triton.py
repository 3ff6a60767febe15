"""Operations as Triton kernels."""

from ..reference.slopes import mask_slope
from ..triton.adamw_and_swaps import adamw_, best_swaps
from ..triton.curvature import curvature_factors
from ..triton.grouped import draw_layers_, update_layers_
from ..triton.masked_gemm import masked_linear, masked_linear_input_grad, masked_linear_weight_grad
from ..triton.packed_gemm import nm_linear, nm_linear_input_grad, unpack_nm
from ..triton.sampling import mask_log_prob, mask_score, masked_weight, sample_mask, score_update_, top_n_mask
from ..triton.slopes import descend_, straight_through_grad, straight_through_update_, weight_gradient
from ..unfused import int8_linear
