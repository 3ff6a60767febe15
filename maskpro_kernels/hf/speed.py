"""How fast models read a prompt and write behind it, side by side, and whether they write the same."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..functional.checks import describe
from ..modules import MaskedLinear, evaluating
from ..packed import NMLinear
from .agreement import Agreement, Written, compare, first_difference, greedy, plain_generation

# Rounds that are not counted: caches fill, clocks rise. Kernels are compiled before, while outputs are compared
WARM_UP = 1


@dataclass(frozen=True)
class Spread:
    """Of what was measured in several rounds: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class ModelSpeed:
    """What was measured of one model, a figure each round.

    Attributes:
        name: of the model.
        stored: how its layers are stored, see ``stored_as``.
        weight_bytes: that its parameters and buffers take.
        prefill_seconds: of a forward over the prompt.
        step_seconds: between two tokens of ``generate``, that is of a new token of each row.
        device_bytes: the most that torch has allocated for the model on a GPU, weights included. None on a CPU, where
            models in one process cannot be told apart: see ``peak_memory``.
    """

    name: str
    stored: str
    weight_bytes: int
    prefill_seconds: Sequence[float]
    step_seconds: Sequence[float]
    device_bytes: int | None

    @property
    def step_milliseconds(self) -> Spread:
        """Between two tokens."""
        return Spread.of([1000 * seconds for seconds in self.step_seconds])


@dataclass(frozen=True)
class SpeedReport:
    """Models measured side by side.

    Attributes:
        batch_size, prompt_tokens, new_tokens: rows, tokens of each row's prompt, tokens written behind each.
        models: in the order given.
        agreements: of each model but the first.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    models: Sequence[ModelSpeed]
    agreements: Sequence[Agreement]

    def prefill_rate(self, model: ModelSpeed) -> Spread:
        """Tokens of the prompts read a second."""
        return Spread.of([self.batch_size * self.prompt_tokens / seconds for seconds in model.prefill_seconds])

    def decode_rate(self, model: ModelSpeed) -> Spread:
        """Tokens written a second, all rows together."""
        return Spread.of([self.batch_size / seconds for seconds in model.step_seconds])

    @property
    def agree(self) -> bool:
        """Whether no two models with the same weights write other tokens than rounding explains."""
        return all(agreement.holds for agreement in self.agreements)


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    prompt: Tensor,
    new_tokens: int = 128,
    rounds: int = 5,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> SpeedReport:
    """Compare what models write behind a prompt, then time how fast they read it and write.

    Models take turns: each round measures all of them, another one first each time. A round is one forward over the
    prompt, with the last logits alone where the model offers that, and one greedy ``generate``, whose tokens are timed
    as they come. What ends a text does not end it here.

    Args:
        models: of transformers, by name, all on one device.
        prompt: int64 [rows, tokens], on that device.
        new_tokens: that are written behind each row, at least 2: the first one comes of the prompt.
        rounds: that are counted, at least 1.
        progress: called with the rounds that are done, and all of them; those that warm up count here.

    Raises:
        TypeError: if a model is none of transformers, or the prompt is no tensor of integers.
        ValueError: if there is no model; one cannot generate, is elsewhere than the prompt or has another vocabulary
            than the first; the prompt is empty or holds tokens that are none; or a number is too small.
    """
    _check(models, prompt, new_tokens, rounds)
    pairs = _pairs(models)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for model in models.values():
            stack.enter_context(evaluating(model))
            stack.enter_context(plain_generation(model))
        written = {name: Written(model, prompt, new_tokens) for name, model in models.items()}
        agreements = [
            compare((name, other), differs_in, written[name].tokens, written[other])
            for name, other, differs_in in pairs
        ]
        timers = {name: _Timer(model, prompt, new_tokens) for name, model in models.items()}
        order = list(timers.values())
        progress(0, WARM_UP + rounds)
        for done in range(WARM_UP + rounds):
            first = done % len(order)
            for timer in (*order[first:], *order[:first]):
                timer.measure(counted=done >= WARM_UP)
            progress(done + 1, WARM_UP + rounds)
    measured = [timer.speed(name) for name, timer in timers.items()]
    return SpeedReport(*prompt.shape, new_tokens, measured, agreements)


def _check(models: Mapping[str, PreTrainedModel], prompt: Tensor, new_tokens: int, rounds: int) -> None:
    if not models:
        raise ValueError("models: expected at least one, got none")
    if not isinstance(prompt, Tensor) or prompt.dtype != torch.int64:
        raise TypeError(f"prompt: expected an int64 tensor, got {describe(prompt)}")
    if prompt.dim() != 2 or not prompt.numel():
        raise ValueError(f"prompt: expected [rows, tokens], one of each at least, got {describe(prompt)}")
    for name, value, least in (("new_tokens", new_tokens, 2), ("rounds", rounds, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    vocabulary = None
    for name, model in models.items():
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"models: expected models of transformers, got {type(model).__name__} as {name!r}")
        if not model.can_generate():
            raise ValueError(
                f"models: expected models that generate, got {type(model).__name__} as {name!r}, which does not"
            )
        embeddings = model.get_input_embeddings()
        if embeddings.weight.device != prompt.device:
            raise ValueError(
                f"models: expected all on the prompt's {prompt.device}, got {name!r} on {embeddings.weight.device}"
            )
        vocabulary = vocabulary or embeddings.num_embeddings
        if embeddings.num_embeddings != vocabulary:
            raise ValueError(
                f"models: expected one vocabulary, got {vocabulary} tokens in {next(iter(models))!r} and "
                f"{embeddings.num_embeddings} in {name!r}"
            )
    if not 0 <= int(prompt.min()) <= int(prompt.max()) < vocabulary:
        ends = f"{int(prompt.min())} to {int(prompt.max())}"
        raise ValueError(f"prompt: expected tokens below {vocabulary}, the vocabulary, got {ends}")


def _pairs(models: Mapping[str, PreTrainedModel]) -> list[tuple[str, str, str | None]]:
    """Each model but the first, with the first one of the same weights, else with the first, and where they differ."""
    found, first = [], next(iter(models))
    # those that no earlier one has the weights of
    distinct = [first]
    for name, model in models.items():
        if name == first:
            continue
        differs_in = {}
        for other in distinct:
            differs_in[other] = first_difference(model, models[other])
            if differs_in[other] is None:
                break
        else:
            other = first
            distinct.append(name)
        found.append((name, other, differs_in[other]))
    return found


def stored_as(model: nn.Module) -> str:
    """How the linear layers of a model are stored: "dense", or such as "packed 2:4", "packed 2:4 int8"."""
    kinds = set()
    for module in model.modules():
        if isinstance(module, NMLinear):
            kinds.add(f"packed {module.pattern}" + ("" if module.scales is None else " int8"))
        elif isinstance(module, MaskedLinear):
            kinds.add(f"masked {module.pattern}")
    return ", ".join(sorted(kinds)) or "dense"


class _Timer:
    """Times one model."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor, new_tokens: int):
        self._model, self._prompt, self._new_tokens = model, prompt, new_tokens
        tensors = chain(model.parameters(), model.buffers())
        # each storage once
        self._weight_bytes = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
        self._prefill_seconds: list[float] = []
        self._step_seconds: list[float] = []
        self._device_bytes: int | None = None

    def measure(self, counted: bool) -> None:
        """A round."""
        with self._memory():
            prefill, step = self._prefill(), self._step()
        if counted:
            self._prefill_seconds.append(prefill)
            self._step_seconds.append(step)

    def speed(self, name: str) -> ModelSpeed:
        seconds = self._prefill_seconds, self._step_seconds
        return ModelSpeed(name, stored_as(self._model), self._weight_bytes, *seconds, self._device_bytes)

    def _prefill(self) -> float:
        _wait(self._prompt.device)
        began = time.perf_counter()
        prefill(self._model, self._prompt)
        _wait(self._prompt.device)
        return time.perf_counter() - began

    def _step(self) -> float:
        arrivals = _Arrivals()
        greedy(self._model, self._prompt, self._new_tokens, streamer=arrivals)
        # the prompt comes first, and then the first token, which is that of the prefill
        _, first, *_, last = arrivals.times
        return (last - first) / (self._new_tokens - 1)

    @contextmanager
    def _memory(self) -> Iterator[None]:
        device = self._prompt.device
        if device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        own = torch.cuda.max_memory_allocated(device) - before + self._weight_bytes
        self._device_bytes = max(own, self._device_bytes or 0)


def prefill(model: PreTrainedModel, prompt: Tensor) -> None:
    """A forward over a prompt [rows, tokens] as ``generate`` makes it: with a cache, and the last logits alone."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    model(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **last)


class _Arrivals(BaseStreamer):
    """When ``generate`` had the prompt, and each token, on the host."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
