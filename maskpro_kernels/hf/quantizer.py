"""What transformers asks of the quantizers that load checkpoints with masks and with packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..adapters import fit_adapters, refuse_merging
from ..fsdp import check_in_memory
from ..modules import MaskedLinear
from ..packed import SPARSE, dense_layer
from ..replacement import replace_modules
from ..stored_digests import DIGESTS, check_checkpoint, digests_are_checked
from ..unfuse import as_built


class SparseConfig(QuantizationConfigMixin):
    """A ``quantization_config`` of layers with masks or packed weights.

    Attributes:
        taken_apart: names of modules which were taken apart, see ``unfuse``.
        digests: of what is stored, see ``stored_digests``. They are those of files: a loaded model has none, and
            ``save_pretrained`` writes new ones.
    """

    taken_apart: list[str]
    digests: Mapping[str, Mapping[str, str]]

    def to_dict(self) -> dict:
        """As it is stored, without what there is none of."""
        optional = ("taken_apart", DIGESTS)
        return {name: value for name, value in super().to_dict().items() if value or name not in optional}


class SparseQuantizer(HfQuantizer):
    """A quantizer whose layers are stored as they are, trained and compiled, each as a whole on one device."""

    # they are made by ``convert`` and ``finalize``, not from a dense checkpoint while it is loaded
    requires_calibration = True

    def _check_digests(self, files: Iterable[str] | None) -> None:
        """``check_checkpoint`` of files that are loaded; the model that they become has no digests."""
        self.quantization_config.digests = {}
        # not by the given config: that of a loaded model has none, and it may be given to load the same files again
        if files is not None and digests_are_checked():
            check_checkpoint(map(Path, files))

    def preprocess_model(self, model: PreTrainedModel, *args, **kwargs) -> None:
        """As transformers has it.

        Raises:
            ValueError: if the layers are to be split over devices. Their parts would be no packed weights, or the masks
                others.
        """
        how = getattr(model.config, "distributed_config", None)
        split = {name: getattr(how, name, None) for name in ("tp_size", "tp_plan", "ep_size", "ep_plan")}
        split = {name: value for name, value in split.items() if value not in (None, 1, {})}
        if split:
            told = ", ".join(f"{name}={value!r}" for name, value in split.items())
            raise ValueError(
                f"distributed_config: expected whole layers of a checkpoint with masked or packed weights, got {told}; "
                "write the dense one, by finalize or `maskpro export`, which transformers splits as any other"
            )
        super().preprocess_model(model, *args, **kwargs)

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model with dense layers, exact zeros where weights are dropped, saved as any other; in place.

        Args:
            model: whose layers are to be dense.
            dtype: of its weights; None: as they are.

        Raises:
            ValueError: if a weight is not in memory. The model is then as it was.
        """
        return super().dequantize(model, model.dtype if dtype is None else dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SPARSE)}
        for name, layer in layers.items():
            check_in_memory("model", layer, name, layer.weight if isinstance(layer, MaskedLinear) else layer.values)
        with torch.no_grad():
            dense = {id(layer): dense_layer(layer) for layer in layers.values()}
        replace_modules(model, dense)
        as_built(model)
        fit_adapters(model)
        refuse_merging(model, SPARSE)
        # not by `model.to`: it would round the frequencies of the rotary embedding, and what is to stay in float32
        before = {linear.weight.dtype for linear in dense.values()}
        for parameter in model.parameters():
            if parameter.dtype in before:
                parameter.data = parameter.data.to(dtype)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                for told in ("_is_quantized", "quantization_config"):
                    vars(part.config).pop(told, None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
