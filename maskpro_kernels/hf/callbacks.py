"""Callbacks for the Trainer of transformers, and for those of other libraries that take them, such as TRL."""

from __future__ import annotations

import warnings

from transformers import TrainerCallback

from ..kept_zeros import KeptZeros
from ..pattern import NMPattern


class KeepMask(TrainerCallback):
    """Keeps the zeros of a finalized model while the Trainer fine-tunes it, see ``KeptZeros``.

    Args:
        pattern: "N:M" or NMPattern, which the model follows when training begins.

    Warns:
        UserWarning: at the beginning of training, if the weights of all these layers are frozen, as ``finalize`` leaves
            them.

    Raises:
        TypeError, ValueError: ``pattern`` is no pattern; at the beginning of training, no layer follows it.
    """

    def __init__(self, pattern: str | NMPattern):
        self.pattern = NMPattern(pattern)

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.kept = KeptZeros(model, self.pattern)
        if not any(layer.weight.requires_grad for layer in self.kept.layers.values()):
            warnings.warn(
                f"KeepMask: expected layers that train, got {len(self.kept.layers)} frozen ones; call requires_grad_() "
                "of the model before the Trainer is made",
                stacklevel=2,
            )

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.kept.restore()
