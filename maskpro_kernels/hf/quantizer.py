"""What transformers asks of the quantizers that load checkpoints with masks and with packed weights."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer


class SparseQuantizer(HfQuantizer):
    """A quantizer whose layers are stored as they are, trained and compiled, each as a whole on one device."""

    # they are made by ``convert`` and ``finalize``, not from a dense checkpoint while it is loaded
    requires_calibration = True

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
