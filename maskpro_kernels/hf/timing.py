"""Compare models: the speed of prefill and decoding, and whether they generate the same tokens."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..modules import CounterState, MaskedLinear, evaluating
from ..packed import INT4, INT8, KEEP, REPLACING, Int8Linear, NMLinear
from ..unfuse import in_linear_form

# Rounds that do not count: caches fill, clocks rise
WARM_UP = 1
# Units in the last place of the largest logit, by the model's dtype, see ``rounding_of``
UNITS = {torch.bfloat16: 4, torch.float16: 4, torch.float32: 64}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the measurements of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Agreement:
    """Comparison of the greedy tokens of two models.

    Attributes:
        model, other: their names; ``other`` is the first model with the same weights, else these rounded, else of all.
        differs_in: the first weight or buffer in which they differ; None if there is none.
        same_tokens: number of leading tokens that are equal in all rows.
        new_tokens: number of generated tokens.
        gap: at the first difference, ``other``'s logit of its own token less its logit of the model's token; of several
            rows the gap that most exceeds its rounding. None if all tokens are equal.
        rounding: the largest gap that rounding explains there, see ``rounding_of``; None if all tokens are equal.
        is_rounded: true if all that differs are values that one of the two stores as integers.
    """

    model: str
    other: str
    differs_in: str | None
    same_tokens: int
    new_tokens: int
    gap: float | None = None
    rounding: float | None = None
    is_rounded: bool = False

    @property
    def holds(self) -> bool:
        """False if the weights are equal and the tokens differ by more than rounding."""
        return self.differs_in is not None or self.gap is None or self.gap <= self.rounding

    def __str__(self) -> str:
        if self.gap is None:
            tokens = f"same {self.new_tokens} tokens"
        else:
            tokens = f"same tokens up to {self.same_tokens} of {self.new_tokens}"
        if self.differs_in is not None:
            weights = "weights rounded to integers, else those of" if self.is_rounded else "other weights than"
            return f"{self.model}: {weights} {self.other}, first in {self.differs_in}; {tokens}"
        equality = f"{self.model}: same weights as {self.other}; {tokens}"
        if self.gap is None:
            return equality
        gap = f"{self.gap:.2g} apart; rounding explains {self.rounding:.2g}"
        if self.holds:
            return f"{equality}; then two candidates are equal within rounding ({gap})"
        return f"{equality}; THE MODELS DIFFER: then two candidates are {gap}"


@dataclass(frozen=True)
class ModelSpeed:
    """Measurements of one model, one for each round.

    Attributes:
        name: of the model.
        stored: storage of its linear layers: "dense", "packed 2:4 int8", "masked 2:4" and the like.
        weight_bytes: bytes of its parameters and buffers.
        prefill_seconds: seconds of a forward over the prompt.
        step_seconds: seconds between two tokens of ``generate``, for one new token of each row.
        device_bytes: largest memory that torch has allocated for the model on a GPU, with its weights. None on a CPU.
    """

    name: str
    stored: str
    weight_bytes: int
    prefill_seconds: Sequence[float]
    step_seconds: Sequence[float]
    device_bytes: int | None


@dataclass(frozen=True)
class SpeedReport:
    """Result of ``measure_speed``.

    Attributes:
        batch_size, prompt_tokens, new_tokens: rows, tokens of each row's prompt, new tokens of each row.
        models: in the order given.
        agreements: for each model but the first.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    models: Sequence[ModelSpeed]
    agreements: Sequence[Agreement]

    def prefill_rate(self, model: ModelSpeed) -> Spread:
        """Tokens of the prompts a second."""
        return Spread.from_values([self.batch_size * self.prompt_tokens / seconds for seconds in model.prefill_seconds])

    def decode_rate(self, model: ModelSpeed) -> Spread:
        """New tokens a second, all rows together."""
        return Spread.from_values([self.batch_size / seconds for seconds in model.step_seconds])

    @property
    def agree(self) -> bool:
        """False if two models with equal weights differ in their tokens by more than rounding."""
        return all(agreement.holds for agreement in self.agreements)


@torch.inference_mode()
def measure_speed(models: Mapping[str, PreTrainedModel], prompt: Tensor, new_tokens: int = 128,
                  rounds: int = 5,
                  progress: Callable[[int, int], object] = lambda done, total: None) -> SpeedReport:  # fmt: skip
    """Compare the greedy continuations of a prompt by several models, then time prefill and decoding.

    Each round measures all models, each time in another order. A round is one forward over the prompt, for the last
    logits alone if the model supports that, and one greedy ``generate``, which times each token. A token that ends a
    text does not stop it.

    Args:
        models: models of transformers, by name, all on one device.
        prompt: int64 [rows, tokens], on that device.
        new_tokens: new tokens of each row, at least 2: prefill gives the first.
        rounds: rounds to count, at least 1.
        progress: called with (counted rounds done, rounds).

    Raises:
        ValueError: if there is no model; a model cannot generate, is on another device than the prompt or has another
            vocabulary than the first; the prompt is not as above, or has ids outside the vocabulary; or a number is too
            small.
    """
    _check(models, prompt, new_tokens, rounds)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
            stack.enter_context(plain_generation(model))
        continuations = {name: greedy(model, prompt, new_tokens) for name, model in models.items()}
        agreements = []
        # models whose weights no earlier model has
        distinct = [next(iter(models))]
        for name, model in list(models.items())[1:]:
            equal = [x for x in distinct if first_difference(model, models[x]) is None]
            equal_if_rounded = equal or [
                x for x in distinct if first_difference(model, models[x], rounded=True) is None
            ]
            other = (equal_if_rounded or distinct)[0]
            differs_in = first_difference(model, models[other])
            tokens = continuations[name]
            agreement = _agreement((name, other), differs_in, models[other], prompt, tokens, continuations[other])
            agreements.append(replace(agreement, is_rounded=bool(equal_if_rounded) and not equal))
            if not equal:
                distinct.append(name)
        timers = [_Timer(name, model, prompt, new_tokens) for name, model in models.items()]
        progress(0, rounds)
        for i in range(WARM_UP + rounds):
            first = i % len(timers)
            for timer in (*timers[first:], *timers[:first]):
                timer.measure(counted=i >= WARM_UP)
            progress(max(i + 1 - WARM_UP, 0), rounds)
    return SpeedReport(*prompt.shape, new_tokens, [timer.speed() for timer in timers], agreements)


def _check(models: Mapping[str, PreTrainedModel], prompt: Tensor, new_tokens: int, rounds: int) -> None:
    if not models:
        raise ValueError("models: expected at least one, got none")
    if prompt.dtype != torch.int64 or prompt.dim() != 2 or not prompt.numel():
        raise ValueError(f"prompt: expected int64 [rows, tokens], got {prompt.dtype} {list(prompt.shape)}")
    for name, value, minimum in (("new_tokens", new_tokens, 2), ("rounds", rounds, 1)):
        if value < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    vocabulary = next(iter(models.values())).get_input_embeddings().num_embeddings
    for name, model in models.items():
        embeddings = model.get_input_embeddings()
        if not model.can_generate():
            raise ValueError(f"models: expected models that generate, got {type(model).__name__} as {name!r}")
        if embeddings.weight.device != prompt.device:
            raise ValueError(
                f"models: expected all on the prompt's {prompt.device}, got {name!r} on {embeddings.weight.device}"
            )
        if embeddings.num_embeddings != vocabulary:
            raise ValueError(
                f"models: expected one vocabulary, got {vocabulary} tokens in {next(iter(models))!r} and "
                f"{embeddings.num_embeddings} in {name!r}"
            )
    low = int(prompt.min())
    high = int(prompt.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"prompt: expected tokens below {vocabulary}, the vocabulary, got {low} to {high}")


def greedy(model: PreTrainedModel, prompt: Tensor, new_tokens: int, **options) -> Tensor:
    """Greedy continuation of a prompt, int64 [rows, new_tokens]; call it within ``plain_generation``."""
    mask = torch.ones_like(prompt)
    tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **options)
    return tokens[:, prompt.shape[1] :]


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Ignore a checkpoint's settings of sampling, penalties and ends of texts, but keep its kind of cache."""
    config = model.generation_config
    model.generation_config = GenerationConfig(cache_implementation=config.cache_implementation)
    try:
        yield
    finally:
        model.generation_config = config


def _agreement(names: tuple[str, str], differs_in: str | None, other_model: PreTrainedModel,
               prompt: Tensor, tokens: Tensor, other_tokens: Tensor) -> Agreement:  # fmt: skip
    differ = tokens != other_tokens
    new_tokens = tokens.shape[1]
    if not differ.any():
        return Agreement(*names, differs_in, new_tokens, new_tokens)
    positions = []
    gaps = []
    for row in differ.any(1).nonzero().flatten().tolist():
        position = int(differ[row].int().argmax())
        context = torch.cat([prompt[row], other_tokens[row, :position]])
        logits = other_model(context[None]).logits[0, -1].float()
        gap = float((logits[other_tokens[row, position]] - logits[tokens[row, position]]).abs())
        positions.append(position)
        gaps.append((gap, rounding_of(logits, other_model.dtype)))
    # rounding does not explain NaN
    gap, rounding = max(gaps, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] - pair[1])
    return Agreement(*names, differs_in, min(positions), new_tokens, gap, rounding)


def rounding_of(logits: Tensor, dtype: torch.dtype) -> float:
    """Largest difference of two logits at one position whose order rounding alone may change.

    Two methods for the same products give four logits, two each. In 16 bits each is rounded by up to half a unit in
    the last place: two units together. The layers before round too, for which we allow as much again: 4 units. A
    float32 product rounds at each of hundreds of additions: 64 units. The unit is that of the position's largest logit,
    since errors grow with the vectors that are multiplied, not with their product.

    Args:
        logits: [vocabulary].
        dtype: dtype of the model.
    """
    largest = float(logits[logits.isfinite()].abs().max()) if logits.isfinite().any() else 0.0
    if largest == 0:
        return 0.0
    return UNITS.get(dtype, UNITS[torch.float32]) * torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest))


def first_difference(model: nn.Module, other: nn.Module, rounded: bool = False) -> str | None:
    """Name of the first weight, unpacked or masked, or buffer in which two models differ; None if there is none."""
    with torch.no_grad(), in_linear_form(model), in_linear_form(other):
        tensors = _tensors(model)
        other_tensors = _tensors(other)
        modules = (*model.named_modules(), *other.named_modules()) if rounded else ()
        # integers are near where the largest scale of their row sets them apart; int4 clips by up to 6 of its scales
        tolerances = {
            f"{name}.weight": x.scales.abs() * (6 if getattr(x, "kind", INT8) == INT4 else 1)
            for name, x in modules
            if isinstance(x, Int8Linear) or (isinstance(x, NMLinear) and x.kind != KEEP)
        }
        for name in [*tensors, *(name for name in other_tensors if name not in tensors)]:
            if name not in tensors or name not in other_tensors:
                return name
            first = tensors[name]()
            second = other_tensors[name]()
            if name in tolerances and first.shape == second.shape:
                tolerance = tolerances[name].float().amax(1, keepdim=True)
                second = torch.where((first.float() - second.float()).abs() <= tolerance, first, second)
            if first.dtype != second.dtype or not torch.equal(first, second):
                return name
    return None


def _tensors(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Functions that return each weight and buffer of a model, by name."""
    tensors = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, CounterState):
            continue
        direct = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if isinstance(module, REPLACING):
            direct = {} if module.bias is None else {"bias": module.bias}
            masked = isinstance(module, MaskedLinear)
            tensors[f"{prefix}weight"] = module.top_n_weight if masked else partial(getattr, module, "weight")
        tensors |= {f"{prefix}{key}": lambda tensor=tensor: tensor for key, tensor in direct.items()}
    return tensors


def stored_as(model: nn.Module) -> str:
    """Storage of a model's linear layers: "dense", "packed 2:4", "dense int8, packed 2:4 int4" and the like."""
    masked = {f"masked {layer.pattern}" for layer in model.modules() if isinstance(layer, MaskedLinear)}
    packed = [layer for layer in model.modules() if isinstance(layer, NMLinear)]
    kinds = masked | {f"packed {x.pattern}" + ("" if x.kind == KEEP else f" {x.kind}") for x in packed}
    if any(isinstance(layer, Int8Linear) for layer in model.modules()):
        kinds.add("dense int8")
    return ", ".join(sorted(kinds)) or "dense"


class _Timer(BaseStreamer):
    """Timer of one model; as a streamer of ``generate`` it records the times of the prompt and of each token."""

    def __init__(self, name: str, model: PreTrainedModel, prompt: Tensor, new_tokens: int):
        self._name = name
        self._model = model
        self._prompt = prompt
        self._new_tokens = new_tokens
        tensors = (*model.parameters(), *model.buffers())
        # each storage once
        self._weight_bytes = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
        self._prefill_seconds = []
        self._step_seconds = []
        self._device_bytes = None
        self._times = []

    def measure(self, counted: bool) -> None:
        """Take a round."""
        device = self._prompt.device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            allocated = torch.cuda.memory_allocated(device)
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        # like ``generate``: with a cache, for the last logits alone
        options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self._model.forward).parameters else {}
        self._model(self._prompt, attention_mask=torch.ones_like(self._prompt), use_cache=True, **options)
        if on_gpu:
            torch.cuda.synchronize(device)
        prefill = time.perf_counter() - began
        self._times.clear()
        greedy(self._model, self._prompt, self._new_tokens, streamer=self)
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(device) - allocated + self._weight_bytes
            self._device_bytes = max(peak, self._device_bytes or 0)
        if counted:
            self._prefill_seconds.append(prefill)
            # first the prompt, then the first token, which prefill computed
            _, first, *_, end = self._times
            self._step_seconds.append((end - first) / (self._new_tokens - 1))

    def put(self, value: Tensor) -> None:
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: all tokens are timed by then."""

    def speed(self) -> ModelSpeed:
        seconds = self._prefill_seconds, self._step_seconds
        return ModelSpeed(self._name, stored_as(self._model), self._weight_bytes, *seconds, self._device_bytes)
