"""Operations as machine code, on a CPU for which LLVM compiles; torch multiplies where the mask changes."""

from ..cpu.kernels import (
    adamw_,
    best_swaps,
    descend_,
    descend_by_slope_,
    draw_layers_,
    mask_log_prob,
    mask_score,
    mask_slope,
    masked_weight,
    sample_mask,
    score_update_,
    top_n_mask,
    update_layers_,
)
from ..cpu.packed_gemm.products import int8_linear, nm_linear, nm_linear_input_grad, unpack_nm
from ..reference.curvature import curvature_factors
from ..unfused import (
    masked_linear,
    masked_linear_input_grad,
    masked_linear_weight_grad,
    straight_through_grad,
    straight_through_update_,
    weight_gradient,
)
