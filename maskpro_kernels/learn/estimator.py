"""The protocol of estimators: an estimator turns the losses of drawn masks into updates of the logits.

The trainer and the run folder know estimators by this protocol alone. A new one is a class that derives from
``Estimator``, and ``MaskTrainer`` takes its objects.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ..functional.checks import FLOAT32_MAX, LARGEST_GAP
from ..modules import MaskedLinear
from .step import Entry, Step, StepResult


class Estimator(ABC):
    """How the logits move by the losses of drawn masks. An object serves one trainer.

    A class that lacks a part of the protocol raises TypeError as it is defined.

    Attributes:
        name: of its runs; one that is resumed has the same.
        needs_gradients: whether steps run backward. Logits then require gradients, and blocks whose activations are
            checkpointed compute them anew. Of several draws, each backward has to come within its own ``Step.drawing``:
            behind it torch refuses the backward. Else steps run in inference mode.
        needs_flips: whether it learns from masks alone that a draw has changed. A gap that no draw crosses is refused.
        needs_initial_losses: whether steps ask for the loss under the initial masks; it is computed before the first.
        journaled: whether the update of a step follows from its entry in the journal. Every step then gives one to
            ``Step.begin_update``. Where a run goes on, the steps behind the last snapshot are rebuilt by ``recall``;
            without a journal they are taken again.
        draws: masks drawn in a step.
        steps: how many steps there may be; None: any number.
        taken: whether a trainer has it.
    """

    name: ClassVar[str]
    needs_gradients: ClassVar[bool] = False
    needs_flips: ClassVar[bool] = False
    journaled: ClassVar[bool] = False
    needs_initial_losses: bool = False
    draws: int = 1
    steps: int | None = None
    taken: bool = False

    def __init_subclass__(cls, **arguments) -> None:
        super().__init_subclass__(**arguments)
        if not hasattr(cls, "name"):
            raise TypeError(f"{cls.__name__}: expected a name, got none")
        if cls.journaled and cls.recall is Estimator.recall:
            raise TypeError(f"{cls.__name__}: expected a method recall, since its runs have a journal, got none")
        if cls.journaled and cls.tensors is not Estimator.tensors:
            raise TypeError(
                f"{cls.__name__}: expected no tensors of its own, since a journal rebuilds none but the logits, got a "
                "method tensors"
            )

    def begin(self, layers: Mapping[str, MaskedLinear]) -> None:  # noqa: B027
        """Prepare for the layers of a model, by name: once before the first step, and anew where resuming failed."""

    @abstractmethod
    def step(self, step: Step) -> StepResult:
        """Make the forwards of a step and move the logits, the same way on all ranks.

        It calls ``step.begin_update`` right before the first logit moves. What it raises before that leaves logits and
        state as they were.
        """

    @property
    def max_logit_travel(self) -> float:
        """The widest gap between a kept and a dropped logit across which its steps, all together, change a mask."""
        return LARGEST_GAP if self.needs_flips else math.inf

    @abstractmethod
    def settings(self) -> dict:
        """The settings of its runs, as JSON gives them back. A run goes on with the same ones alone."""

    def state(self) -> dict:
        """The numbers that steps have left, as JSON gives them back."""
        return {}

    def load_state(self, state: Mapping) -> None:  # noqa: B027
        """Go on with the ``state`` of another process, whose ``tensors`` are there by then."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that steps change beside the logits, by name. Snapshots hold them.

        Where a run goes on, they get their values back in place. They have to be there after ``begin``, of the shapes
        and dtypes that they keep. An estimator with a journal has none: it goes on by logits and ``state`` alone.
        """
        return {}

    def recall(self, entry: Entry) -> StepResult:
        """The result of a step, by its entry in the journal; moves the ``state`` as the step did, and no logits."""
        raise NotImplementedError


def check_float(name: str, value: float, low: float, high: float = FLOAT32_MAX, strict: bool = False) -> None:
    """Raise TypeError or ValueError unless ``value`` is a number in [low, high], or with ``strict`` above ``low``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__} {value!r}")
    if not low <= value <= high or strict and value == low:
        least, most = "above" if strict else "of at least", f" and at most {high:g}" if high < FLOAT32_MAX else ""
        raise ValueError(f"{name}: expected a float {least} {low:g}{most}, got {value}")


def check_whole(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise TypeError or ValueError unless ``value`` is an int of at least ``low``, and at most ``high`` if given."""
    expected = f"of at least {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int {expected}, got {type(value).__name__} {value!r}")
    if value < low or high is not None and value > high:
        raise ValueError(f"{name}: expected an int {expected}, got {value}")
