"""Next-token logits of a transformers model, with a cache of keys and values that is never copied."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer


class _PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, in tensors allocated for a whole window at the first token."""

    def __init__(self, length: int):
        super().__init__()
        self._length = length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [
                states.new_empty(*states.shape[:-2], self._length, states.shape[-1])
                for states in (key_states, value_states)
            ]
        first = self.get_seq_length()
        end = first + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., first:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values


def preallocated_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """Make an empty cache of keys and values that is never copied as it fills.

    Layers other than plain attention keep transformers' own cache.

    Args:
        model: the model that fills the cache.
        length: the most tokens in the cache.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [_PreallocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def next_logits(model: PreTrainedModel, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Add one token of each row, [rows, 1], to the cache; return logits [rows, vocabulary] of the next token."""
    # renamed within transformers 5
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(tokens, **{name: cache}, use_cache=True).logits[:, -1]
