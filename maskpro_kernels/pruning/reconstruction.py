"""Masks that reconstruct the outputs of every layer: swaps within groups on the Gram matrix of its inputs.

For inputs X of a layer, H = X^T X, and a row w of its weight under a mask m, the squared error of the outputs is
E(m) = d H d^T with d = w * m - w. Swaps of a kept with a dropped weight of a group that lower E are found in
closed form for all groups at once, and many are taken together as long as E falls. (SparseSwaps, arXiv 2512.10922,
descends on the same error.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import ops
from ..functional.checks import check_codes
from ..functional.linear import codes_linear
from ..modules import evaluating
from ..pattern import NMPattern
from .initial_masks import as_call

# Elements of the weight that are worked on at a time; rows do not depend on each other
PIECE = 1 << 24
# Share of a row's groups that may swap together at first
FIRST_SHARE = 16
# E has to fall by this part of itself, or rounding could pass for progress
LEAST_FALL = 1e-6
# By then the error of a language model's layers has done 80 to 90% of the fall that 50 sweeps bring
SWEEPS = 16
# In how many parts the online schedule takes the batches, and what a Gram matrix keeps of those before
ROUNDS = 8
DECAY = 0.5


def swap_descent(
    weight: Tensor, codes: Tensor, gram: Tensor, pattern: str | NMPattern, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor]:
    """Descend on the reconstruction error of every row by swaps within groups; the error of no row rises.

    In a sweep every row takes its best swaps together, at first one in 16 of its groups; where the error does not
    fall by that, none of them, and half as many the next time. A row whose single best swap does not help is done.

    Args:
        weight: [out, K], K divisible by M.
        codes: group codes [out, K / M] to start from.
        gram: symmetric positive semidefinite float32 [K, K].
        pattern: "N:M" or NMPattern.
        sweeps: most sweeps of a row.

    Returns:
        (group codes [out, K / M]; by how much the error of each row fell, float32 [out]).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    pattern = NMPattern(pattern)
    check_codes("codes", codes, pattern, weight)
    k = weight.shape[1]
    if not isinstance(gram, Tensor):
        raise TypeError(f"gram: expected a tensor, got {type(gram).__name__}")
    if gram.shape != (k, k) or gram.dtype != torch.float32 or gram.device != weight.device:
        raise ValueError(
            f"gram: expected a float32 tensor [{k}, {k}] on {weight.device}, "
            f"got {list(gram.shape)} of {gram.dtype} on {gram.device}"
        )
    if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 0:
        raise ValueError(f"sweeps: expected an int of at least 0, got {sweeps!r}")
    return _descend_rows(weight, codes, *_by_place(gram, pattern.m), pattern, sweeps)


def _by_place(gram: Tensor, m: int, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """(the matrix [K, K] with columns and rows in the order of [M, K / M], its diagonal blocks [M, M, K / M]).

    ``damping`` is added to the diagonal of that copy, as a share of its mean.
    """
    groups = len(gram) // m
    ordered = gram.view(groups, m, groups, m).permute(1, 0, 3, 2).clone(memory_format=torch.contiguous_format)
    ordered = ordered.view(gram.shape)
    if damping:
        ordered.diagonal().add_(damping * gram.diagonal().mean())
    return ordered, ordered.view(m, groups, m, groups).diagonal(dim1=1, dim2=3).contiguous()


def _descend_rows(weight: Tensor, codes: Tensor, gram: Tensor, blocks: Tensor, pattern: NMPattern, sweeps: int):
    """``swap_descent`` with a Gram matrix as ``_by_place`` gives it."""
    rows = max(PIECE // weight.shape[1], 1)
    pieces = [
        _descend(w, code, gram, blocks, pattern, sweeps)
        for w, code in zip(weight.detach().split(rows), codes.split(rows), strict=True)
    ]
    return torch.cat([code for code, _ in pieces]), torch.cat([fall for _, fall in pieces])


def _kept(codes: Tensor, m: int) -> Tensor:
    """1.0 where kept and 0.0 where dropped, [rows, M, K / M]."""
    bits = torch.arange(m, device=codes.device, dtype=codes.dtype)
    return (codes[:, None] >> bits[:, None] & 1).float()


def _descend(weight: Tensor, codes: Tensor, gram: Tensor, blocks: Tensor, pattern: NMPattern, sweeps: int):
    rows, groups = codes.shape
    # Weights that stand at the same place of their groups lie together: nothing below strides
    w = weight.float().view(rows, groups, pattern.m).transpose(1, 2).contiguous()

    def times_gram(x):
        return (x.view(rows, -1) @ gram).view(w.shape)

    kept = _kept(codes, pattern.m)
    difference = (kept - 1.0) * w
    product = times_gram(difference)
    error = (difference * product).sum((1, 2))
    fallen = torch.zeros_like(error)
    count = torch.full((rows,), max(1, groups // FIRST_SHARE), device=w.device)
    for _ in range(sweeps):
        change, swap = ops.best_swaps(w, product, codes, blocks, pattern.n, pattern.m)
        swap = torch.where(_lowest(change, count), swap, 0)
        if not swap.any():
            break
        swapped = _kept(codes ^ swap, pattern.m)
        step = (swapped - kept) * w
        step_product = times_gram(step)
        fall = -(step * torch.add(step_product, product, alpha=2.0)).sum((1, 2))
        accepted = fall > LEAST_FALL * (error - fallen)
        count = torch.where(accepted, count, count // 2)
        product.addcmul_(step_product, accepted[:, None, None].float())
        kept = torch.where(accepted[:, None, None], swapped, kept)
        codes = torch.where(accepted[:, None], codes ^ swap, codes)
        fallen += torch.where(accepted, fall, 0.0)
    return codes, fallen


def _lowest(change: Tensor, count: Tensor) -> Tensor:
    """Which groups hold the ``count`` lowest changes of their row, of those below zero."""
    most = int(count.max())
    if most == 0:
        return torch.zeros_like(change, dtype=torch.bool)
    value, where = change.topk(most, dim=1, largest=False)
    wanted = (torch.arange(most, device=change.device) < count[:, None]) & (value < 0)
    return torch.zeros_like(change, dtype=torch.bool).scatter_(1, where, wanted)


@torch.inference_mode()
def reconstruct(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    codes: Mapping[str, Tensor],
    pattern: str | NMPattern,
    calibration: Iterable,
    *,
    schedule: str = "sequential",
    damping: float = 0.01,
    sweeps: int = SWEEPS,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Masks that reconstruct the layers' outputs: what a layer's whole weight makes of the inputs it sees.

    Schedules:
        "sequential": layer by layer in the order in which they run, on all batches, the layers before already
        masked. Where blocks stand in a chain, the output of one being the input of the next, as in language
        models, only the inputs of one block and one Gram matrix are held; else the whole model runs for every
        layer.
        "online": all layers together, after every eighth of the batches, on Gram matrices that decay by half each
        time. One forward a batch; the Gram matrices of all layers are held.

    Layers that are given the same tensor share its Gram matrix.

    Args:
        model: holds ``layers``; its weights stay as they are.
        layers: nn.Linear or alike, by name.
        codes: group codes to start from, by the same names.
        pattern: "N:M" or NMPattern.
        calibration: batches for the model, each a tensor, a tuple or a mapping.
        schedule: "sequential" or "online".
        damping: what is added to the diagonal of a Gram matrix, as a share of its mean.
        sweeps: most sweeps of a row each time, see ``swap_descent``.
        progress: whether to show a bar.

    Returns:
        group codes by name.

    Raises:
        TypeError, ValueError: an argument is not as above, there is no batch, or a layer sees none of them.
    """
    pattern, codes = NMPattern(pattern), dict(codes)
    if schedule not in ("sequential", "online"):
        raise ValueError(f'schedule: expected "sequential" or "online", got {schedule!r}')
    if not isinstance(calibration, Iterable):
        raise TypeError(f"calibration: expected an iterable of batches, got {type(calibration).__name__}")
    calls = [as_call(batch) for batch in calibration]
    if not calls:
        raise ValueError("calibration: expected at least one batch, got none")

    rounds = [calls[i::ROUNDS] for i in range(ROUNDS) if calls[i::ROUNDS]] if schedule == "online" else [calls]
    bar = tqdm(total=len(layers) * len(rounds), desc="reconstruction", unit="layer", disable=not progress)

    def descend(names: Sequence[str], gram: Tensor) -> None:
        ordered = _by_place(gram.to(layers[names[0]].weight.device), pattern.m, damping)
        for name in names:
            codes[name], _ = _descend_rows(layers[name].weight, codes[name], *ordered, pattern, sweeps)
            bar.update()

    with bar, evaluating(model), _without_cache(model), _masked(layers, codes, pattern):
        if schedule == "sequential":
            for module, block_calls in _blocks(model, layers, calls):
                for names, once in _stages(module, block_calls, layers):
                    descend(names, _gram(module, block_calls, layers[names[0]], once))
        else:
            stages = _stages(model, calls, layers)
            grams = [None] * len(stages)
            for part in rounds:
                for index, gram in enumerate(_grams(model, part, [layers[names[0]] for names, _ in stages])):
                    if gram is not None:
                        grams[index] = gram if grams[index] is None else DECAY * grams[index] + gram
                for (names, _), gram in zip(stages, grams, strict=True):
                    if gram is not None:
                        descend(names, gram)
    return codes


class _Stop(Exception):
    """A forward has reached what was wanted of it."""


def _call(module: nn.Module, call: tuple[tuple, dict]):
    args, kwargs = call
    return module(*args, **kwargs)


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """With ``hook(x)`` before every forward of a module, x its input."""

    def before(hook):
        return lambda module, args, kwargs: hook(args[0] if args else kwargs["input"])

    handles = [module.register_forward_pre_hook(before(hook), with_kwargs=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _masked(layers: Mapping[str, nn.Module], codes: Mapping[str, Tensor], pattern: NMPattern) -> Iterator[None]:
    """With layers that multiply under the masks that stand in ``codes`` at the time."""

    def forward(name, layer):
        def multiply(input: Tensor) -> Tensor:
            # in place of a forward to which a hook might have brought its input
            input = input.to(layer.weight.device)
            return codes_linear(input, layer.weight, codes[name], layer.bias, pattern=pattern)

        return multiply

    before = {layer: layer.__dict__.get("forward") for layer in layers.values()}
    try:
        for name, layer in layers.items():
            layer.forward = forward(name, layer)
        yield
    finally:
        for layer, own in before.items():
            del layer.forward
            if own is not None:
                layer.forward = own


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """With a language model that keeps no keys and values: a block that runs again would append to them."""
    config = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


def _blocks(
    model: nn.Module, layers: Mapping[str, nn.Module], calls: list[tuple[tuple, dict]]
) -> Iterator[tuple[nn.Module, list[tuple[tuple, dict]]]]:
    """The blocks of a chain with the calls that the model makes of each, one a batch, or else the model itself.

    A block's calls follow from the masks that the layers of those before it have when it is asked for.
    """
    chain = _chain(model, layers)
    recorded = _record(model, chain, calls) if chain else None
    if recorded is None:
        yield model, calls
        return
    hidden, sides = recorded
    for index, block in enumerate(chain):
        block_calls = [((x, *args), kwargs) for x, (args, kwargs) in zip(hidden, sides[index], strict=True)]
        yield block, block_calls
        if index + 1 < len(chain):
            hidden = [_first(_call(block, call)) for call in block_calls]


def _chain(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The children of the outermost list of modules that holds all layers, where there is one."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and all(layer.startswith(prefix) for layer in layers):
            return list(module)
    return []


def _record(model: nn.Module, chain: list[nn.Module], calls: list[tuple[tuple, dict]]):
    """(inputs of the first block, one a batch; by block what else it is given, one a batch); None if it is no chain."""
    hidden, sides = [], [[] for _ in chain]
    for call in calls:
        state = {"next": 0, "output": None}

        def before(module, args, kwargs, state=state):
            index = state["next"]
            linked = index == 0 or (args and args[0] is state["output"])
            if index == len(chain) or module is not chain[index] or not args or not linked:
                raise _Stop
            if index == 0:
                hidden.append(args[0])
            sides[index].append((args[1:], kwargs))
            state["next"] += 1

        def after(module, args, output, state=state):
            state["output"] = _first(output)

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in chain]
        handles += [block.register_forward_hook(after) for block in chain]
        try:
            _call(model, call)
        except _Stop:
            return None
        finally:
            for handle in handles:
                handle.remove()
        if state["next"] < len(chain):
            return None
    return hidden, sides


def _first(output):
    """The hidden state among what a block returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _stages(
    module: nn.Module, calls: list[tuple[tuple, dict]], layers: Mapping[str, nn.Module]
) -> list[tuple[list[str], bool]]:
    """Layers in the order in which they run, those with the same input together, and whether each runs once a call.

    Raises:
        ValueError: if a layer of ``module`` is not reached.
    """
    inside = set(module.modules())
    waiting = {name for name, layer in layers.items() if layer in inside}
    stages, inputs, runs = [], [], Counter()

    def hook(name):
        def see(x):
            runs[name] += 1
            if name in waiting:
                waiting.remove(name)
                if inputs and inputs[-1] is x:
                    stages[-1].append(name)
                else:
                    stages.append([name])
                    inputs.append(x)

        return see

    once = {name: True for name in waiting}
    with _hooked({layers[name]: hook(name) for name in waiting}):
        for call in calls:
            if not waiting:
                break
            runs.clear()
            _call(module, call)
            once = {name: once[name] and runs[name] <= 1 for name in once}
            inputs.append(None)
    if waiting:
        raise ValueError(f"calibration: expected batches that reach every layer, {sorted(waiting)} saw no input")
    return [(names, all(once[name] for name in names)) for names in stages]


def _gram(module: nn.Module, calls: list[tuple[tuple, dict]], layer: nn.Module, once: bool) -> Tensor:
    """X^T X of a layer's inputs over all calls of ``module``, float32; a forward ends there if the layer runs once."""
    (gram,) = _grams(module, calls, [layer], stop=once)
    return gram


def _grams(
    module: nn.Module, calls: list[tuple[tuple, dict]], layers: Sequence[nn.Module], stop: bool = False
) -> list[Tensor | None]:
    """X^T X of the inputs of each layer, float32; None of one that saw none."""
    grams: list[Tensor | None] = [None] * len(layers)

    def hook(index):
        def add(x):
            x = x.reshape(-1, x.shape[-1]).float()
            if grams[index] is None:
                grams[index] = x.new_zeros(x.shape[1], x.shape[1])
            grams[index].addmm_(x.T, x)
            if stop:
                raise _Stop

        return add

    with _hooked({layer: hook(index) for index, layer in enumerate(layers)}):
        for call in calls:
            try:
                _call(module, call)
            except _Stop:
                pass
    return grams
