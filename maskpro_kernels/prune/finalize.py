"""Bake masks into a model's weights, pack and unpack the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..functional.checks import check_in_memory, check_one_of
from ..functional.masks import top_n_mask
from ..modules import check_not_sharded, masked_layers
from ..ops.pattern import NMPattern
from ..packed import INT4, INT8, KEEP, OUTPUT_LAYERS, Int8Linear, NMLinear, check_values, dense_layer, packed_class
from ..unfuse import in_linear_form, is_linear, unfused_modules
from .convert import Conversion, check_replaceable, one_layer_a_weight, replace_layers
from .gptq import gptq
from .initial_masks import Progress
from .selection import coverage, reasons_by_name, select_layers


def finalize(model: nn.Module, to: str = "dense", values: str = KEEP, group: int = 64, *,
             calibration: Iterable | None = None, progress: Progress | None = None,
             output_layer: str = KEEP) -> nn.Module:  # fmt: skip
    """Bake the top-N masks in, in place: every MaskedLinear becomes an nn.Linear with exact zeros, or an NMLinear.

    With to="dense", modules that ``convert`` unfused are fused again: the model gets the names and shapes that it had
    before ``convert``.

    Frozen weights and biases stay frozen; those of packed layers are all frozen. Layers that are cut over ranks keep
    their DTensors, with zeros written into them; they cannot be packed.

    Args:
        model: a converted model.
        to: "dense", or "packed" for NMLinear, at 2:4 Sparse24Linear.
        values, group: of packed layers: "keep" for unchanged ones, "int8", or "int4", see ``pack_nm``.
        calibration: batches for the model, each a tensor, a tuple or a mapping. int4 values are then rounded so that
            the outputs of layers change least, see ``prune/gptq.py``; experts without a token as in ``pack_nm``.
        progress: called with (layers done, layers in all) while values are rounded to int4 by ``calibration``.
        output_layer: "int8" rounds also the output layer of a model of transformers, which becomes an Int8Linear that
            is not tied to the embedding; with to="packed".

    Warns:
        UserWarning: names experts without a token.

    Returns:
        ``model``; the new linear layer if the model itself is a MaskedLinear.

    Raises:
        TypeError, ValueError: if ``to``, ``values``, ``group`` or ``output_layer`` is unknown, to="dense" comes with
            other values or another output layer than "keep", ``calibration`` comes without "int4", is no iterable of
            batches, has no batch or inputs that are not finite, the model has no MaskedLinear, or for
            output_layer="int8" no output layer that is an nn.Linear, fully_shard was called on a MaskedLinear itself, a
            weight is not in memory, or a weight to quantize is not finite. The model is then unchanged.
    """
    check_one_of("to", to, ("dense", "packed"))
    check_values(values, group)
    if to == "dense" and values != KEEP:
        raise ValueError(f'values: expected "{KEEP}" for dense layers, got {values!r}; pack them by to="packed"')
    check_one_of("output_layer", output_layer, OUTPUT_LAYERS)
    if to == "dense" and output_layer != KEEP:
        raise ValueError(f'output_layer: expected "{KEEP}" beside dense layers, got {output_layer!r}; see to="packed"')
    if calibration is not None and values != INT4:
        raise ValueError(f'calibration: expected none but for values="{INT4}", got batches for {values!r}')
    replacements = {}
    layers = masked_layers(model)
    check_replaceable(model)
    if to == "packed":
        check_not_sharded(layers, "save a dense checkpoint, load it in one process, and pack that model")
    for apart in unfused_modules(model):
        cut = {name: layer for name, layer in layers.items() if name == apart or name.startswith(f"{apart}.")}
        reason = f"{apart}, which convert unfused, can only be fused from whole layers; finalize it in one process"
        check_not_sharded(cut, reason)
    for name, layer in layers.items():
        check_in_memory("model", layer, name, sharded=True)
        if hasattr(layer, "reshard"):
            raise ValueError(
                "model: expected fully_shard around a module that contains masked layers, got one around "
                f"{name or 'the only one'} itself"
            )
    if output_layer == INT8:
        replacements |= int8_output_layer(model)
    with torch.no_grad():
        for name, layer in layers.items():
            if to == "packed":
                with _naming(name):
                    replacements[id(layer)] = packed_class(layer.pattern).from_masked(layer, values, group)
            else:
                replacements[id(layer)] = dense_layer(layer)
        if calibration is not None:
            codes = {name: top_n_mask(layer.logits_on_device(), layer.pattern) for name, layer in layers.items()}
            patterns = {name: layer.pattern for name, layer in layers.items()}
            for name, packed in gptq(model, layers, codes, patterns, calibration, group, progress).items():
                rounded = packed_class(packed.pattern)(packed, layers[name].bias)
                replacements[id(layers[name])] = rounded.train(layers[name].training)
    replace_layers(model, replacements)
    return replacements.get(id(model), model)


def output_layer_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """(name, output layer) of a model of transformers.

    Raises:
        ValueError: if the model has no output layer that is an nn.Linear, it is none of the model's modules, it is tied
            in an encoder-decoder, which may compute otherwise if it is not, or its weight is not in memory.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not is_linear(head):
        kind = "none" if head is None else type(head).__name__
        raise ValueError(f"output_layer: expected a model whose output layer is an nn.Linear, got {kind}")
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None:
        raise ValueError(
            f"output_layer: expected one of the modules of {type(model).__name__}, got another {type(head).__name__}"
        )
    if head.weight is model.get_input_embeddings().weight and model.config.is_encoder_decoder:
        raise ValueError(
            f"output_layer: expected a decoder, or an output layer of its own, got {type(model).__name__}, an "
            "encoder-decoder with a tied one"
        )
    check_in_memory("model", head, name)
    return name, head


def int8_output_layer(model: nn.Module) -> dict[int, Int8Linear]:
    """Round the output layer to int8; return the new layer by the id of the present one.

    Raises:
        ValueError: as in ``output_layer_of``, or its weight is not finite.
    """
    name, head = output_layer_of(model)
    with _naming(name):
        return {id(head): Int8Linear.from_dense(head)}


def pack(model: nn.Module, pattern: str | NMPattern, values: str = KEEP, group: int = 64) -> Conversion:
    """Replace every nn.Linear whose weight follows the pattern by an NMLinear, at 2:4 a Sparse24Linear, in place.

    The output head and layers that share a weight but not the bias stay unchanged, as in ``convert``.

    Args:
        model: with exact zeros.
        pattern: "N:M" or NMPattern.
        values, group: "keep" for unchanged ones, "int8", or "int4", see ``pack_nm``.

    Raises:
        ValueError: if ``values`` or ``group`` is unknown, no layer's weight follows the pattern, a weight is not in
            memory, or a weight to quantize is not finite. The model is then unchanged.
    """
    pattern = NMPattern(pattern)
    check_values(values, group)
    check_replaceable(model)
    replacements = {}
    packed = []
    with one_layer_a_weight(model), in_linear_form(model) as left_out:
        layers, skipped = select_layers(model, pattern)
        for name, layer in layers.items():
            check_in_memory("model", layer, name)
            kept = (layer.weight != 0).reshape(layer.out_features, -1, pattern.m).sum(-1)
            if (kept > pattern.n).any():
                skipped[name] = f"{float((kept > pattern.n).float().mean()):.1%} of its groups do not follow {pattern}"
            else:
                with _naming(name):
                    replacements[id(layer)] = packed_class(pattern).from_dense(layer, pattern, values, group)
                packed.append(name)
        if not packed:
            raise ValueError(f"pattern: expected one that some layer follows, got {pattern}, which none follows")
        replace_layers(model, replacements)
    skipped = reasons_by_name(model, skipped | left_out)
    share, unmasked = coverage(model, skipped)
    return Conversion(packed, skipped, masked_share=share, unmasked=unmasked)


def repack(model: nn.Module, values: str, group: int = 64) -> int:
    """Store the values of every NMLinear as in ``pack_nm``, in place; return how many layers changed.

    Raises:
        ValueError: if ``values`` or ``group`` is unknown, a weight is not in memory, or a weight to quantize is not
            finite. The model is then unchanged.
    """
    check_values(values, group)
    replacements = {}
    for name, layer in model.named_modules():
        if isinstance(layer, NMLinear):
            check_in_memory("model", layer, name, layer.values)
            packed = layer.packed
            with _naming(name):
                stored = packed.stored_as(values, group)
            if stored is not packed:
                replacements[id(layer)] = type(layer)(stored, layer.bias).train(layer.training)
    if replacements:
        replace_layers(model, replacements)
    return len(replacements)


def unpack(model: nn.Module) -> None:
    """Replace every NMLinear by an nn.Linear with exact zeros, and every Int8Linear, in place."""
    kinds = NMLinear, Int8Linear
    replace_layers(model, {id(layer): dense_layer(layer) for layer in model.modules() if isinstance(layer, kinds)})


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Add the layer's name to errors about its weight."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"model: {layer}.{error}" if layer else f"model: {error}") from error
