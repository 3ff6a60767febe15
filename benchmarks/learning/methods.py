"""The methods that ``compare.py`` sets beside each other, each with its settings and those that its search tries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from maskllm import MaskLLM
from proxsparse import ProxSparse
from relaxed import RelaxedMask
from relaxed_top_k import RelaxedTopK

from maskpro_kernels.learn.estimator import Estimator
from maskpro_kernels.learn.reinforce import Reinforce
from maskpro_kernels.learn.straight_through import StraightThrough
from maskpro_kernels.modules import MaskedLinear


class FlipRate(Reinforce):
    """REINFORCE whose first draws leave the initial mask in a share ``flips`` of the groups."""

    name = "reinforce, tuned"

    def __init__(self, *args, flips: float = 1e-2, **settings):
        super().__init__(*args, **settings)
        self.flips = flips

    def settings(self) -> dict:
        return super().settings() | {"flips": self.flips}


@dataclass(frozen=True)
class Learner:
    """A method that takes training steps from the initial mask.

    Attributes:
        kind: its estimator.
        options: its settings by default, those of the paper; of straight-through, and of relaxed top-k, this package's.
        search: other settings that are tried, each beside the defaults, and judged on validation text.
        gap: initial logit of a kept weight over a dropped one.
    """

    kind: type[Estimator]
    options: Mapping[str, float | None]
    search: tuple[Mapping[str, float | str], ...] = field(default=())
    gap: float = 15.0

    def candidates(self) -> list[dict[str, object]]:
        """All settings in full, the defaults first."""
        return [{**self.options, **changes} for changes in ({}, *self.search)]


OF_STRAIGHT_THROUGH = {"lr": 0.3, "max_update": 2.0, "train_weights": None}
OF_REINFORCE = {"lr": 50.0, "alpha": 0.99, "draws": 1}


LEARNERS = {
    learner.kind.name: learner
    for learner in (
        Learner(StraightThrough, OF_STRAIGHT_THROUGH, ({"lr": 0.1}, {"lr": 0.5}, {"lr": 0.8})),
        # the squared weights of SmolLM2 are 90 times as large as those of LLaMA-2-7B
        Learner(MaskLLM, MaskLLM.options, ({"lr": 1.5e-4}, {"lr": 2e-3}, {"lr": 1e-2}, {"regularization": 1e-7})),
        Learner(RelaxedTopK, RelaxedTopK.options, ({"lr": 0.03}, {"lr": 0.17}, {"lr": 0.3})),
        # for weights ten times as large as those of LLaMA-2-7B, which its settings are for: SmolLM2's have a root mean
        # square of 0.19
        Learner(
            ProxSparse,
            ProxSparse.options,
            ({"strength": 0.025}, {"strength": 0.025, "lr": 1e-3}, {"strength": 0.025, "lr": 3e-3}),
        ),
        Learner(Reinforce, OF_REINFORCE, ({"lr": 5.0}, {"lr": 500.0}, {"lr": 5000.0}), gap=10.0),
    )
}
# Masks in one pass, of the package; of SparseGPT the weights are shown as well
ONE_SHOT = ("wanda", "reconstruction", "sparsegpt")
METHODS = (*ONE_SHOT, *LEARNERS)


def state_bytes(estimator: Estimator, layers: Mapping[str, MaskedLinear]) -> int:
    """Bytes that a method keeps from step to step beside the dense weights.

    In the logits a ``RelaxedMask`` only writes its mask down, so that they do not count.
    """
    tensors = list(estimator.tensors().values())
    if not isinstance(estimator, RelaxedMask):
        tensors += [layer.logits for layer in layers.values()]
    return sum(tensor.nbytes for tensor in tensors)
