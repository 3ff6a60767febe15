"""Forwards of masked layers by their whole weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .fsdp import check_not_sharded
from .modules import masked_layers


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """All masked layers multiply with their whole weights, in train and in eval mode: the model is its own teacher.

    There is no second copy of a weight, and no memory is needed beyond activations. Other modules keep their modes. The
    backward of a forward whose activations are computed anew has to come within it as well.

    Args:
        model: with MaskedLinear layers.

    Raises:
        ValueError: if the model has no MaskedLinear, fully_shard has cut layers, or kept weights have changed: what it
            was converted from is no longer there.
    """
    layers = masked_layers(model)
    check_not_sharded(layers, "ranks are sent kept values alone; take a dense model of its own")
    changed = [name for name, layer in layers.items() if layer.weight_changed]
    if changed:
        raise ValueError(
            f"model: expected the weights that it was converted with, got kept ones that were refitted or trained in "
            f"{changed}: what the dense model gives has to be computed before"
        )
    before = {layer: layer.is_dense for layer in layers.values()}
    try:
        for layer in before:
            layer.is_dense = True
        yield
    finally:
        for layer, is_dense in before.items():
            layer.is_dense = is_dense
