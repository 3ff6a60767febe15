"""How vLLM's layers find their packed weights: names in the config, in the files, and in vLLM's model."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import vllm
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from ..hf.quantizer import SparseConfig, check_stored, names_in_int8
from ..ops.pattern import NMPattern
from ..ops.reference import SCALED
from ..packed import METHOD
from .experts import Total, UnpackedExpertsMethod
from .linear import HugePages, PackedLinearMethod, Storage
from .names import matched
from .output_layer import Int8OutputMethod
from .releases import logger, warn_of

# Parts of layers that vLLM fuses, where its model does not name them, as GPT-J
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Name of an expert's layer in the files, see ``unfuse.ExpertLinears``
EXPERT = re.compile(r"\.experts\.linears\.(\w+)\.(\d+)\.")


class PackedConfig(QuantizationConfig):
    """vLLM's view of a ``SparseConfig`` whose layers are packed.

    Args:
        config: quantization_config of the checkpoint.

    Raises:
        TypeError, ValueError: as in ``SparseConfig``, or layers are masked or in several places.
    """

    def __init__(self, config: Mapping):
        super().__init__()
        warn_of(vllm.__version__)
        checked = SparseConfig(**config)
        masked = [name for name, settings in checked.layers.items() if "layer" in settings]
        if masked:
            raise ValueError(
                f"quantization_config: expected packed layers for vLLM, got masks in {masked[0]}; write a dense or a "
                "packed checkpoint by finalize or `maskpro export`"
            )
        if checked.shared:
            raise ValueError(
                f"quantization_config: expected layers in one place each for vLLM, got {min(checked.shared)} in two; "
                "write a dense checkpoint by finalize or `maskpro export`"
            )
        self._config = checked
        self._unpacked = Total()
        # layers of vLLM's model, whose weights it takes
        self._taken: set[str] = set()
        self._pages = HugePages()
        # names of weights of a wrong shape, see ``guarded_state_dict``
        self._guards: list[str] = []
        # by name in the files after ``maybe_update_config``, then by name in vLLM's model
        self.layers = {
            name: Storage(name, NMPattern(settings["pattern"]), settings["values"], settings.get("group", SCALED))
            for name, settings in checked.layers.items()
            if "pattern" in settings
        }
        # name in the config of each layer in int8, by the same names
        self.in_int8 = {name: name for name in checked.layers if name not in self.layers}
        # of these, layers of vLLM's model
        self._served: set[str] = set()

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict) -> PackedConfig:
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config=None, revision: str | None = None) -> None:
        """Compare the files with the config, as transformers' loader does, and take the names in the files.

        transformers renames layers of some models when it loads them: the config has its names, vLLM maps the others.

        Raises:
            ValueError: as for transformers' loader, if tensors are missing.
        """
        headers = get_safetensors_params_metadata(model_name, revision=revision)
        # none if the hub does not answer: the loader finds what is missing
        if headers:
            # beside them a header has metadata of the file
            stored = {name: header["dtype"] for name, header in headers.items() if "dtype" in header}
            check_stored(stored, self._config.layers)
            with_bitmask = [name.removesuffix(".bitmask") for name in stored if name.endswith(".bitmask")]
            packed = [name for name in with_bitmask if f"{name}.values" in stored]
            in_int8 = names_in_int8(stored)
            names = matched(packed, self.layers)
            self.layers = {name: self.layers[config_name] for name, config_name in names.items()}
            self.in_int8 = matched(in_int8, self.in_int8)
            self._guards = [f"{name}.weight" for name in (*packed, *in_int8) if f"{name}.weight" in stored]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        # it maps names of weights
        def mapped(layers: dict) -> dict:
            names = hf_to_vllm_mapper.apply_dict({f"{name}.weight": value for name, value in layers.items()})
            return {name.removesuffix(".weight"): value for name, value in names.items()}

        self.layers = mapped(self.layers)
        self.in_int8 = mapped(self.in_int8)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Rename layers of experts to the names that vLLM's loader knows, and leave out weights of a wrong shape.

        Raises:
            ValueError: if vLLM's model takes no quantization for an output layer in int8; some then ignore its tensors.
        """
        ignored = set(self.in_int8.values()) - self._served
        if ignored and get_pp_group().is_last_rank:
            raise ValueError(
                "quantization_config: expected an output layer in the model's dtype for this model of vLLM, got int8 "
                f"in {min(ignored)}; export the checkpoint without --output-layer"
            )
        left = [storage.name for name, storage in self.layers.items() if name not in self._taken]
        if left and get_pp_group().world_size == 1:
            logger.warning(
                "maskpro_kernels: vLLM's model has no place for the packed weights of %d layers, such as %s; where it "
                "has such a layer, export the checkpoint with this layer dense",
                len(left),
                left[0],
            )
        renamed = {EXPERT: r".experts.\2.\1.", **{re.compile(f"^{re.escape(name)}$"): None for name in self._guards}}
        return super().get_checkpoint_weight_mapper() | WeightsMapper(orig_to_new_regex=renamed)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            linears = f"{prefix.removesuffix('.routed_experts')}.linears."
            matrices = {name.removeprefix(linears): x for name, x in self.layers.items() if name.startswith(linears)}
            if not matrices:
                return None
            self._taken |= {f"{linears}{name}" for name in matrices}
            return UnpackedExpertsMethod(layer.moe_config, matrices, self._unpacked)
        # of some models vLLM names it ".lm_head"
        in_int8 = self.in_int8.get(prefix.removeprefix("."))
        if in_int8 is not None:
            if not isinstance(layer, ParallelLMHead):
                raise ValueError(
                    f"quantization_config: expected a pattern of each layer but the output layer, got none of {in_int8}"
                )
            self._served.add(in_int8)
            return Int8OutputMethod(in_int8, self._pages)
        if not isinstance(layer, LinearBase):
            if prefix in self.layers:
                raise ValueError(
                    f"quantization_config: expected names of linear layers of vLLM's model, got "
                    f"{self.layers[prefix].name!r}, which is {type(layer).__name__} there"
                )
            return None
        names = [prefix]
        if prefix not in self.layers:
            parent, dot, last = prefix.rpartition(".")
            names = [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(last, FUSED.get(last, ()))]
        parts = [self.layers.get(name) for name in names]
        if not any(parts):
            return UnquantizedLinearMethod()
        self._taken.update(names)
        return PackedLinearMethod(prefix, parts, self._pages)
