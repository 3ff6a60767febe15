"""Experts of vLLM's models, whose packed matrices are unpacked when they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.utils import set_weight_attrs

from ..hf.quantizer import COPY_AGAIN
from ..packed import KEEP
from .linear import Storage, check_first_load, check_load_format, without_layer
from .releases import logger


@dataclass
class Total:
    """Sums over the layers of experts of a model, on this rank."""

    layers: int = 0
    loaded_layers: int = 0
    dense_bytes: int = 0


class UnpackedExpertsMethod(UnquantizedFusedMoEMethod):
    """Method of experts with packed matrices: vLLM multiplies all experts of a layer in one kernel of its own.

    A matrix is unpacked as a whole and then cut over ranks, so every cut of vLLM's is possible.

    Args:
        moe: vLLM's configuration of the experts.
        matrices: storage of each packed matrix by its name and expert, as "up_proj.3"; the others are dense.
        total: sums of the model, reported after its last layer.
    """

    def __init__(self, moe, matrices: Mapping[str, Storage], total: Total):
        super().__init__(moe)
        self.matrices = matrices
        self.total = total
        # of (matrix, number of the expert among all and their copies): tensors by name, of those that are not complete
        self.pending: dict[tuple[str, int], dict[str, Tensor]] = {}
        self.unpacked: set[tuple[str, int]] = set()

    def create_weights(self, layer: nn.Module, num_experts: int, hidden_size: int,
                       intermediate_size_per_partition: int, params_dtype: torch.dtype,
                       **attributes) -> None:  # fmt: skip
        check_load_format()
        super().create_weights(
            layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **attributes
        )
        self.total.layers += 1
        self.matrix_names = {
            "w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name
        }  # fmt: skip
        self.experts = layer.moe_config.num_logical_experts
        for side in ("w13", "w2"):
            weight = getattr(layer, f"{side}_weight")
            load_dense = without_layer(weight.weight_loader, layer)
            # vLLM looks for the loader of a tensor in the parameter of its name
            for name in ("values", "bitmask", "scales"):
                parameter = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
                loader = self._loader(f"{side}_weight", name, load_dense)
                set_weight_attrs(parameter, {"weight_loader": MethodType(loader, layer)})
                layer.register_parameter(f"{side}_{name}", parameter)
            weight.weight_loader = MethodType(_but_guards(load_dense), layer)

    def _loader(self, dense_name: str, name: str, load_dense: Callable) -> Callable:
        def load(
            layer: nn.Module, param: nn.Parameter, loaded_weight: Tensor, weight_name: str, shard_id: str,
            expert_id: int, return_success: bool = False,
        ) -> bool | None:  # fmt: skip
            # vLLM numbers copies of experts after all experts
            matrix = f"{self.matrix_names[shard_id]}.{expert_id % self.experts}"
            storage = self.matrices[matrix]
            check_first_load(param, storage.name)
            if not layer.expert_map_manager.is_local_expert(expert_id):
                return False if return_success else None
            # not an argument: vLLM holds loaders, and replaces this parameter after loading
            weight = getattr(layer, dense_name)
            tensors = self.pending.setdefault((matrix, expert_id), {})
            # a copy: some loaders free a file's tensors after it
            tensors[name] = loaded_weight.to(weight.device, copy=True)
            if len(tensors) == (2 if storage.values == KEEP else 3):
                packed = storage.packed(self.pending.pop((matrix, expert_id)), weight.dtype)
                load_dense(layer, weight, packed.unpack(), "weight", shard_id, expert_id)
                self.unpacked.add((matrix, expert_id))
            return True if return_success else None

        return load

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        for expert_id in layer.expert_map_manager.get_local_expert_ids():
            for matrix, storage in self.matrices.items():
                is_of_expert = matrix.endswith(f".{expert_id % self.experts}")
                if is_of_expert and (matrix, expert_id) not in self.unpacked:
                    tensors = self.pending.get((matrix, expert_id), {})
                    raise ValueError(
                        f"checkpoint: expected all tensors of {storage.name}, got {' and '.join(tensors) or 'none'}; "
                        f"{COPY_AGAIN}, or vLLM's model does not load them"
                    )
        for side in ("w13", "w2"):
            for name in ("values", "bitmask", "scales"):
                delattr(layer, f"{side}_{name}")
        self.total.dense_bytes += layer.w13_weight.nbytes + layer.w2_weight.nbytes
        self.total.loaded_layers += 1
        if self.total.loaded_layers == self.total.layers:
            logger.warning(
                "maskpro_kernels: the experts of %d layers were unpacked: they take %d bytes on this rank",
                self.total.layers,
                self.total.dense_bytes,
            )
        super().process_weights_after_loading(layer)


def _but_guards(load_dense: Callable) -> Callable:
    def load(layer: nn.Module, param: nn.Parameter, loaded_weight: Tensor, *arguments, **keywords) -> bool | None:
        if loaded_weight.dim() == 1:
            # not of this layer: ``guarded_state_dict``
            return True
        return load_dense(layer, param, loaded_weight, *arguments, **keywords)

    return load
