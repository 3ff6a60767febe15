"""Which layers of a model get a mask, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..adapters import ADAPTER, adapter_modules
from ..fsdp import check_cut_by_fsdp, check_in_memory, check_row_shard, is_finite, resharded
from ..functional.checks import LOGIT_DTYPES
from ..modules import MaskedLinear
from ..packed import NMLinear
from ..pattern import NMPattern
from ..unfuse import lost_with
from .bypassed import READ_ELSEWHERE, read_elsewhere
from .calibration import Call
from .coverage import HEAD, coverage, output_heads

ITSELF_SHARDED = "fully_shard is around this layer itself: put it around a module that holds the layer"
BYPASSED = "the fast path of nn.TransformerEncoderLayer reads the weight past the mask"
ATTENTION = "nn.MultiheadAttention multiplies with it past its module"

# (layers by name, the reason by name of the layers left out)
Selection = tuple[dict[str, nn.Linear], dict[str, str]]


def layers_to_convert(
    model: nn.Module, pattern: str | NMPattern, targets: Sequence[str] | None = None, call: Call | None = None
) -> Selection:
    """The layers that ``convert`` would replace, by name, and why it would leave out the others.

    Args:
        model, pattern, targets: as for ``convert``.
        call: how the model is called once to see whose weights other code reads, see ``read_elsewhere``.

    Raises:
        TypeError, ValueError: an argument is not as in ``convert``, a weight is not finite or not in memory, or nothing
            is left to convert.
    """
    params = resharded(model)
    check_cut_by_fsdp(model, params)
    layers, skipped = select_layers(model, NMPattern(pattern), targets)
    for name, layer in layers.items():
        check_in_memory("model", layer, name, sharded=True)
        check_row_shard(name, layer.weight, params)
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
    """The nn.Linear layers that ``targets`` name, by default all that can take a mask.

    Raises:
        TypeError, ValueError: ``targets`` are not as in ``convert``, or no layer is left.
    """
    everything = {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Linear)}
    adapters = dict.fromkeys(adapter_modules(model) & everything.keys(), ADAPTER)
    linears = {
        name: module for name, module in everything.items() if type(module) is nn.Linear and name not in adapters
    }
    if not linears:
        raise ValueError(f"model: expected a module that contains nn.Linear layers, got none{_why_none(model)}")
    # they compute something else than x @ w.T + b, or rely on their type
    subclasses = {
        name: ITSELF_SHARDED if hasattr(module, "reshard") else f"subclass of nn.Linear: {type(module).__name__}"
        for name, module in everything.items()
        if name not in linears and name not in adapters
    }
    if targets is None:
        layers, skipped = _by_default(model, linears, pattern)
    else:
        _check_targets(targets)
        layers, skipped = _by_targets(model, linears, pattern, targets)
    attention = {name: reason for name, reason in _bypassed(model).items() if reason == ATTENTION}
    return layers, skipped | subclasses | attention | adapters


def _why_none(model: nn.Module) -> str:
    if any(isinstance(module, MaskedLinear) for module in model.modules()):
        return "; it has MaskedLinear layers: finalize it before it is converted again"
    if any(isinstance(module, NMLinear) for module in model.modules()):
        return "; it has packed layers, which follow a pattern already"
    if isinstance(model, nn.Linear):
        return "; a single layer is converted by MaskedLinear.from_linear"
    return ""


def _by_default(model: nn.Module, linears: Mapping[str, nn.Linear], pattern: NMPattern) -> Selection:
    bypassed, heads, owners = _bypassed(model), output_heads(model), _owners(model)
    reasons = {
        name: bypassed.get(name) or (HEAD if module in heads else _reason_against(module, pattern, owners))
        for name, module in linears.items()
    }
    skipped = {name: reason for name, reason in reasons.items() if reason}
    chosen = {name: module for name, module in linears.items() if name not in skipped}
    if not chosen:
        raise _none_fits(model, pattern, skipped)
    return chosen, skipped


def _none_fits(model: nn.Module, pattern: NMPattern, skipped: Mapping[str, str]) -> ValueError:
    reasons = {**coverage(model, skipped).unmasked, **skipped}.values()
    told = ", ".join(sorted(set(reasons))) + _why_none(model)
    return ValueError(f"model: expected an nn.Linear that {pattern} fits, all matrices were left out: {told}")


def _by_targets(
    model: nn.Module, linears: Mapping[str, nn.Linear], pattern: NMPattern, targets: Sequence[str]
) -> Selection:
    # a layer that stands in several places answers to each of its names
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    matched, exact = set(), {name: own for own, module in linears.items() for name in names[id(module)]}
    for target in targets:
        if target in exact:
            matched.add(exact[target])
            continue
        found = [n for n, module in linears.items() if any(fnmatchcase(name, target) for name in names[id(module)])]
        if not found:
            raise ValueError(f"targets: expected each to match an nn.Linear, {target!r} matches none")
        matched.update(found)
    if not matched:
        raise ValueError(f"targets: expected at least one pattern, got {targets!r}")
    chosen = {name: module for name, module in linears.items() if name in matched}
    bypassed = _bypassed(model)
    for name, module in chosen.items():
        if name in bypassed:
            raise ValueError(f"targets: expected layers that run as modules, got {name}: {bypassed[name]}")
        if module.in_features % pattern.m:
            raise ValueError(
                f"targets: expected in_features divisible by {pattern.m}, got {module.in_features} in {name}"
            )
    return chosen, {name: "matches no target" for name in linears if name not in chosen}


def _check_targets(targets: Sequence[str]) -> None:
    expected = "targets: expected a sequence of fnmatch patterns"
    if isinstance(targets, str):
        raise TypeError(f"{expected}, got the str {targets!r}")
    if not isinstance(targets, Sequence):
        raise TypeError(f"{expected}, got {type(targets).__name__} {targets!r}")
    for target in targets:
        if not isinstance(target, str):
            raise TypeError(f"targets: expected a sequence of str, got {type(target).__name__} {target!r} in it")


def _bypassed(model: nn.Module) -> dict[str, str]:
    """Modules of torch's transformer whose weights a parent reads past them, in ways ``read_elsewhere`` may not see."""
    reasons = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.TransformerEncoderLayer):
            reasons |= {f"{prefix}linear1": BYPASSED, f"{prefix}linear2": BYPASSED}
        elif isinstance(module, nn.MultiheadAttention):
            reasons |= {name: ATTENTION, f"{prefix}out_proj": ATTENTION}
    return reasons


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The embeddings and nn.Linear layers of each weight, by its id."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.Linear)):
            owners.setdefault(id(module.weight), []).append(module)
    return owners


def _reason_against(linear: nn.Linear, pattern: NMPattern, owners: Mapping[int, list[nn.Module]]) -> str | None:
    """Why a layer is not converted by default."""
    shared = owners[id(linear.weight)]
    if any(isinstance(module, nn.Embedding) for module in shared):
        return "weight tied to an embedding"
    if len(shared) > 1:
        return "weight tied to another layer"
    if linear.in_features % pattern.m:
        return f"in_features {linear.in_features} not divisible by {pattern.m}"
    return lost_with(linear)
