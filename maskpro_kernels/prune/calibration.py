"""Calibration: how a model takes batches, what its layers see then, and a model run layer by layer under masks.

Where the output of one block is the input of the next, as in language models, calls of one block are made without the
rest of the model, so that only one block's inputs are held.

Of layers that fully_shard has cut, all ranks run the same batches. Of one layer at a time they gather the dense weight,
and each works on a share of its rows. A cut model runs with the weights that it holds: while a block is worked on, its
weights are overwritten by masked ones, and put back behind it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn

from ..fsdp import gathers_within, is_distributed, like_shards, local, part_of, resetting, resharded, whole
from ..functional.linear import codes_linear
from ..functional.masks import expand_mask
from ..modules import evaluating
from ..ops.pattern import NMPattern
from ..ranks import Ranks
from ..unfuse import expert_groups

# How much memory the Gram matrices of a mixture's experts may take together: each further part is a forward pass more
GRAM_BYTES = 1 << 30

# The arguments and keywords by which a module is called
Call = tuple[tuple, dict]

# Improves layers with the same input on its Gram matrix, one after the other
Visit = Callable[[Sequence[str], Tensor], Iterator[None]]

# Layers whose inputs depend on none of each other: groups of names that are given the same tensor, several of experts
# alone; and if each runs once in a forward pass, all of them behind the same tensor
Stage = tuple[list[list[str]], bool]


class StopForward(Exception):
    """Raised by a hook when a forward pass has reached what was wanted of it."""


def as_call(batch) -> Call:
    """(arguments, keywords) by which a model takes a batch: a mapping, a tuple or list, or anything else as it is."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def check_calibration(calibration: Iterable) -> None:
    """Raise TypeError unless it can be an iterable of batches; a tensor or a mapping is one batch."""
    if not isinstance(calibration, Iterable) or isinstance(calibration, (Tensor, Mapping)):
        raise TypeError(f"calibration: expected an iterable of batches, got {type(calibration).__name__}")


def calls_of(calibration: Iterable) -> list[Call]:
    """The calls by which a model takes all batches; raises unless there is one."""
    check_calibration(calibration)
    calls = [as_call(batch) for batch in calibration]
    if not calls:
        raise ValueError("calibration: expected at least one batch, got none")
    return calls


def run_call(module: nn.Module, call: Call):
    args, kwargs = call
    return module(*args, **kwargs)


@contextmanager
def watching_inputs(hooks: Iterable[tuple[nn.Module, Callable[[Tensor], None]]]) -> Iterator[None]:
    """While it lasts, ``hook(x)`` is called before every forward pass of its module, with the module's input x."""

    def before(hook):
        return lambda module, args, kwargs: hook(args[0] if args else kwargs["input"])

    handles = [module.register_forward_pre_hook(before(hook), with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_squares(model: nn.Module, layers: Mapping[str, nn.Module], calibration: Iterable) -> dict[str, Tensor]:
    """Sum of squares of every input column of every layer over the calibration batches, float32 [K] by name.

    Batches are taken one at a time. Of an expert that none of their tokens is routed to, ones, with a warning.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        squares = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()
        sums[name] = sums[name] + squares if name in sums else squares

    check_calibration(calibration)
    batches = 0
    with watching_inputs((layer, partial(add, name)) for name, layer in layers.items()):
        with torch.no_grad(), evaluating(model), resetting(model):
            for batch in calibration:
                run_call(model, as_call(batch))
                batches += 1
    if not batches:
        raise ValueError("calibration: expected at least one batch, got none")
    for name, squares in sums.items():
        _check_finite(name, squares)
    unseen = {name: layer for name, layer in layers.items() if name not in sums}
    _check_all_reached(model, unseen)
    _warn_of_experts(list(unseen), "get masks by magnitude", stacklevel=3)
    return sums | {name: torch.ones(layer.in_features, device=layer.weight.device) for name, layer in unseen.items()}


def gram_matrices(
    module: nn.Module, calls: Iterable[Call], layers: Sequence[nn.Module], stop: bool = False
) -> list[Tensor | None]:
    """X^T X, float32 [K, K], of the inputs X of each layer over all calls of a module; None of one that saw no input.

    ``stop``: end a forward pass at the first input of a layer.
    """
    grams: list[Tensor | None] = [None] * len(layers)

    def add(index: int, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        if grams[index] is None:
            grams[index] = x.new_zeros(x.shape[1], x.shape[1])
        grams[index].addmm_(x.T, x)
        if stop:
            raise StopForward

    with watching_inputs((layer, partial(add, index)) for index, layer in enumerate(layers)):
        for call in calls:
            with suppress(StopForward):
                run_call(module, call)
    return grams


def _check_all_reached(model: nn.Module, unseen: Mapping[str, nn.Module]) -> None:
    experts = expert_groups(model)
    if names := [name for name, layer in unseen.items() if layer not in experts]:
        raise ValueError(f"calibration: expected batches that reach every layer, {names} saw no input")


def _check_finite(name: str, sums: Tensor) -> None:
    if not sums.isfinite().all():
        raise ValueError(f"calibration: expected inputs whose squares are finite in float32, got others in {name}")


def _warn_of_experts(names: Sequence[str], result: str, stacklevel: int) -> None:
    if names:
        warnings.warn(
            f"calibration: {len(names)} matrices of experts saw no token, such as {names[0]}, and {result}; more "
            "batches reach more experts",
            stacklevel=stacklevel,
        )


class LayerMasks:
    """Masks and refitted weights of whole layers as they are found, and the model that runs under those so far.

    Attributes:
        layers: nn.Linear or alike, by name, with their dense weights.
        codes: group codes [out, K / M] by name, those there are so far.
        patterns: of the codes.
        weights: refitted ones [out, K] by name, as tensors of their own.
        may_stop: a forward pass may end inside of a block.
    """

    may_stop = True

    def __init__(self, layers: Mapping[str, nn.Module], codes: Mapping[str, Tensor], patterns: Mapping[str, NMPattern]):
        self.layers, self.patterns = layers, patterns
        self.codes, self.weights = dict(codes), {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """With layers that multiply under the masks, and with the refitted weights, that there are so far."""

        def forward(name: str, layer: nn.Module, input: Tensor) -> Tensor:
            # in place of a forward to which a hook might have brought its input
            input = input.to(layer.weight.device)
            weight = self.weights.get(name, layer.weight)
            if name not in self.codes:
                return nn.functional.linear(input, weight, layer.bias)
            return codes_linear(input, weight, self.codes[name], layer.bias, pattern=self.patterns[name])

        before = {layer: layer.__dict__.get("forward") for layer in self.layers.values()}
        try:
            for name, layer in self.layers.items():
                layer.forward = partial(forward, name, layer)
            yield
        finally:
            for layer, own in before.items():
                del layer.forward
                if own is not None:
                    layer.forward = own

    def enter_block(self, block: nn.Module) -> None:
        """Prepare for the layers of a block; no block before it runs again."""

    def dense(self, name: str) -> Tensor:
        """The dense weight [out, K]."""
        return self.layers[name].weight.detach()

    def whole_codes(self, name: str) -> Tensor:
        """The group codes [out, K / M]."""
        return self.codes[name]

    def by_rows(self, function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Sequence[Tensor]:
        """``function(*tensors)`` of tensors [out, ...], where each row of a result follows from that row of these."""
        return function(*tensors)

    def put(self, name: str, codes: Tensor, weight: Tensor | None = None) -> None:
        """Give a layer group codes, and a refitted weight if there is one: whole ones."""
        self.codes[name] = codes
        if weight is not None:
            self.weights[name] = weight


class ShardedMasks(LayerMasks):
    """Masks of layers that ranks share: codes and weights of what this rank has. All ranks come to each call."""

    def __init__(self, model: nn.Module, layers, codes, patterns):
        super().__init__(layers, codes, patterns)
        self._model = model
        # FSDP2 frees what it has gathered where a block ends
        self.may_stop = not resharded(model)
        self._ranks = Ranks()
        # of the block that is worked on, dense
        self._dense: dict[str, Tensor] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """With weights of which those of one block are masked; they are dense again behind it."""
        with closing(self._ranks):
            self._ranks.connect()
            try:
                with resetting(self._model):
                    yield
            finally:
                self._leave_block()

    def enter_block(self, block: nn.Module) -> None:
        self._leave_block()
        inside = set(block.modules())
        for name, layer in self.layers.items():
            if layer in inside:
                self._dense[name] = local(layer.weight.detach()).clone()
                self._mask(name)

    def dense(self, name: str) -> Tensor:
        resharded(self._model)
        return whole(like_shards(self._dense[name], self.layers[name].weight))

    def whole_codes(self, name: str) -> Tensor:
        resharded(self._model)
        return whole(like_shards(self.codes[name], self.layers[name].weight, self.patterns[name].m))

    def by_rows(self, function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Sequence[Tensor]:
        """As by one process; each rank works on a share of the rows, whatever its own part of the layer."""
        out, world = len(tensors[0]), self._ranks.world
        if out < world:
            return self._ranks.all_of(lambda: function(*tensors))
        sizes = [out // world + (rank < out % world) for rank in range(world)]
        own = [tensor.split(sizes)[self._ranks.rank] for tensor in tensors]

        def joined(rows: Tensor) -> Tensor:
            # as bytes: not every backend gathers every dtype
            flat = rows.contiguous().view(len(rows), -1).view(torch.uint8)
            padded = nn.functional.pad(flat, (0, 0, 0, max(sizes) - len(rows)))
            parts = self._ranks.gather_vectors(padded.flatten()).view(world, *padded.shape)
            every = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
            return every.view(rows.dtype).view(-1, *rows.shape[1:])

        return [joined(rows) for rows in self._ranks.all_of(lambda: function(*own))]

    def put(self, name: str, codes: Tensor, weight: Tensor | None = None) -> None:
        resharded(self._model)
        like = self.layers[name].weight
        self.codes[name] = part_of(codes, like, self.patterns[name].m).clone()
        if weight is not None:
            self.weights[name] = part_of(weight, like).clone()
        self._mask(name)

    @torch.no_grad()
    def _mask(self, name: str) -> None:
        weight = self.weights.get(name, self._dense[name])
        kept = expand_mask(self.codes[name], self.patterns[name])
        local(self.layers[name].weight).copy_(torch.where(kept, weight, 0.0))

    @torch.no_grad()
    def _leave_block(self) -> None:
        resharded(self._model)
        for name, dense in self._dense.items():
            local(self.layers[name].weight).copy_(dense)
        self._dense.clear()


def masks_of(
    model: nn.Module, layers: Mapping[str, nn.Module], codes: Mapping[str, Tensor], patterns: Mapping[str, NMPattern]
) -> LayerMasks:
    """Masks of whole layers, or of layers that ranks share, whose codes are those of this rank."""
    if any(is_distributed(layer.weight) for layer in layers.values()):
        return ShardedMasks(model, layers, codes, patterns)
    return LayerMasks(layers, codes, patterns)


def layer_by_layer(model: nn.Module, layers: Mapping[str, nn.Module], calls: list[Call],
                   masks: LayerMasks, visit: Visit, unvisited: str,
                   progress: Callable[[int, int], None] | None) -> list[str]:  # fmt: skip
    """Visit the layers in the order in which they run, on all batches, under the masks of those before.

    In a chain of blocks only the inputs of one block and one Gram matrix are held; of the experts of a mixture as many
    as fit into GRAM_BYTES. Else the whole model runs for every layer.

    Args:
        masks: under which the model runs.
        visit: takes names of layers with the same input, and its Gram matrix on their device; yields after each layer.
        unvisited: for the warning, what becomes of experts that no token has reached. Their names are returned.
        progress: called with how many layers are done, and of how many, before the first and after each.
    """
    report, visited = progress or (lambda done, total: None), []
    report(0, len(layers))
    with evaluating(model), _without_cache(model), masks.running():
        for module, block_calls in calls_by_block(model, layers, calls):
            masks.enter_block(module)
            for stage, once in layers_in_order(module, block_calls, layers):
                for groups in _held_together(stage, layers):
                    # a layer that runs once needs nothing of the forward pass behind its input
                    stop, first = once and masks.may_stop, [layers[names[0]] for names in groups]
                    for names, gram in zip(groups, gram_matrices(module, block_calls, first, stop), strict=True):
                        # masks before may have routed an expert's last token away from it
                        if gram is None:
                            continue
                        _check_finite(names[0], gram)
                        steps = visit(names, gram.to(layers[names[0]].weight.device))
                        for name, _ in zip(names, steps, strict=True):
                            visited.append(name)
                            report(len(visited), len(layers))
    left = [name for name in layers if name not in set(visited)]
    _warn_of_experts(left, unvisited, stacklevel=5)
    if left:
        report(len(layers), len(layers))
    return left


def calls_by_block(
    model: nn.Module, layers: Mapping[str, nn.Module], calls: list[Call]
) -> Iterator[tuple[nn.Module, list[Call]]]:
    """The blocks of a chain, each with the calls that the model makes of it, one a batch.

    The blocks are the children of the outermost list of modules that holds all layers. Where there is none, an output
    is not the next one's input, or FSDP2 gathers a block with others: the model itself with its own calls. A block's
    calls follow from the masks that the layers of the blocks before it have when it is asked for.
    """
    chain = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and all(layer.startswith(prefix) for layer in layers):
            chain = list(module)
            break
    recorded = _record_chain(model, chain, calls) if chain and gathers_within(model, chain) else None
    if recorded is None:
        yield model, calls
        return
    hidden, others = recorded
    for index, block in enumerate(chain):
        block_calls = [((x, *args), kwargs) for x, (args, kwargs) in zip(hidden, others[index], strict=True)]
        yield block, block_calls
        if index + 1 < len(chain):
            hidden = [_hidden_state(run_call(block, call)) for call in block_calls]


def _record_chain(
    model: nn.Module, chain: list[nn.Module], calls: list[Call]
) -> tuple[list[Tensor], list[list[Call]]] | None:
    """(inputs of the first block, one a batch; by block the other arguments that it is given, one a batch).

    None if the output of some block is not the input of the next one.
    """
    hidden: list[Tensor] = []
    others: list[list[Call]] = [[] for _ in chain]
    entered, output = 0, None

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal entered
        linked = entered == 0 or (args and args[0] is output)
        if entered == len(chain) or module is not chain[entered] or not args or not linked:
            raise StopForward
        if entered == 0:
            hidden.append(args[0])
        others[entered].append((args[1:], kwargs))
        entered += 1

    def after(module: nn.Module, args: tuple, result) -> None:
        nonlocal output
        output = _hidden_state(result)

    # ahead of other hooks, which change the input of the block again when it runs by itself
    handles = [block.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for block in chain]
    handles += [block.register_forward_hook(after) for block in chain]
    try:
        for call in calls:
            entered, output = 0, None
            with resetting(model):
                run_call(model, call)
            if entered < len(chain):
                return None
    except StopForward:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return hidden, others


def _hidden_state(output):
    return output[0] if isinstance(output, (tuple, list)) else output


def layers_in_order(module: nn.Module, calls: list[Call], layers: Mapping[str, nn.Module]) -> list[Stage]:
    """Those of the layers that a module holds, in the order in which they run.

    An expert that no token is routed to is left out; ValueError if another layer is not reached.
    """
    inside = set(module.modules())
    waiting = {name: layer for name, layer in layers.items() if layer in inside}
    experts, runs, once = expert_groups(module), Counter(), dict.fromkeys(waiting, True)
    # by the experts' layers that they are among, else by a key of their own
    stages: dict[object, list[list[str]]] = {}
    last, group = None, []

    def see(name: str, x: Tensor) -> None:
        nonlocal last, group
        runs[name] += 1
        if waiting.pop(name, None) is None:
            return
        if x is last:
            group.append(name)
        else:
            last, group = x, [name]
            stages.setdefault(experts.get(layers[name], object()), []).append(group)

    with watching_inputs([(layers[name], partial(see, name)) for name in waiting]):
        for call in calls:
            if not waiting:
                break
            runs.clear()
            run_call(module, call)
            once = {name: once[name] and runs[name] <= 1 for name in once}
            # the next forward's tensors may take the memory of this one's
            last = None
    _check_all_reached(module, waiting)
    return [(groups, len(groups) == 1 and all(once[name] for name in groups[0])) for groups in stages.values()]


def _held_together(groups: list[list[str]], layers: Mapping[str, nn.Module]) -> Iterator[list[list[str]]]:
    """Groups of a stage in parts whose Gram matrices take at most GRAM_BYTES, and at least one."""
    part, held = [], 0
    for names in groups:
        own = 4 * layers[names[0]].weight.shape[1] ** 2
        if part and held + own > GRAM_BYTES:
            yield part
            part, held = [], 0
        part.append(names)
        held += own
    yield part


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
