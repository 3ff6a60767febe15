"""Masked layers that ranks share: by FSDP2, or by a tensor-parallel plan."""

from .dtensors import (
    Place,
    check_in_memory,
    check_no_flat_parameters,
    check_not_sharded,
    check_not_wrapped,
    is_distributed,
    is_finite,
    like_shards,
    local,
    part_of,
    whole,
    whole_input,
)
from .fused import (
    Fusion,
    fused_of,
    layers_of_shards,
    matrix_of,
    parameter_of_shards,
    plan_of,
    reason_against_fused,
)
from .layer_shard import LayerShard
from .planned_part import DeviceMesh
from .rows import Params, RowShard, gathers_within, is_shared, reset_iteration, resetting, resharded, without_gradients
from .tensor_parallel import TensorShard, attach, check_meshes, check_shard

__all__ = [
    "DeviceMesh",
    "Fusion",
    "LayerShard",
    "Params",
    "Place",
    "RowShard",
    "TensorShard",
    "attach",
    "check_in_memory",
    "check_meshes",
    "check_no_flat_parameters",
    "check_not_sharded",
    "check_not_wrapped",
    "check_shard",
    "fused_of",
    "gathers_within",
    "is_distributed",
    "is_finite",
    "is_shared",
    "layers_of_shards",
    "like_shards",
    "local",
    "matrix_of",
    "parameter_of_shards",
    "part_of",
    "plan_of",
    "reason_against_fused",
    "reset_iteration",
    "resetting",
    "resharded",
    "whole",
    "whole_input",
    "without_gradients",
]
