"""How fast models read a prompt and write behind it, side by side, and how far they write the same tokens."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..modules import CounterState, MaskedLinear, evaluating
from ..packed import NMLinear
from ..unfuse import in_linear_form

# Rounds that are not counted: caches fill, clocks rise
WARM_UP = 1
# Units in the last place of the largest logit, by the dtype that a model computes in, see ``rounding_of``
UNITS = {torch.bfloat16: 4, torch.float16: 4, torch.float32: 64}


@dataclass(frozen=True)
class Spread:
    """The median of what was measured in several rounds, and the quartiles around it."""

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
class Agreement:
    """The greedy tokens of a model beside those of another one.

    Attributes:
        model, other: their names; ``other`` is the first model that holds the same weights, else the first of all.
        differs_in: the first weight or buffer that is not the same in both; None where all are.
        same_tokens: how many tokens of every row are the same, from the first on.
        new_tokens: how many were written.
        gap: by how much ``other``'s logit of its own token lies above that of the model's token, where they first
            differ; of several rows the one that most exceeds its rounding. None where all tokens are the same.
        rounding: how large a gap rounding explains there, see ``rounding_of``; None where all tokens are the same.
    """

    model: str
    other: str
    differs_in: str | None
    same_tokens: int
    new_tokens: int
    gap: float | None = None
    rounding: float | None = None

    @property
    def holds(self) -> bool:
        """False where the weights are the same and the tokens differ by more than rounding."""
        return self.differs_in is not None or self.gap is None or self.gap <= self.rounding

    def __str__(self) -> str:
        if self.gap is None:
            tokens = f"same {self.new_tokens} tokens"
        else:
            tokens = f"same tokens up to {self.same_tokens} of {self.new_tokens}"
        if self.differs_in is not None:
            return f"{self.model}: other weights than {self.other}, first in {self.differs_in}; {tokens}"
        line = f"{self.model}: same weights as {self.other}; {tokens}"
        if self.gap is None:
            return line
        gap = f"{self.gap:.2g} apart, and rounding explains {self.rounding:.2g}"
        if self.holds:
            return f"{line}; there two candidates lie within rounding ({gap})"
        return f"{line}; THE MODELS DIFFER: there the two candidates are {gap}"


@dataclass(frozen=True)
class ModelSpeed:
    """The figures of one model, one of each round.

    Attributes:
        name: of the model.
        stored: how its linear layers are stored: "dense", or such as "packed 2:4 int8" or "masked 2:4".
        weight_bytes: that its parameters and buffers take.
        prefill_seconds: of a forward over the prompt.
        step_seconds: between two tokens of ``generate``, that is of a new token of each row.
        device_bytes: the most that torch has allocated for the model on a GPU, weights included. None on a CPU.
    """

    name: str
    stored: str
    weight_bytes: int
    prefill_seconds: Sequence[float]
    step_seconds: Sequence[float]
    device_bytes: int | None


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
        """False where two models with the same weights write other tokens than rounding explains."""
        return all(agreement.holds for agreement in self.agreements)


@torch.inference_mode()
def measure_speed(models: Mapping[str, PreTrainedModel], prompt: Tensor, new_tokens: int = 128,
                  rounds: int = 5,
                  progress: Callable[[int, int], object] = lambda done, total: None) -> SpeedReport:  # fmt: skip
    """Compare what models write behind a prompt, then time how fast they read it and write.

    Models take turns: each round measures all of them, another one first each time. A round is one forward over the
    prompt, with the last logits alone where the model offers that, and one greedy ``generate``, whose tokens are timed
    as they come. The end of a text does not end it here.

    Args:
        models: of transformers, by name, all on one device.
        prompt: int64 [rows, tokens], on that device.
        new_tokens: that are written behind each row, at least 2: the first one comes of the prompt.
        rounds: that are counted, at least 1.
        progress: called with the rounds that are done, and all of them; those that warm up count here.

    Raises:
        ValueError: if there is no model; one cannot generate, is elsewhere than the prompt or has another vocabulary
            than the first; the prompt is no such tensor, or holds tokens that are none; or a number is too small.
    """
    _check(models, prompt, new_tokens, rounds)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
            stack.enter_context(plain_generation(model))
        written = {name: greedy(model, prompt, new_tokens) for name, model in models.items()}
        agreements = []
        # models that no earlier one has the weights of
        distinct = [next(iter(models))]
        for name, model in list(models.items())[1:]:
            differs_in = {other: first_difference(model, models[other]) for other in distinct}
            other = next((other for other in distinct if differs_in[other] is None), distinct[0])
            if differs_in[other] is not None:
                distinct.append(name)
            agreements.append(
                _agreement((name, other), differs_in[other], models[other], prompt, written[name], written[other])
            )
        timers = [_Timer(name, model, prompt, new_tokens) for name, model in models.items()]
        progress(0, WARM_UP + rounds)
        for done in range(WARM_UP + rounds):
            first = done % len(timers)
            for timer in (*timers[first:], *timers[:first]):
                timer.measure(counted=done >= WARM_UP)
            progress(done + 1, WARM_UP + rounds)
    return SpeedReport(*prompt.shape, new_tokens, [timer.speed() for timer in timers], agreements)


def _check(models: Mapping[str, PreTrainedModel], prompt: Tensor, new_tokens: int, rounds: int) -> None:
    if not models:
        raise ValueError("models: expected at least one, got none")
    if prompt.dtype != torch.int64 or prompt.dim() != 2 or not prompt.numel():
        raise ValueError(f"prompt: expected int64 [rows, tokens], got {prompt.dtype} {list(prompt.shape)}")
    for name, value, least in (("new_tokens", new_tokens, 2), ("rounds", rounds, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
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
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"prompt: expected tokens below {vocabulary}, the vocabulary, got {low} to {high}")


def greedy(model: PreTrainedModel, prompt: Tensor, new_tokens: int, **how) -> Tensor:
    """int64 [rows, new_tokens]: the tokens that ``generate`` writes, within ``plain_generation``, behind a prompt."""
    mask = torch.ones_like(prompt)
    tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **how)
    return tokens[:, prompt.shape[1] :]


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Leave out what a checkpoint says of sampling, penalties and the ends of texts; the kind of its cache stays."""
    before = model.generation_config
    model.generation_config = GenerationConfig(cache_implementation=before.cache_implementation)
    try:
        yield
    finally:
        model.generation_config = before


def _agreement(names: tuple[str, str], differs_in: str | None, other_model: PreTrainedModel,
               prompt: Tensor, written: Tensor, other: Tensor) -> Agreement:  # fmt: skip
    differ, new_tokens = written != other, written.shape[1]
    if not differ.any():
        return Agreement(*names, differs_in, new_tokens, new_tokens)
    places, gaps = [], []
    for row in differ.any(1).nonzero().flatten().tolist():
        place = int(differ[row].int().argmax())
        read = torch.cat([prompt[row], other[row, :place]])
        logits = other_model(read[None]).logits[0, -1].float()
        gap = float((logits[other[row, place]] - logits[written[row, place]]).abs())
        places.append(place)
        gaps.append((gap, rounding_of(logits, other_model.dtype)))
    # what is no number is explained by no rounding
    gap, rounding = max(gaps, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] - pair[1])
    return Agreement(*names, differs_in, min(places), new_tokens, gap, rounding)


def rounding_of(logits: Tensor, dtype: torch.dtype) -> float:
    """How far apart two logits of one position may lie for rounding alone to change which is the larger.

    Two ways to compute the same products give four logits, two of each way. In 16 bits each is rounded by up to half a
    unit in the last place, which makes two units; what the layers before hand on, rounded by other sums as well, is
    granted as much again: 4 units. A float32 product is rounded at each of the hundreds of its sums: 64 units. The unit
    is that of the largest logit of the position, since errors grow with the vectors multiplied, not with their product.

    Args:
        logits: [vocabulary].
        dtype: that the model computes in.
    """
    largest = float(logits[logits.isfinite()].abs().max()) if logits.isfinite().any() else 0.0
    if largest == 0:
        return 0.0
    return UNITS.get(dtype, UNITS[torch.float32]) * torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest))


def first_difference(model: nn.Module, other: nn.Module) -> str | None:
    """The name of the first weight, unpacked or under its mask, or buffer that differs between two models, if any."""
    with torch.no_grad(), in_linear_form(model), in_linear_form(other):
        own, others = _tensors(model), _tensors(other)
        for name in [*own, *(name for name in others if name not in own)]:
            if name not in own or name not in others:
                return name
            first, second = own[name](), others[name]()
            if first.dtype != second.dtype or not torch.equal(first, second):
                return name
    return None


def _tensors(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """How to get each weight and buffer of a model, by its name."""
    tensors = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, CounterState):
            continue
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if isinstance(module, (NMLinear, MaskedLinear)):
            own = {} if module.bias is None else {"bias": module.bias}
            tensors[f"{prefix}weight"] = module.packed.unpack if isinstance(module, NMLinear) else module.top_n_weight
        tensors |= {f"{prefix}{part}": lambda tensor=tensor: tensor for part, tensor in own.items()}
    return tensors


def stored_as(model: nn.Module) -> str:
    """How the linear layers of a model are stored: "dense", or such as "packed 2:4", "packed 2:4 int8"."""
    masked = {f"masked {layer.pattern}" for layer in model.modules() if isinstance(layer, MaskedLinear)}
    packed = [layer for layer in model.modules() if isinstance(layer, NMLinear)]
    kinds = masked | {f"packed {x.pattern}" + ("" if x.scales is None else " int8") for x in packed}
    return ", ".join(sorted(kinds)) or "dense"


class _Timer(BaseStreamer):
    """Times one model; as a streamer it takes the times at which ``generate`` had the prompt, and each token."""

    def __init__(self, name: str, model: PreTrainedModel, prompt: Tensor, new_tokens: int):
        self._name, self._model, self._prompt, self._new_tokens = name, model, prompt, new_tokens
        tensors = (*model.parameters(), *model.buffers())
        # each storage once
        self._weight_bytes = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
        self._prefill_seconds, self._step_seconds, self._device_bytes, self._times = [], [], None, []

    def measure(self, counted: bool) -> None:
        """Take a round."""
        device = self._prompt.device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        # as ``generate`` makes it: with a cache, and the last logits alone
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self._model.forward).parameters else {}
        self._model(self._prompt, attention_mask=torch.ones_like(self._prompt), use_cache=True, **last)
        if on_gpu:
            torch.cuda.synchronize(device)
        prefill = time.perf_counter() - began
        self._times.clear()
        greedy(self._model, self._prompt, self._new_tokens, streamer=self)
        if on_gpu:
            own = torch.cuda.max_memory_allocated(device) - before + self._weight_bytes
            self._device_bytes = max(own, self._device_bytes or 0)
        if counted:
            self._prefill_seconds.append(prefill)
            # the prompt comes first, and then the first token, which is that of the prefill
            _, first, *_, end = self._times
            self._step_seconds.append((end - first) / (self._new_tokens - 1))

    def put(self, value: Tensor) -> None:
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Hold nothing back."""

    def speed(self) -> ModelSpeed:
        seconds = self._prefill_seconds, self._step_seconds
        return ModelSpeed(self._name, stored_as(self._model), self._weight_bytes, *seconds, self._device_bytes)
