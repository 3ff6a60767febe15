"""Next-token logits of a transformers model, with a cache of keys and values that is never copied."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer


class _PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in tensors that have room for all of a window from the first token on."""

    def __init__(self, length: int):
        super().__init__()
        self._length = length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._held = [
                states.new_empty(*states.shape[:-2], self._length, states.shape[-1])
                for states in (key_states, value_states)
            ]
        first = self.get_seq_length()
        behind = first + key_states.shape[-2]
        for held, states in zip(self._held, (key_states, value_states), strict=True):
            held[..., first:behind, :] = states
        self.keys, self.values = (held[..., :behind, :] for held in self._held)
        return self.keys, self.values


def preallocated_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """An empty cache of keys and values that nothing is copied in as it fills.

    A layer of another kind than plain attention keeps the cache that transformers has for it.

    Args:
        model: that will fill it.
        length: tokens that it will hold at most.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [_PreallocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def next_logits(model: PreTrainedModel, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits [rows, vocabulary] of the token behind one more token of each row, [rows, 1], which the cache takes up."""
    # renamed within transformers 5
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(tokens, **{name: cache}, use_cache=True).logits[:, -1]
