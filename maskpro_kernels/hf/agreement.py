"""Whether models with the same weights write the same tokens, and whether rounding explains it where they do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from ..modules import CounterState, MaskedLinear
from ..packed import NMLinear
from ..unfuse import in_linear_form

# Units in the last place of the largest logit, by the dtype that a model computes in, see ``rounding_of``
UNITS = {torch.bfloat16: 4, torch.float16: 4, torch.float32: 64}


@dataclass(frozen=True)
class Agreement:
    """What greedy tokens of a model are, beside those of another.

    Attributes:
        model, other: their names; ``other`` is the first of those that hold the same weights, else the first of all.
        differs_in: the first weight or buffer that is not the same in both; None where all are.
        same_tokens: how many tokens of every row are the same, from the first on.
        new_tokens: how many were written.
        gap: by how much ``other``'s logit of its own token lies above that of the model's token, where they part. Of
            several rows the one that most exceeds its rounding. None where they do not part.
        rounding: how large a gap rounding explains there, see ``rounding_of``; None where they do not part.
    """

    model: str
    other: str
    differs_in: str | None
    same_tokens: int
    new_tokens: int
    gap: float | None = None
    rounding: float | None = None

    @property
    def same_weights(self) -> bool:
        return self.differs_in is None

    @property
    def within_rounding(self) -> bool:
        """Whether the tokens are the same, but for what rounding explains."""
        return self.gap is None or self.gap <= self.rounding

    @property
    def holds(self) -> bool:
        """False where the weights are the same and the tokens differ by more than rounding."""
        return not self.same_weights or self.within_rounding

    def __str__(self) -> str:
        whole = self.same_tokens == self.new_tokens
        told = (
            f"same {self.new_tokens} tokens" if whole else f"same tokens up to {self.same_tokens} of {self.new_tokens}"
        )
        if not self.same_weights:
            return f"{self.model}: other weights than {self.other}, first in {self.differs_in}; {told}"
        told = f"{self.model}: same weights as {self.other}; {told}"
        if whole:
            return told
        gap = f"{self.gap:.2g} apart, and rounding explains {self.rounding:.2g}"
        if self.within_rounding:
            return f"{told}; there two candidates lie within rounding ({gap})"
        return f"{told}; THE MODELS DIFFER: there the two candidates are {gap}"


class Written:
    """The greedy tokens of a model behind a prompt.

    Args:
        model: in eval mode.
        prompt: int64 [rows, tokens].
        new_tokens: how many it writes.

    Attributes:
        model: that has written.
        tokens: int64 [rows, new_tokens].
    """

    def __init__(self, model: PreTrainedModel, prompt: Tensor, new_tokens: int):
        self.model, self._prompt = model, prompt
        self.tokens = greedy(model, prompt, new_tokens)

    def logits_at(self, places: Mapping[int, int]) -> dict[int, Tensor]:
        """float32 [vocabulary] from which the token at a place was taken, by row; places by row."""
        kept = _KeptLogits(places, self._prompt.shape[1])
        greedy(self.model, self._prompt, max(places.values()) + 1, logits_processor=[kept])
        return kept.found


def greedy(model: PreTrainedModel, prompt: Tensor, new_tokens: int, **how) -> Tensor:
    """int64 [rows, new_tokens]: what ``generate`` writes behind a prompt [rows, tokens], past all ends of texts.

    Args:
        model: within ``plain_generation``.
        how: more of what ``generate`` takes.

    Raises:
        ValueError: if the model has ended early.
    """
    mask = torch.ones_like(prompt)
    found = model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **how)
    found = found[:, prompt.shape[1] :]
    if found.shape[1] != new_tokens:
        raise ValueError(f"generate: expected {new_tokens} tokens, got {found.shape[1]} by {type(model).__name__}")
    return found


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Without what a checkpoint says of sampling, penalties and the ends of texts; the kind of its cache stays."""
    before = model.generation_config
    model.generation_config = GenerationConfig(cache_implementation=before.cache_implementation)
    try:
        yield
    finally:
        model.generation_config = before


class _KeptLogits(LogitsProcessor):
    """Keeps the logits of some rows at one place each, and changes none."""

    def __init__(self, places: Mapping[int, int], prompt_tokens: int):
        self._places = {row: prompt_tokens + place for row, place in places.items()}
        self.found: dict[int, Tensor] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, length in self._places.items():
            if input_ids.shape[1] == length:
                self.found[row] = scores[row].float().clone()
        return scores


def compare(names: tuple[str, str], differs_in: str | None, written: Tensor, other: Written) -> Agreement:
    """The agreement of a model with another one.

    Args:
        names: of the model, and of the other.
        differs_in: from ``first_difference``.
        written: int64 [rows, new_tokens] of the model.
        other: what the other one has written behind the same prompt.
    """
    new_tokens = written.shape[1]
    differ = written != other.tokens
    places = {row: int(differ[row].int().argmax()) for row in differ.any(1).nonzero().flatten().tolist()}
    if not places:
        return Agreement(*names, differs_in, new_tokens, new_tokens)
    found = []
    for row, logits in other.logits_at(places).items():
        own, others = (int(tokens[row, places[row]]) for tokens in (written, other.tokens))
        found.append((float((logits[others] - logits[own]).abs()), rounding_of(logits, other.model.dtype)))
    gap, rounding = max(found, key=_excess)
    return Agreement(*names, differs_in, min(places.values()), new_tokens, gap, rounding)


def _excess(found: tuple[float, float]) -> float:
    gap, rounding = found
    # what is no number is explained by no rounding
    return math.inf if math.isnan(gap) else gap - rounding


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
    """The name of the first weight or buffer that is not the same in two models on one device; None if all are.

    Weights of packed layers are unpacked, those of masked ones taken under their mask, a layer at a time. Modules that
    are taken apart in one of them alone are compared as layers. A zero is a zero, whatever its sign.
    """
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
    found: dict[str, Callable[[], Tensor]] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, CounterState):
            continue
        if isinstance(module, (NMLinear, MaskedLinear)):
            found[f"{prefix}weight"] = _weight_of(module)
            if module.bias is not None:
                found[f"{prefix}bias"] = _itself(module.bias)
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found |= {f"{prefix}{part}": _itself(tensor) for part, tensor in own}
    return found


def _weight_of(layer: NMLinear | MaskedLinear) -> Callable[[], Tensor]:
    return layer.packed.unpack if isinstance(layer, NMLinear) else layer.top_n_weight


def _itself(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor
