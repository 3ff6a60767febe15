"""Calibration: run batches through a model, collect the inputs of its layers, and visit layers one by one under masks.

If the output of each block is the input of the next, as in language models, blocks run alone, and only one block's
inputs are in memory.

If fully_shard has split the layers, all ranks run the same batches. They gather the dense weight of one layer at a
time, and each computes a share of its rows. A sharded model runs with its own weights: masked weights overwrite
those of the current block, which are restored afterwards.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..fsdp import resetting, reshard, sharded_modules
from ..functional.linear import codes_linear
from ..functional.masks import expand_mask
from ..modules import evaluating
from ..ops.pattern import NMPattern
from ..ranks import Ranks
from ..shards import is_distributed, like_shards, local, part_of, whole
from ..unfuse import expert_groups

# Memory for the Gram matrices of a mixture's experts at a time. Smaller parts would cost more forward passes
GRAM_BYTES = 1 << 30

# (arguments, keywords) of a call of a module
Call = tuple[tuple, dict]


class Moments(NamedTuple):
    """Sums over the tokens of all batches.

    Attributes:
        gram: X^T X, float32 [K, K], of the inputs X [tokens, K] of a layer.
        cross: X^T Z, float32 [K, K], with the inputs Z [tokens, K] that the dense model gives the layer; None if they
            were not asked for, or X and Z have other tokens, as those of experts.
    """

    gram: Tensor
    cross: Tensor | None = None


# A function that improves layers with the same input, one after the other, by the input's moments
Visit = Callable[[Sequence[str], Moments], Iterator[None]]

# Layers whose inputs do not depend on each other, in groups of names with the same input tensor; only experts have
# several groups. And whether each runs once in a forward pass, all after the same tensor
Stage = tuple[list[list[str]], bool]


class StopForward(Exception):
    """Raised by a hook to end a forward pass early."""


def as_call(batch) -> Call:
    """(arguments, keywords) of a batch: of a mapping, a tuple or list, or any other object as the one argument."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def check_calibration(calibration: Iterable) -> None:
    """Raise TypeError unless it can be an iterable of batches; a tensor or a mapping is one batch, a text none."""
    if not isinstance(calibration, Iterable) or isinstance(calibration, (Tensor, Mapping, str, bytes)):
        raise TypeError(f"calibration: expected an iterable of batches, got {type(calibration).__name__}")


def calls_of(calibration: Iterable) -> list[Call]:
    """Convert batches to calls; raise unless there is at least one."""
    check_calibration(calibration)
    calls = [as_call(batch) for batch in calibration]
    if not calls:
        raise ValueError("calibration: expected at least one batch, got none")
    return calls


def run_call(module: nn.Module, call: Call):
    args, kwargs = call
    return module(*args, **kwargs)


def run_model(model: nn.Module, call: Call):
    """``run_call``; a model that fully_shard has split is in its shards afterwards."""
    with resetting(model):
        return run_call(model, call)


@contextmanager
def watching_inputs(hooks: Iterable[tuple[nn.Module, Callable[[Tensor], None]]]) -> Iterator[None]:
    """Call ``hook(x)`` before each forward of its module, with the module's input x, inside the context."""

    def before(hook):
        return lambda module, args, kwargs: hook(args[0] if args else kwargs["input"])

    handles = [module.register_forward_pre_hook(before(hook), with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_squares(model: nn.Module, layers: Mapping[str, nn.Module], calibration: Iterable) -> dict[str, Tensor]:
    """Sum of squares of each input column of each layer over the calibration batches: float32 [K] by name.

    Batches are consumed one at a time. An expert without a token gets ones, with a warning.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        squares = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()
        sums[name] = sums[name] + squares if name in sums else squares

    check_calibration(calibration)
    batches = 0
    with watching_inputs((layer, partial(add, name)) for name, layer in layers.items()):
        with torch.no_grad(), evaluating(model):
            for batch in calibration:
                run_model(model, as_call(batch))
                batches += 1
    if not batches:
        raise ValueError("calibration: expected at least one batch, got none")
    for name, squares in sums.items():
        _check_finite(name, squares)
    unseen = {name: layer for name, layer in layers.items() if name not in sums}
    _check_all_reached(model, unseen)
    _warn_of_experts(list(unseen), "get masks by magnitude", stacklevel=3)
    return sums | {name: torch.ones(layer.in_features, device=layer.weight.device) for name, layer in unseen.items()}


def input_moments(
    module: nn.Module,
    calls: Iterable[Call],
    layers: Sequence[nn.Module],
    stop: bool = False,
    dense: Sequence[Iterable[Tensor] | None] | None = None,
) -> list[Moments | None]:
    """Moments of each layer's inputs over all calls of a module; None for a layer without input.

    Args:
        stop: end a forward pass at the first input of a layer.
        dense: inputs that the dense model gives each layer, see ``layer_inputs``; None: no cross moments. A layer whose
            inputs are not as many has none.
    """
    moments: list[Moments | None] = [None] * len(layers)
    dense_inputs = [None if inputs is None else iter(inputs) for inputs in dense or [None] * len(layers)]

    def add(index: int, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        if moments[index] is None:
            gram = x.new_zeros(x.shape[1], x.shape[1])
            moments[index] = Moments(gram, None if dense_inputs[index] is None else torch.zeros_like(gram))
        moments[index].gram.addmm_(x.T, x)
        if moments[index].cross is not None:
            z = next(dense_inputs[index], None)
            if z is None or z.shape != x.shape:
                moments[index] = Moments(moments[index].gram)
            else:
                moments[index].cross.addmm_(x.T, z.float())
        if stop:
            raise StopForward

    _watch(module, calls, layers, add)
    for index, inputs in enumerate(dense_inputs):
        if moments[index] is not None and inputs is not None and next(inputs, None) is not None:
            moments[index] = Moments(moments[index].gram)
    return moments


def layer_inputs(
    module: nn.Module, calls: Iterable[Call], layers: Sequence[nn.Module], stop: bool = False
) -> list[list[Tensor]]:
    """Inputs [tokens, K] of each layer, in the order of all calls of a module, in their own dtype."""
    inputs: list[list[Tensor]] = [[] for _ in layers]

    def add(index: int, x: Tensor) -> None:
        inputs[index].append(x.reshape(-1, x.shape[-1]))
        if stop:
            raise StopForward

    _watch(module, calls, layers, add)
    return inputs


def _watch(
    module: nn.Module, calls: Iterable[Call], layers: Sequence[nn.Module], add: Callable[[int, Tensor], None]
) -> None:
    with watching_inputs((layer, partial(add, index)) for index, layer in enumerate(layers)):
        for call in calls:
            with suppress(StopForward):
                run_call(module, call)


def _check_all_reached(model: nn.Module, unseen: Mapping[str, nn.Module]) -> None:
    experts = expert_groups(model)
    if names := [name for name, layer in unseen.items() if layer not in experts]:
        raise ValueError(f"calibration: expected batches that run every layer, {names} got no input")


def _check_finite(name: str, sums: Tensor) -> None:
    if not sums.isfinite().all():
        raise ValueError(f"calibration: expected inputs whose squares are finite in float32, got others in {name}")


def _warn_of_experts(names: Sequence[str], result: str, stacklevel: int) -> None:
    if names:
        warnings.warn(
            f"calibration: {len(names)} matrices of experts got no token, such as {names[0]}, and {result}; use more "
            "batches for more experts",
            stacklevel=stacklevel,
        )


class LayerMasks:
    """Masks and refitted weights of whole layers, filled layer by layer; the model runs under those present.

    Attributes:
        layers: nn.Linear or similar modules with dense weights, by name.
        codes: group codes [out, K / M] by name, so far.
        patterns: of the codes.
        weights: refitted weights [out, K] by name, as new tensors.
        paused: whether the model runs with its dense weights, see ``dense_pass``.
        may_stop: whether a forward pass may end inside of a block.
    """

    may_stop = True

    def __init__(self, layers: Mapping[str, nn.Module], codes: Mapping[str, Tensor], patterns: Mapping[str, NMPattern]):
        self.layers = layers
        self.patterns = patterns
        self.codes = dict(codes)
        self.weights = {}
        self.paused = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run layers under the masks and refitted weights present, inside the context."""

        def forward(name: str, layer: nn.Module, input: Tensor) -> Tensor:
            # it replaces a forward whose input a hook may have moved
            input = input.to(layer.weight.device)
            if self.paused:
                return nn.functional.linear(input, layer.weight, layer.bias)
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
            for layer, instance_forward in before.items():
                del layer.forward
                if instance_forward is not None:
                    layer.forward = instance_forward

    @contextmanager
    def dense_pass(self) -> Iterator[None]:
        """Run the model with its dense weights, inside the context, which is inside of ``running``."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def enter_block(self, block: nn.Module) -> None:
        """Prepare for the layers of a block; no block before it runs again under masks."""

    def dense(self, name: str) -> Tensor:
        """Dense weight [out, K] of a layer."""
        return self.layers[name].weight.detach()

    def whole_codes(self, name: str) -> Tensor:
        """Group codes [out, K / M] of a layer."""
        return self.codes[name]

    def by_rows(self, function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Sequence[Tensor]:
        """``function(*tensors)`` of tensors [out, ...]; it must compute each row of a result from that row alone."""
        return function(*tensors)

    def put(self, name: str, codes: Tensor, weight: Tensor | None = None) -> None:
        """Set the group codes of a whole layer, and its refitted weight if there is one."""
        self.codes[name] = codes
        if weight is not None:
            self.weights[name] = weight


class ShardedMasks(LayerMasks):
    """Masks of layers that are cut over ranks: codes and weights of this rank's rows. All ranks make each call."""

    # FSDP2 frees gathered weights at the end of a block
    may_stop = False

    def __init__(self, model: nn.Module, layers, codes, patterns):
        super().__init__(layers, codes, patterns)
        self._model = model
        self._ranks = Ranks()
        # the dense weights of the current block
        self._dense: dict[str, Tensor] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run with the masked weights of the current block, and restore its dense weights afterwards."""
        with closing(self._ranks):
            self._ranks.connect()
            try:
                with resetting(self._model):
                    yield
            finally:
                self._leave_block()

    @contextmanager
    def dense_pass(self) -> Iterator[None]:
        self._put_dense()
        try:
            yield
        finally:
            reshard(self._model)
            for name in self._dense:
                self._mask(name)

    def enter_block(self, block: nn.Module) -> None:
        self._leave_block()
        inside = set(block.modules())
        for name, layer in self.layers.items():
            if layer in inside:
                self._dense[name] = local(layer.weight.detach()).clone()
                self._mask(name)

    def dense(self, name: str) -> Tensor:
        reshard(self._model)
        return whole(like_shards(self._dense[name], self.layers[name].weight))

    def whole_codes(self, name: str) -> Tensor:
        reshard(self._model)
        return whole(like_shards(self.codes[name], self.layers[name].weight))

    def by_rows(self, function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Sequence[Tensor]:
        """Compute like one process: each rank computes a share of the rows, not of its own part of the layer."""
        out = len(tensors[0])
        world = self._ranks.world_size
        if out < world:
            return self._ranks.run_on_all(function, *tensors)
        sizes = [out // world + (rank < out % world) for rank in range(world)]
        rows_of_rank = [tensor.split(sizes)[self._ranks.rank] for tensor in tensors]

        def joined(rows: Tensor) -> Tensor:
            # bytes: not every backend gathers every dtype
            flat = rows.contiguous().view(len(rows), -1).view(torch.uint8)
            padded = nn.functional.pad(flat, (0, 0, 0, max(sizes) - len(rows)))
            gathered = self._ranks.all_gather(padded.flatten()).view(world, *padded.shape)
            every = torch.cat([padded_rows[:size] for padded_rows, size in zip(gathered, sizes, strict=True)])
            return every.view(rows.dtype).view(-1, *rows.shape[1:])

        return [joined(rows) for rows in self._ranks.run_on_all(function, *rows_of_rank)]

    def put(self, name: str, codes: Tensor, weight: Tensor | None = None) -> None:
        reshard(self._model)
        like = self.layers[name].weight
        self.codes[name] = part_of(codes, like).clone()
        if weight is not None:
            self.weights[name] = part_of(weight, like).clone()
        self._mask(name)

    @torch.no_grad()
    def _mask(self, name: str) -> None:
        weight = self.weights.get(name, self._dense[name])
        kept = expand_mask(self.codes[name], self.patterns[name])
        local(self.layers[name].weight).copy_(torch.where(kept, weight, 0.0))

    @torch.no_grad()
    def _put_dense(self) -> None:
        reshard(self._model)
        for name, dense in self._dense.items():
            local(self.layers[name].weight).copy_(dense)

    def _leave_block(self) -> None:
        self._put_dense()
        self._dense.clear()


def masks_of(
    model: nn.Module, layers: Mapping[str, nn.Module], codes: Mapping[str, Tensor], patterns: Mapping[str, NMPattern]
) -> LayerMasks:
    """Make LayerMasks, or for layers that are cut over ranks ShardedMasks, with the codes of this rank."""
    if any(is_distributed(layer.weight) for layer in layers.values()):
        return ShardedMasks(model, layers, codes, patterns)
    return LayerMasks(layers, codes, patterns)


def layer_by_layer(model: nn.Module, layers: Mapping[str, nn.Module], calls: list[Call],
                   masks: LayerMasks, visit: Visit, unvisited: str,
                   progress: Callable[[int, int], None] | None, with_dense: bool = False) -> list[str]:  # fmt: skip
    """Visit layers in the order in which they run, on all batches, each under the masks of the layers before.

    In a chain of blocks only the inputs of one block and one Gram matrix are in memory; for experts of a mixture as
    many matrices as fit into GRAM_BYTES. Otherwise the whole model runs for every layer. With ``with_dense`` the dense
    model runs as well, and its inputs of the block and of the layer are in memory, and a second matrix.

    Args:
        masks: masks to run the model under.
        visit: gets the names of layers with the same input, and its moments on their device; yields after each layer.
        unvisited: for a warning, what experts without tokens get. Their names are returned.
        progress: called with (layers done, layers in all) before the first layer and after each.
        with_dense: whether moments have the cross moments with the inputs that the dense model gives.
    """
    report = progress or (lambda done, total: None)
    visited = []
    experts = expert_groups(model)
    dense_blocks = calls_by_block(model, layers, calls)
    report(0, len(layers))
    with evaluating(model), _without_cache(model), masks.running():
        for module, block_calls in calls_by_block(model, layers, calls):
            if with_dense:
                with masks.dense_pass():
                    _, dense_calls = next(dense_blocks)
            masks.enter_block(module)
            for stage, once in layers_in_order(module, block_calls, layers):
                for groups in _held_together(stage, layers):
                    # if each layer runs once, the forward pass can end at its input
                    stop = once and masks.may_stop
                    first = [layers[names[0]] for names in groups]
                    dense = None
                    # masks change which experts a token goes to
                    if with_dense and not any(layer in experts for layer in first):
                        with masks.dense_pass():
                            dense = layer_inputs(module, dense_calls, first, stop)
                    for names, moments in zip(
                        groups, input_moments(module, block_calls, first, stop, dense), strict=True
                    ):
                        # masks of earlier layers may have changed the routing, so that an expert has no token
                        if moments is None:
                            continue
                        for matrix in filter(torch.is_tensor, moments):
                            _check_finite(names[0], matrix)
                        device = layers[names[0]].weight.device
                        cross = None if moments.cross is None else moments.cross.to(device)
                        steps = visit(names, Moments(moments.gram.to(device), cross))
                        for name, _ in zip(names, steps, strict=True):
                            visited.append(name)
                            report(len(visited), len(layers))
    without_tokens = [name for name in layers if name not in set(visited)]
    _warn_of_experts(without_tokens, unvisited, stacklevel=5)
    if without_tokens:
        report(len(layers), len(layers))
    return without_tokens


def calls_by_block(
    model: nn.Module, layers: Mapping[str, nn.Module], calls: list[Call]
) -> Iterator[tuple[nn.Module, list[Call]]]:
    """Yield the blocks of a chain, each with its calls, one a batch.

    Blocks are the children of the outermost list of modules with all layers. If there is none, an output is not the
    next block's input, or FSDP2 gathers a block with others, it yields the model itself with its own calls. The calls
    of a block are computed when it is its turn, under the masks of the blocks before.
    """
    chain = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and all(layer.startswith(prefix) for layer in layers):
            chain = list(module)
            break
    recorded = _record_chain(model, chain, calls) if chain and _run_alone(model, chain) else None
    if recorded is None:
        yield model, calls
        return
    hidden, other_arguments = recorded
    for index, block in enumerate(chain):
        block_calls = [((x, *args), kwargs) for x, (args, kwargs) in zip(hidden, other_arguments[index], strict=True)]
        yield block, block_calls
        if index + 1 < len(chain):
            hidden = [_hidden_state(run_call(block, call)) for call in block_calls]


def _record_chain(
    model: nn.Module, chain: list[nn.Module], calls: list[Call]
) -> tuple[list[Tensor], list[list[Call]]] | None:
    """(inputs of the first block, one a batch; other arguments of each block, one a batch).

    None if the output of a block is not the input of the next.
    """
    hidden: list[Tensor] = []
    other_arguments: list[list[Call]] = [[] for _ in chain]
    entered = 0
    output = None

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal entered
        linked = entered == 0 or (args and args[0] is output)
        if entered == len(chain) or module is not chain[entered] or not args or not linked:
            raise StopForward
        if entered == 0:
            hidden.append(args[0])
        other_arguments[entered].append((args[1:], kwargs))
        entered += 1

    def after(module: nn.Module, args: tuple, result) -> None:
        nonlocal output
        output = _hidden_state(result)

    # before other hooks: they change the input again when the block runs alone
    handles = [block.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for block in chain]
    handles += [block.register_forward_hook(after) for block in chain]
    try:
        for call in calls:
            entered = 0
            output = None
            run_model(model, call)
            if entered < len(chain):
                return None
    except StopForward:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return hidden, other_arguments


def _run_alone(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Return whether each block can run alone: FSDP2 gathers no parameter of it together with others outside."""
    reshard(model)
    for block in blocks:
        gathered = {inner for module in sharded_modules(block) for inner in module.modules()}
        for module in block.modules():
            if module not in gathered and any(map(is_distributed, module.parameters(recurse=False))):
                return False
    return True


def _hidden_state(output):
    return output[0] if isinstance(output, (tuple, list)) else output


def layers_in_order(module: nn.Module, calls: list[Call], layers: Mapping[str, nn.Module]) -> list[Stage]:
    """Stages of a module's layers in the order in which they run.

    An expert without a token is left out; ValueError if another layer does not run.
    """
    inside = set(module.modules())
    waiting = {name: layer for name, layer in layers.items() if layer in inside}
    experts = expert_groups(module)
    runs = Counter()
    once = dict.fromkeys(waiting, True)
    # the key is the experts of a mixture, or a new object for other layers
    stages: dict[object, list[list[str]]] = {}
    last = None
    group = []

    def see(name: str, x: Tensor) -> None:
        nonlocal last, group
        runs[name] += 1
        if waiting.pop(name, None) is None:
            return
        if x is last:
            group.append(name)
        else:
            last = x
            group = [name]
            stages.setdefault(experts.get(layers[name], object()), []).append(group)

    with watching_inputs([(layers[name], partial(see, name)) for name in waiting]):
        for call in calls:
            if not waiting:
                break
            runs.clear()
            run_call(module, call)
            once = {name: once[name] and runs[name] <= 1 for name in once}
            # the next forward may reuse this one's memory, so identity proves nothing
            last = None
    _check_all_reached(module, waiting)
    in_order = []
    for groups in stages.values():
        runs_once = len(groups) == 1 and all(once[name] for name in groups[0])
        in_order.append((groups, runs_once))
    return in_order


def _held_together(groups: list[list[str]], layers: Mapping[str, nn.Module]) -> Iterator[list[list[str]]]:
    """Split the groups of a stage into parts whose Gram matrices take at most GRAM_BYTES, or one group."""
    part = []
    part_bytes = 0
    for names in groups:
        gram_bytes = 4 * layers[names[0]].weight.shape[1] ** 2
        if part and part_bytes + gram_bytes > GRAM_BYTES:
            yield part
            part = []
            part_bytes = 0
        part.append(names)
        part_bytes += gram_bytes
    yield part


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Disable a language model's cache: a block that runs again would append to it."""
    config = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True
