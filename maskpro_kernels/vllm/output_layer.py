"""Product of vLLM's output layer with a weight of int8 values."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from .. import ops
from ..hf.quantizer import COPY_AGAIN
from ..ops.reference import SCALED, dequantized
from ..packed import INT8, check_int8_scales
from .linear import DIMENSIONS, LARGEST, HugePages, check_first_load, check_load_format, check_loaded, without_layer

# Rows that are dequantized at a time
ROWS = 4096


class Int8OutputMethod(QuantizeMethodBase):
    """Method of an output layer with int8 values and scales, see ``Int8Linear``.

    vLLM's loader cuts both by rows and adds rows of zeros. On a GPU the weight is dequantized once after loading.

    Args:
        name: of the layer in the checkpoint.
        pages: of the model.
    """

    def __init__(self, name: str, pages: HugePages):
        self.name = name
        self.pages = pages
        self.loaded: set[str] = set()

    def create_weights(self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int],
                       input_size: int, output_size: int, params_dtype: torch.dtype,
                       weight_loader: Callable, **attributes) -> None:  # fmt: skip
        check_load_format()
        rows = sum(output_partition_sizes)
        shapes = {"values": (input_size, torch.int8), "scales": (-(-input_size // SCALED), params_dtype)}

        load_dense = without_layer(weight_loader, layer)

        def loader(name: str) -> Callable:
            def load(layer: nn.Module, param: nn.Parameter, loaded_weight: Tensor) -> None:
                check_first_load(param, self.name)
                check_loaded(f"{self.name}.{name}", loaded_weight, *shapes[name], LARGEST[INT8])
                load_dense(layer, param, loaded_weight)
                self.loaded.add(name)

            return MethodType(load, layer)

        for name, (width, dtype) in shapes.items():
            parameter = nn.Parameter(torch.empty(rows, width, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": loader(name), **DIMENSIONS, **attributes})
            layer.register_parameter(name, parameter)
        # as in ``PackedLinearMethod``. NaN, since vLLM lets two models whose output layers have equal weights share one
        weight = nn.Parameter(torch.full((1, 1), torch.nan, dtype=params_dtype), requires_grad=False)
        set_weight_attrs(weight, {"weight_loader": lambda *_: None})
        layer.register_parameter("weight", weight)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        raise ValueError(
            f"tie_word_embeddings: expected false for a checkpoint with its output layer {self.name} in int8, got true"
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check the loaded tensors, and dequantize them on a GPU; on a CPU fill huge pages."""
        for name in ("values", "scales"):
            if name not in self.loaded:
                raise ValueError(f"checkpoint: expected {name} of {self.name}, got none; {COPY_AGAIN}")
        values = layer.values.data
        scales = layer.scales.data
        try:
            check_int8_scales(scales)
        except ValueError as error:
            raise ValueError(f"checkpoint: {self.name}.{error}") from error
        if values.device.type != "cpu":
            weight = torch.empty_like(values, dtype=scales.dtype)
            for parts in zip(weight.split(ROWS), values.split(ROWS), scales.split(ROWS), strict=True):
                rows, *pair = parts
                rows.copy_(dequantized(*pair, scales.dtype))
            layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
            del layer.values, layer.scales
        else:
            self.pages.add([values, scales])

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., rows] of x [..., K]."""
        if layer.weight.device.type != "cpu":
            return nn.functional.linear(x, layer.weight, bias)
        y = ops.int8_linear(x.reshape(-1, x.shape[-1]).contiguous(), layer.values, layer.scales, bias)
        return y.view(*x.shape[:-1], y.shape[1])
