"""The protocol of estimators: an estimator turns the losses of drawn masks into updates of the logits.

The trainer, the run folder and the command know estimators by this protocol alone. A new one is a class that derives
from ``Estimator``, in a file of its own; importing that file is all it takes. ``MaskTrainer`` takes its objects, and
`maskpro learn --estimator NAME` offers it with its ``options``: the command imports all files of this folder, and what
other packages offer by an entry point in the group ``maskpro_kernels.estimators``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from torch import Tensor

from ..functional.checks import FLOAT32_MAX, LARGEST_GAP
from ..modules import MaskedLinear
from .step import Entry, Step, StepResult

# What `maskpro learn` holds of every run beside the options of its estimator
RUN_OPTIONS = frozenset(
    "accumulate bars batch_size calibration_batches config data device device_map device_memory dtype estimator "
    "eval_every eval_length eval_windows flip_rate gap given gpu gradient_checkpointing help init init_batches "
    "logits_device logits_dtype loss loss_temperature mesh model other_data output pattern quiet refit "
    "report_to resume run samples seed seq_len steps stream text_column trust_remote_code".split()
)


class Option(NamedTuple):
    """An option of `maskpro learn` that an estimator takes as the keyword of that name.

    Attributes:
        name: of the keyword, none of ``RUN_OPTIONS``. The option has hyphens for underscores.
        kind: int, float, or any function that makes a value of text or raises ValueError. JSON can hold the value.
            Estimators with an option of the same name have it of the same kind.
        default: where the command line says nothing; None: without the option there is no value.
        help: for --help, without the default.
        metavar: what stands for the value in --help.
    """

    name: str
    kind: Callable[[str], object]
    default: object
    help: str
    metavar: str


class RunDefaults(NamedTuple):
    """What suits an estimator where the command line says nothing: defaults of options that all runs have.

    Attributes:
        init: the initial mask.
        gap: initial logit of a kept weight over a dropped one.
        calibration_batches: distinct batches to cycle through, at most; None: all of the text.
        steps: training steps.
    """

    init: str = "reconstruction"
    gap: float = 15.0
    calibration_batches: int | None = None
    steps: int = 200


class Estimator(ABC):
    """How the logits move by the losses of drawn masks. An object serves one trainer.

    A class with a ``name`` of its own is registered as it is defined. ValueError or TypeError tells what it lacks, and
    it is not registered then.

    Attributes:
        name: on the command line.
        summary: how it learns, in a few words, for --help.
        options: of the command line; each is a keyword of the class.
        run_defaults: of the options that all runs have.
        needs_gradients: whether steps run backward. Logits then require gradients, and blocks whose activations are
            checkpointed compute them anew. Of several draws, each backward has to come within its own ``Step.drawing``:
            behind it torch refuses the backward. Else steps run in inference mode.
        needs_flips: whether it learns from masks alone that a draw has changed. A gap that no draw crosses is refused.
        needs_initial_losses: whether steps ask for the loss under the initial masks; it is computed before the first.
        journaled: whether the update of a step follows from its record in the journal. Every step then gives one to
            ``Step.begin_update``. Where a run goes on, the steps behind the last snapshot are rebuilt by ``recall``;
            without a journal they are taken again.
        draws: masks drawn in a step.
        steps: how many steps there may be; None: any number.
        taken: whether a trainer has it.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    options: ClassVar[tuple[Option, ...]] = ()
    run_defaults: ClassVar[RunDefaults] = RunDefaults()
    needs_gradients: ClassVar[bool] = False
    needs_flips: ClassVar[bool] = False
    journaled: ClassVar[bool] = False
    needs_initial_losses: bool = False
    draws: int = 1
    steps: int | None = None
    taken: bool = False

    def __init_subclass__(cls, **arguments) -> None:
        super().__init_subclass__(**arguments)
        if cls.journaled and cls.recall is Estimator.recall:
            raise TypeError(f"{cls.__name__}: expected a method recall, since its runs have a journal, got none")
        if cls.journaled and cls.tensors is not Estimator.tensors:
            raise TypeError(
                f"{cls.__name__}: expected no tensors of its own, since a journal rebuilds none but the logits, got a "
                "method tensors"
            )
        if "name" not in vars(cls):
            return
        other = _registered.get(cls.name)
        # a cell of a notebook that runs again defines the same class anew
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"name: expected one that no other estimator has, got {cls.name!r}, which is {other.__module__}."
                f"{other.__qualname__}"
            )
        _check_options(cls)
        _registered[cls.name] = cls

    @classmethod
    def complete(cls, given: Mapping[str, object]) -> dict[str, object]:
        """The options of a run: those given on the command line, and the defaults of the others.

        Raises:
            ValueError: if one does not go with another.
        """
        return {option.name: given.get(option.name, option.default) for option in cls.options}

    @classmethod
    def for_run(cls, steps: int, options: Mapping[str, object]) -> Estimator:
        """One for a run of that many steps, with options as ``complete`` gives them.

        Raises:
            TypeError, ValueError: an option is out of its range.
        """
        return cls(**options)

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
        """What tells its runs from others, as JSON gives it back. A run goes on with the same settings alone."""

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
        """What a step found, by its record in the journal; moves the ``state`` as the step did, and no logits."""
        raise NotImplementedError


_registered: dict[str, type[Estimator]] = {}


def _check_options(cls: type[Estimator]) -> None:
    """Raise ValueError unless the options of an estimator can stand beside all others of the command."""
    names = [option.name for option in cls.options]
    for option in cls.options:
        told = f"options: expected {{}} in {cls.name}, got {option.name!r}"
        if not option.name.isidentifier() or option.name.startswith("_") or names.count(option.name) > 1:
            raise ValueError(told.format("names of keywords, each once,"))
        if option.name in RUN_OPTIONS:
            raise ValueError(told.format("other names than those of options that all runs have"))
        for other in _registered.values():
            alike = (held for held in other.options if held.name == option.name)
            if other.name != cls.name and any(held.kind is not option.kind for held in alike):
                raise ValueError(f"{told.format(f'the kind that {other.name} gives an option')} of another kind")


def estimators() -> Mapping[str, type[Estimator]]:
    """The classes of estimators by their names, in the order in which they were defined."""
    return MappingProxyType(_registered)


def check_float(name: str, value: float, low: float, high: float = FLOAT32_MAX, strict: bool = False) -> None:
    """Raise unless ``value`` lies in [low, high], or with ``strict`` above ``low``.

    Raises:
        TypeError: if it is no number.
        ValueError: if it lies elsewhere.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__} {value!r}")
    if not low <= value <= high or strict and value == low:
        least, most = "above" if strict else "of at least", f" and at most {high:g}" if high < FLOAT32_MAX else ""
        raise ValueError(f"{name}: expected a float {least} {low:g}{most}, got {value}")


def check_whole(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise unless ``value`` is an int of at least ``low``, and at most ``high`` where one is given.

    Raises:
        TypeError: if it is no int.
        ValueError: if it lies elsewhere.
    """
    expected = f"of at least {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int {expected}, got {type(value).__name__} {value!r}")
    if value < low or high is not None and value > high:
        raise ValueError(f"{name}: expected an int {expected}, got {value}")
