"""What transformers asks of the quantizers that load checkpoints with masks and with packed weights."""

from __future__ import annotations

from transformers.quantizers import HfQuantizer


class SparseQuantizer(HfQuantizer):
    """A quantizer whose layers are stored as they are, trained and compiled."""

    # they are made by ``convert`` and ``finalize``, not from a dense checkpoint while it is loaded
    requires_calibration = True

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
