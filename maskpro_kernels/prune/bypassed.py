"""Layers whose weight other code reads past the module, where a mask would do nothing or half of what it should."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, islice

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..fsdp import resetting
from ..modules import evaluating
from .calibration import Call, as_call, check_calibration, run_call

READ_ELSEWHERE = "other code reads its weight past the module"


def read_elsewhere(model: nn.Module, layers: Mapping[str, nn.Module], call: Call | None) -> set[str]:
    """Names of the layers whose weight a forward pass takes into an operation outside of the layer's own forward.

    An embedding that shares the weight takes it in a forward of its own. What asks for a weight's dtype, shape or
    device does not read it.

    The model runs in eval mode and in training mode, since some take another way there. Random numbers, buffers and
    modes are then as before. What is compiled runs eagerly.

    Args:
        model: runs without gradients.
        layers: of the model, by name.
        call: how it is called. None: with transformers' dummy inputs; a model that has none, or fails on them, is not
            looked at.
    """
    if call is not None:
        return _read_elsewhere(model, layers, call)
    # errors of whatever kind: the inputs are transformers', not the user's
    with suppress(Exception):
        call = _dummy_call(model)
        if call is not None:
            return _read_elsewhere(model, layers, call)
    return set()


def first_call(calibration: Iterable | None) -> tuple[Call | None, Iterable | None]:
    """(how a model is called with the first batch, an iterable of all batches), also of batches that come only once.

    Raises:
        TypeError: if ``calibration`` is neither None nor an iterable of batches.
    """
    if calibration is None:
        return None, None
    check_calibration(calibration)
    batches = iter(calibration)
    first = list(islice(batches, 1))
    return (as_call(first[0]) if first else None), chain(first, batches)


def _read_elsewhere(model: nn.Module, layers: Mapping[str, nn.Module], call: Call) -> set[str]:
    reads = _Reads({id(layer.weight): name for name, layer in layers.items()}, layers)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {layer.weight.device for layer in layers.values() if layer.weight.is_cuda}
    with torch.no_grad(), evaluating(model), torch.random.fork_rng(list(devices)):
        try:
            with torch.compiler.set_stance("force_eager"), reads.watching(model), reads:
                with resetting(model):
                    run_call(model, call)
                model.train()
                # as a norm over a batch of one may, or a detector that asks for labels
                with suppress(Exception), resetting(model):
                    run_call(model, call)
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
    return reads.elsewhere


def _dummy_call(model: nn.Module) -> Call | None:
    inputs = getattr(model, "dummy_inputs", None)
    if not isinstance(inputs, Mapping) or not all(isinstance(value, Tensor) for value in inputs.values()):
        return None
    tokens, embeddings = inputs.get("input_ids"), model.get_input_embeddings()
    # on a GPU an index beyond the embedding would leave no usable device behind
    if tokens is not None and not (
        isinstance(embeddings, nn.Embedding) and int(tokens.max()) < embeddings.num_embeddings
    ):
        return None
    return (), {name: value.to(model.device) for name, value in inputs.items()}


class _Reads(TorchFunctionMode):
    """Which weights go into operations while no layer that owns them runs.

    Args:
        weights: the name of the layer by the id of its weight.
        layers: by name.
    """

    def __init__(self, weights: dict[int, str], layers: Mapping[str, nn.Module]):
        super().__init__()
        self.weights, self.elsewhere, self.layers = weights, set(), layers
        self._running: list[set[str]] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While it lasts, the owners of the weights tell when their forward begins and ends."""
        handles = []
        for module in model.modules():
            own = {self.weights[id(x)] for x in module.parameters(recurse=False) if id(x) in self.weights}
            if own:
                handles.append(module.register_forward_pre_hook(lambda *_, own=own: self._running.append(own)))
                handles.append(module.register_forward_hook(lambda *_: self._end()))
            if hasattr(module, "reshard"):
                # FSDP2 has put gathered weights in the place of the shards by then
                handles.append(module.register_forward_pre_hook(lambda *_: self._look()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self) -> None:
        self.weights |= {id(layer.weight): name for name, layer in self.layers.items()}

    def _end(self) -> None:
        self._running.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if any(True for _ in _tensors(result)) and not name.endswith("_like") and not name.startswith("new_"):
            # of these, only the first gives its values
            given = args[:1] if name == "to" or name.endswith("_as") else (args, kwargs or {})
            for tensor in _tensors(given):
                name = self.weights.get(id(tensor))
                if name is not None and not any(name in own for own in self._running):
                    self.elsewhere.add(name)
        return result


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
