"""What vLLM has of this package until it loads a packed checkpoint."""

from __future__ import annotations

import vllm
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ..packed import METHOD
from .releases import TRIED

# Methods of vLLM's class that it has to call
NEEDED = ("apply_vllm_mapper", "maybe_update_config", "get_checkpoint_weight_mapper")


def register_config() -> None:
    """Register ``RegisteredConfig``; AttributeError if vLLM would not call the methods of its ``PackedConfig``."""
    for name in NEEDED:
        getattr(QuantizationConfig, name)
    register_quantization_config(METHOD)(RegisteredConfig)


class RegisteredConfig(QuantizationConfig):
    """Class that makes a ``PackedConfig``, whose imports take seconds that other models would wait for."""

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict) -> QuantizationConfig:
        """Make the ``PackedConfig`` of a checkpoint's quantization_config.

        Raises:
            TypeError, ValueError: as in ``PackedConfig``; or this release of vLLM lacks a part.
        """
        try:
            from .config import PackedConfig
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"vLLM: expected {' or '.join(TRIED)} for packed checkpoints, got {vllm.__version__}: {error}"
            ) from error
        return PackedConfig(config)
