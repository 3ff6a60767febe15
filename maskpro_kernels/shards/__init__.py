"""Masked layers that ranks share: by FSDP2, or by a tensor-parallel plan."""

from .dtensors import (
    Place,
    check_in_memory,
    check_no_flat_parameters,
    check_not_sharded,
    is_distributed,
    is_finite,
    like_shards,
    local,
    part_of,
    whole,
    whole_input,
)
from .layer_shard import LayerShard
from .planned_part import DeviceMesh
from .rows import RowShard, gathers_within, reset_iteration, resetting, resharded
from .tensor_parallel import TensorShard, attach, check_shard

__all__ = [
    "DeviceMesh",
    "LayerShard",
    "Place",
    "RowShard",
    "TensorShard",
    "attach",
    "check_in_memory",
    "check_no_flat_parameters",
    "check_not_sharded",
    "check_shard",
    "gathers_within",
    "is_distributed",
    "is_finite",
    "like_shards",
    "local",
    "part_of",
    "reset_iteration",
    "resetting",
    "resharded",
    "whole",
    "whole_input",
]
