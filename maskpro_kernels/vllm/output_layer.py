"""Product of vLLM's output layer with a weight of int8 values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from .. import ops
from ..hf.quantizer import COPY_AGAIN
from ..ops.reference import SCALED, dequantized
from ..packed import check_int8_scales
from .linear import DIMENSIONS, HugePages, check_loaded

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
        self.pages.add_layer()
        rows = sum(output_partition_sizes)
        shapes = {"values": (input_size, torch.int8), "scales": (-(-input_size // SCALED), params_dtype)}

        def loader(name: str) -> Callable:
            def load(parameter: nn.Parameter, loaded: Tensor) -> None:
                check_loaded(f"{self.name}.{name}", loaded, *shapes[name])
                weight_loader(parameter, loaded)
                self.loaded.add(name)

            return load

        for name, (width, dtype) in shapes.items():
            parameter = nn.Parameter(torch.empty(rows, width, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": loader(name), **DIMENSIONS, **attributes})
            layer.register_parameter(name, parameter)
        # as in ``PackedLinearMethod``
        weight = nn.Parameter(torch.empty(0, 0, dtype=params_dtype), requires_grad=False)
        set_weight_attrs(weight, {"weight_loader": lambda *_: None})
        layer.register_parameter("weight", weight)

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
            pairs = zip(values.split(ROWS), scales.split(ROWS), strict=True)
            weight = torch.cat([dequantized(*pair, scales.dtype) for pair in pairs])
            layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
            del layer.values, layer.scales
        self.pages.add_loaded([values, scales] if values.device.type == "cpu" else [])

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., rows] of x [..., K]."""
        if layer.weight.numel():
            return nn.functional.linear(x, layer.weight, bias)
        y = ops.int8_linear(x.reshape(-1, x.shape[-1]).contiguous(), layer.values, layer.scales, bias)
        return y.view(*x.shape[:-1], y.shape[1])
