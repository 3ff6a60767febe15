"""Checkpoints of converted models: dense weights and logits, described so that transformers gives the masks back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.quantizers import register_quantization_config, register_quantizer

from ..modules import CounterState, MaskedLinear, masked_layers
from ..pattern import NMPattern
from ..replacement import replace_modules
from ..stored_digests import MASKED_METHOD
from .quantizer import SparseConfig, SparseQuantizer
from .stored_files import (
    HOW_TO_LOAD,
    check_all_stored,
    check_dense_parts_stored,
    check_digests,
    check_names,
    check_own_settings,
    linears_named,
    stored_dtypes,
    take_apart,
)

MASKED_FORMAT, MASKED_VERSION = "logits", 1
PARTS = ("logits", "_extra_state")


@register_quantization_config(MASKED_METHOD)
class MaskedConfig(SparseConfig):
    """``quantization_config`` of a converted model, whose MaskedLinear modules hold ``weight`` and ``logits``.

    What changes as it learns, seed and step among them, is in the extra state of the modules.

    Args:
        layers: ``pattern`` and ``layer``, the id in the counter, of each MaskedLinear by name.
        taken_apart: names of the modules that hold some of them and were built otherwise, see ``unfuse``.
        digests: of what is stored, see ``stored_digests``.
        format, version: of what is stored.
        loading: for who reads the checkpoint without this package: what transformers needs to load it.

    Raises:
        TypeError, ValueError: an argument is not as above, or of a format or version that this release does not know.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping],
        taken_apart: Sequence[str] = (),
        digests: Mapping[str, Mapping[str, str]] | None = None,
        format: str = MASKED_FORMAT,
        version: int = MASKED_VERSION,
        loading: str = HOW_TO_LOAD,
        **others,
    ):
        self.quant_method = MASKED_METHOD
        check_own_settings(others, format=(format, MASKED_FORMAT), version=(version, MASKED_VERSION))
        if not isinstance(layers, Mapping):
            raise TypeError(f"quantization_config: expected layers by name, got {layers!r}")
        for name, layer in layers.items():
            if not isinstance(layer, Mapping) or layer.keys() != {"pattern", "layer"}:
                raise ValueError(f"quantization_config: expected pattern and layer of {name}, got {layer!r}")
            NMPattern(layer["pattern"])
        self.layers = {name: dict(layer) for name, layer in layers.items()}
        self.taken_apart = check_names("taken_apart", taken_apart)
        self.digests = check_digests(digests)
        self.format, self.version, self.loading = format, version, loading

    @classmethod
    def of(cls, layers: Mapping[str, MaskedLinear], taken_apart: Sequence[str]) -> MaskedConfig:
        """Of a model's masked layers by name."""
        found = {name: {"pattern": str(layer.pattern), "layer": layer.layer} for name, layer in layers.items()}
        return cls(found, taken_apart)


@register_quantizer(MASKED_METHOD)
class MaskedQuantizer(SparseQuantizer):
    """Gives a model MaskedLinear modules before transformers loads its checkpoint, and their counters afterwards."""

    quantization_config: MaskedConfig

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        layers = self.quantization_config.layers
        stored = stored_dtypes(checkpoint_files)
        check_all_stored(stored, PARTS, layers)
        self._check_digests(checkpoint_files)
        self._extra_states, dtype = _stored_states(checkpoint_files)
        if self._extra_states.keys() != {layer["layer"] for layer in layers.values()}:
            raise ValueError("checkpoint: expected the extra state of each layer that its quantization_config names")
        take_apart(model, self.quantization_config.taken_apart)
        replacements, state = {}, CounterState(device="meta")
        for name, linear in linears_named(model, layers).items():
            logits = torch.empty(linear.weight.shape, dtype=dtype, device="meta")
            weight, bias = linear.weight.to("meta"), None if linear.bias is None else linear.bias.to("meta")
            how = {"layer": layers[name]["layer"], "counter_state": state}
            try:
                masked = MaskedLinear(weight, bias, logits, layers[name]["pattern"], **how)
            except (TypeError, ValueError) as error:
                raise ValueError(f"quantization_config: {name}: {error}") from error
            replacements[id(linear)] = masked.train(linear.training)
        replace_modules(model, replacements)
        check_dense_parts_stored(model, stored)

    def _process_model_after_weight_loading(self, model, **kwargs):
        states: dict[torch.device, CounterState] = {}
        for layer in masked_layers(model).values():
            # of a layer that accelerate offloads, which comes to its device for each forward, on the CPU
            device = torch.device("cpu") if layer.weight.is_meta else layer.weight.device
            layer.counter_state = states.setdefault(device, CounterState(device=device))
            # buffers that are not stored come out of meta with any value
            layer.layer_id = torch.empty((), dtype=torch.int64, device=device)
            state = self._extra_states[layer.layer]
            own = [layer.pattern.n, layer.pattern.m, layer.group_offset, layer.group_row_stride]
            if [*state[1:3].tolist(), *state[5:7].tolist()] != own:
                raise ValueError(f"checkpoint: expected the extra state of a whole {layer.pattern} layer, got {state}")
            layer.set_extra_state(state)
            # transformers makes all parameters trainable
            for frozen in (layer.weight, layer.bias):
                if frozen is not None:
                    frozen.requires_grad_(False)
        return model


def _stored_states(files: Iterable[str | Path]) -> tuple[dict[int, Tensor], torch.dtype]:
    """(extra state by layer id, dtype of the logits; float32, which holds the others, where they have several)."""
    states, dtypes = {}, set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                if name.endswith("._extra_state"):
                    state = opened.get_tensor(name)
                    if state.shape != (8,):
                        raise ValueError(f"checkpoint: expected extra state of shape [8], got {list(state.shape)}")
                    states[int(state[0])] = state
                elif name.endswith(".logits"):
                    dtypes.add(opened.get_slice(name).get_dtype())
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    if not dtypes <= known.keys():
        raise ValueError(f"checkpoint: expected logits of {' or '.join(known)}, got {sorted(dtypes)}")
    return states, known[dtypes.pop()] if len(dtypes) == 1 else torch.float32
