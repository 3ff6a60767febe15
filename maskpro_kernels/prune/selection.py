"""Selection of the layers that get a mask, reasons why others do not, and the masked share of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..functional.checks import LOGIT_DTYPES, check_in_memory, describe
from ..modules import MaskedLinear, evaluating
from ..ops.pattern import NMPattern
from ..packed import NMLinear
from ..shards import is_finite
from ..unfuse import ADAPTER, adapter_modules, is_linear, lost_with
from .calibration import Call, as_call, check_calibration, run_model

HEAD = "output head"
EMBEDDING = "embedding"
READ_ELSEWHERE = "other code reads its weight directly, without the layer's forward"
ITSELF_SHARDED = "fully_shard was called on this layer itself: call it on a module that contains the layer"
BYPASSED = "the fast path of nn.TransformerEncoderLayer reads the weight without the mask"
ATTENTION = "nn.MultiheadAttention multiplies with it without its forward"
# If a smaller share of a model's matrix weights has a mask, there is a warning
MOST_OF_A_MODEL = 0.9

# (layers by name, reasons of the layers left out by name)
Selection = tuple[dict[str, nn.Linear], dict[str, str]]


def layers_to_convert(
    model: nn.Module, pattern: str | NMPattern, targets: Sequence[str] | None = None, call: Call | None = None
) -> Selection:
    """Select the layers that ``convert`` replaces, by name, with reasons for the others.

    Args:
        model, pattern, targets: as for ``convert``.
        call: a call of the model that shows which weights other code reads, see ``read_elsewhere``.
    """
    layers, skipped = select_layers(model, NMPattern(pattern), targets)
    for name, layer in layers.items():
        check_in_memory("model", layer, name, sharded=True)
        if layer.weight.dtype not in LOGIT_DTYPES:
            raise TypeError(f"model: expected weights in {LOGIT_DTYPES}, got {layer.weight.dtype} in {name}")
        if not is_finite(layer.weight):
            raise ValueError(f"model: expected finite weights, got NaN or infinity in {name}")
    bypassed = read_elsewhere(model, layers, call)
    if bypassed and targets is not None:
        raise ValueError(f"targets: expected layers that run as modules, got {min(bypassed)}: {READ_ELSEWHERE}")
    skipped |= dict.fromkeys((name for name in layers if name in bypassed), READ_ELSEWHERE)
    layers = {name: layer for name, layer in layers.items() if name not in bypassed}
    if not layers:
        raise _none_fits(model, NMPattern(pattern), skipped)
    return layers, skipped


def select_layers(model: nn.Module, pattern: NMPattern, targets: Sequence[str] | None = None) -> Selection:
    """Select the nn.Linear layers that ``targets`` name, by default all that can have a mask."""
    everything = {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Linear)}
    adapters = dict.fromkeys(adapter_modules(model) & everything.keys(), ADAPTER)
    linears = {n: module for n, module in everything.items() if n not in adapters and is_linear(module)}
    if not linears:
        raise ValueError(f"model: expected a module that contains nn.Linear layers, got none{_why_none(model)}")
    # they compute something other than x @ w.T + b, or other code depends on their type
    subclasses = {}
    for name, module in everything.items():
        if name not in linears and name not in adapters:
            is_sharded = hasattr(module, "reshard")
            subclasses[name] = ITSELF_SHARDED if is_sharded else f"subclass of nn.Linear: {type(module).__name__}"
    bypassed = _bypassed(model)
    if targets is None:
        layers, skipped = _by_default(model, linears, pattern, bypassed)
    else:
        layers, skipped = _by_targets(model, linears, pattern, bypassed, targets)
    attention = {name: reason for name, reason in bypassed.items() if reason == ATTENTION}
    return layers, skipped | subclasses | attention | adapters


def _why_none(model: nn.Module) -> str:
    if any(isinstance(module, MaskedLinear) for module in model.modules()):
        return "; it has MaskedLinear layers: finalize it before you convert it again"
    if any(isinstance(module, NMLinear) for module in model.modules()):
        return "; it has packed layers, which follow a pattern already"
    if isinstance(model, nn.Linear):
        return "; convert a single layer by MaskedLinear.from_linear"
    return ""


def _by_default(
    model: nn.Module, linears: Mapping[str, nn.Linear], pattern: NMPattern, bypassed: Mapping[str, str]
) -> Selection:
    heads = output_heads(model)
    # the embeddings and nn.Linear layers of each weight
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.Linear)):
            owners.setdefault(id(module.weight), []).append(module)

    def reason_against(name: str, linear: nn.Linear) -> str | None:
        shared = owners[id(linear.weight)]
        if name in bypassed or linear in heads:
            return bypassed.get(name, HEAD)
        if any(isinstance(module, nn.Embedding) for module in shared):
            return "weight tied to an embedding"
        if len(shared) > 1:
            return "weight tied to another layer"
        if linear.in_features % pattern.m:
            return f"in_features {linear.in_features} not divisible by {pattern.m}"
        return lost_with(linear)

    reasons = {name: reason_against(name, module) for name, module in linears.items()}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    chosen = {name: module for name, module in linears.items() if name not in skipped}
    if not chosen:
        raise _none_fits(model, pattern, skipped)
    return chosen, skipped


def _none_fits(model: nn.Module, pattern: NMPattern, skipped: Mapping[str, str]) -> ValueError:
    reasons = ", ".join(sorted({*coverage(model, skipped)[1].values(), *skipped.values()})) + _why_none(model)
    return ValueError(f"model: expected an nn.Linear that {pattern} fits, got none: {reasons}")


def _by_targets(model: nn.Module, linears: Mapping[str, nn.Linear], pattern: NMPattern,
                bypassed: Mapping[str, str], targets: Sequence[str]) -> Selection:  # fmt: skip
    expected = "targets: expected a sequence of fnmatch patterns"
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        raise TypeError(f"{expected}, got the {describe(targets)}")
    # a shared layer has several names
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    matched = set()
    exact = {alias: name for name, module in linears.items() for alias in names[id(module)]}
    for target in targets:
        if not isinstance(target, str):
            raise TypeError(f"{expected}, got {describe(target)} in it")
        if target in exact:
            matched.add(exact[target])
            continue
        matches = [
            name for name, module in linears.items() if any(fnmatchcase(alias, target) for alias in names[id(module)])
        ]
        if not matches:
            raise ValueError(f"targets: expected each to match an nn.Linear, {target!r} matches none")
        matched.update(matches)
    if not matched:
        raise ValueError(f"targets: expected at least one pattern, got {targets!r}")
    chosen = {name: module for name, module in linears.items() if name in matched}
    for name, module in chosen.items():
        if name in bypassed:
            raise ValueError(f"targets: expected layers that run as modules, got {name}: {bypassed[name]}")
        if module.in_features % pattern.m:
            raise ValueError(
                f"targets: expected in_features divisible by {pattern.m}, got {module.in_features} in {name}"
            )
    return chosen, {name: "matches no target" for name in linears if name not in chosen}


def _bypassed(model: nn.Module) -> dict[str, str]:
    """Layers of torch's transformer modules whose weights a parent reads in ways that ``read_elsewhere`` may miss."""
    reasons = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.TransformerEncoderLayer):
            reasons |= {f"{prefix}linear1": BYPASSED, f"{prefix}linear2": BYPASSED}
        elif isinstance(module, nn.MultiheadAttention):
            reasons |= {name: ATTENTION, f"{prefix}out_proj": ATTENTION}
    return reasons


def coverage(model: nn.Module, skipped: Mapping[str, str]) -> tuple[float, dict[str, str]]:
    """(share of a model's matrix weights that follow an N:M pattern, the other matrices by name with the reason).

    Matrices are parameters of two or more dimensions. Embeddings and the output head do not count; without others the
    share is 1. The largest matrices without a mask come first, embeddings and the output head last.

    Args:
        model: with MaskedLinear or NMLinear modules.
        skipped: reasons of the nn.Linear layers that were left out, by name.
    """
    masked = 0
    total = 0
    unmasked = {}
    sizes = {}
    seen = set()
    heads = output_heads(model)
    for name, module in model.named_modules():
        if isinstance(module, (MaskedLinear, NMLinear)):
            masked += module.in_features * module.out_features
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or not parameter.is_floating_point() or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{name}.{parameter_name}" if name else parameter_name
            apart = EMBEDDING if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else None
            apart = HEAD if module in heads else apart
            unmasked[full] = apart or skipped.get(name) or f"of {type(module).__name__}, which is not an nn.Linear"
            if not apart:
                sizes[full] = parameter.numel()
    total = masked + sum(sizes.values())
    largest_first = sorted(unmasked, key=lambda name: -sizes.get(name, 0))
    return masked / total if total else 1.0, {name: unmasked[name] for name in largest_first}


def reasons_by_name(model: nn.Module, skipped: Mapping[str, str]) -> dict[str, str]:
    """Reasons by current module names; a layer that was fused again is replaced by the module with its matrix."""
    modules = dict(model.named_modules())
    named = {}
    for name, reason in skipped.items():
        while name not in modules:
            name = name.rpartition(".")[0]
        named.setdefault(name, reason)
    return named


def output_heads(model: nn.Module) -> set[nn.Module]:
    """Output embeddings, in transformers' term, of a model and of the models within it, with their submodules."""
    heads = (module.get_output_embeddings() for module in model.modules() if hasattr(module, "get_output_embeddings"))
    return {part for head in heads if head is not None for part in head.modules()}


def read_elsewhere(model: nn.Module, layers: Mapping[str, nn.Module], call: Call | None) -> set[str]:
    """Names of layers whose weight an operation reads outside of the layer's forward.

    The forward of an embedding with the same weight does not count, nor do reads of dtype, shape or device.

    The model runs in eval mode and in training mode, since some models branch on it. Random state, buffers and modes
    are restored. Compiled code runs eagerly.

    Args:
        model: runs without gradients.
        layers: of the model, by name.
        call: a call of the model. None: transformers' dummy inputs; a model without them, or that fails on them, is not
            checked.
    """
    if call is not None:
        return _read_elsewhere(model, layers, call)
    # any error: the inputs are transformers', not the user's
    with suppress(Exception):
        inputs = {name: value.to(model.device) for name, value in model.dummy_inputs.items()}
        tokens = inputs.get("input_ids")
        embeddings = model.get_input_embeddings()
        # on a GPU an index beyond the embedding would make the device unusable
        if tokens is None or int(tokens.max()) < embeddings.num_embeddings:
            return _read_elsewhere(model, layers, ((), inputs))
    return set()


def first_call(calibration: Iterable | None) -> tuple[Call | None, Iterable | None]:
    """(call with the first batch, iterable of all batches), also for an iterator, which yields batches only once."""
    if calibration is None:
        return None, None
    check_calibration(calibration)
    batches = iter(calibration)
    first = list(islice(batches, 1))
    return (as_call(first[0]) if first else None), chain(first, batches)


def _read_elsewhere(model: nn.Module, layers: Mapping[str, nn.Module], call: Call) -> set[str]:
    reads = _Reads(layers)
    handles = []
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {layer.weight.device for layer in layers.values() if layer.weight.is_cuda}

    def enter(layer_names: set[str], *_) -> None:
        reads.running.append(layer_names)

    def leave(*_) -> None:
        reads.running.pop()

    for module in model.modules():
        layer_names = {reads.weights[id(x)] for x in module.parameters(recurse=False) if id(x) in reads.weights}
        if layer_names:
            handles.append(module.register_forward_pre_hook(partial(enter, layer_names)))
            handles.append(module.register_forward_hook(leave))
        if hasattr(module, "reshard"):
            # by then FSDP2 has replaced the shards by gathered weights
            handles.append(module.register_forward_pre_hook(lambda *_: reads.look()))
    with torch.no_grad(), evaluating(model), torch.random.fork_rng(list(devices)):
        try:
            with torch.compiler.set_stance("force_eager"), reads:
                run_model(model, call)
                model.train()
                # such as a norm over a batch of one, or a detector without labels
                with suppress(Exception):
                    run_model(model, call)
        finally:
            for handle in handles:
                handle.remove()
            for buffer, before in buffers:
                buffer.copy_(before)
    return reads.elsewhere


class _Reads(TorchFunctionMode):
    """Collect names of layers whose weights operations read while no module with these weights is ``running``."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.layers = layers
        self.weights = {}
        self.elsewhere: set[str] = set()
        self.running: list[set[str]] = []
        self.look()

    def look(self) -> None:
        self.weights |= {id(layer.weight): name for name, layer in self.layers.items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if _tensors(result) and not name.endswith("_like") and not name.startswith("new_"):
            # these read the values of the first argument alone
            first_alone = name == "to" or name.endswith("_as")
            arguments = args[:1] if first_alone else (args, kwargs or {})
            read = {self.weights[id(tensor)] for tensor in _tensors(arguments) if id(tensor) in self.weights}
            self.elsewhere |= read.difference(*self.running)
        return result


def _tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (dict, tuple, list)):
        return []
    elements = value.values() if isinstance(value, dict) else value
    return [tensor for element in elements for tensor in _tensors(element)]
