"""A model as a chain of blocks, and in which order the layers of a block run.

In a chain the output of one block is the input of the next, as in language models. Calls of one block can then be made
without the rest of the model, so that only one block's inputs have to be held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ..fsdp import gathers_within, resetting
from ..unfuse import expert_groups
from .calibration import Call, StopForward, check_all_reached, run_call, watching_inputs


def calls_by_block(
    model: nn.Module, layers: Mapping[str, nn.Module], calls: list[Call]
) -> Iterator[tuple[nn.Module, list[Call]]]:
    """The blocks of a chain, each with the calls that the model makes of it, one a batch.

    Where the layers stand in no chain, or FSDP2 gathers a block with others, the model itself with its own calls. A
    block's calls follow from the masks that the layers of the blocks before it have when it is asked for.
    """
    chain = find_chain(model, layers)
    recorded = record_chain(model, chain, calls) if chain and gathers_within(model, chain) else None
    if recorded is None:
        yield model, calls
        return
    hidden, others = recorded
    for index, block in enumerate(chain):
        block_calls = [((x, *args), kwargs) for x, (args, kwargs) in zip(hidden, others[index], strict=True)]
        yield block, block_calls
        if index + 1 < len(chain):
            hidden = [_hidden_state(run_call(block, call)) for call in block_calls]


def find_chain(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The children of the outermost list of modules that holds all layers; empty where there is none."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and all(layer.startswith(prefix) for layer in layers):
            return list(module)
    return []


def record_chain(
    model: nn.Module, chain: list[nn.Module], calls: list[Call]
) -> tuple[list[Tensor], list[list[Call]]] | None:
    """Run the model and record what its blocks are given.

    Returns:
        (inputs of the first block, one a batch; by block the other arguments that it is given, one a batch), or None
        if the output of some block is not the input of the next one.
    """
    recorder = _ChainRecorder(chain)
    # ahead of other hooks, which change the input of the block again when it runs by itself
    handles = [block.register_forward_pre_hook(recorder.before, with_kwargs=True, prepend=True) for block in chain]
    handles += [block.register_forward_hook(recorder.after) for block in chain]
    try:
        for call in calls:
            recorder.reached, recorder.output = 0, None
            with resetting(model):
                run_call(model, call)
            if recorder.reached < len(chain):
                return None
    except StopForward:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return recorder.hidden, recorder.others


class _ChainRecorder:
    """Hooks of the blocks of a chain.

    Attributes:
        hidden: inputs of the first block, one a batch.
        others: by block the other arguments that it was given, one a batch.
        reached: how many blocks have been entered in this forward pass.
        output: hidden state that the last block returned.
    """

    def __init__(self, chain: list[nn.Module]):
        self.chain = chain
        self.hidden: list[Tensor] = []
        self.others: list[list[Call]] = [[] for _ in chain]
        self.reached, self.output = 0, None

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        index = self.reached
        linked = index == 0 or (args and args[0] is self.output)
        if index == len(self.chain) or module is not self.chain[index] or not args or not linked:
            raise StopForward
        if index == 0:
            self.hidden.append(args[0])
        self.others[index].append((args[1:], kwargs))
        self.reached += 1

    def after(self, module: nn.Module, args: tuple, output) -> None:
        self.output = _hidden_state(output)


def _hidden_state(output):
    """The hidden state among what a block returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


class Stage(NamedTuple):
    """Layers whose inputs depend on none of each other.

    Attributes:
        groups: names of layers that are given the same tensor; several groups are of experts.
        once: whether each layer runs once in a forward pass, and all of them behind the same tensor.
    """

    groups: list[list[str]]
    once: bool


def layers_in_order(module: nn.Module, calls: list[Call], layers: Mapping[str, nn.Module]) -> list[Stage]:
    """Layers of a module in the order in which they run.

    Args:
        module: holds some of the layers.
        calls: of the module.
        layers: by name. An expert that no token is routed to stands in no stage.

    Raises:
        ValueError: if another layer of ``module`` is not reached.
    """
    inside = set(module.modules())
    waiting = {name: layer for name, layer in layers.items() if layer in inside}
    order, runs = _Order(expert_groups(module)), Counter()

    def hook(name: str):
        def see(x: Tensor) -> None:
            runs[name] += 1
            if waiting.pop(name, None) is not None:
                order.add(name, layers[name], x)

        return see

    once = dict.fromkeys(waiting, True)
    with watching_inputs([(layers[name], hook(name)) for name in waiting]):
        for call in calls:
            if not waiting:
                break
            runs.clear()
            run_call(module, call)
            once = {name: once[name] and runs[name] <= 1 for name in once}
            order.end_forward()
    check_all_reached(module, waiting)
    return [
        Stage(groups, len(groups) == 1 and all(once[name] for name in groups[0])) for groups in order.stages.values()
    ]


class _Order:
    """Stages as layers are seen for the first time.

    Attributes:
        stages: groups of names; by the experts' layers that they are among, else by a key of their own.
    """

    def __init__(self, experts: Mapping[nn.Module, tuple[nn.Module, ...]]):
        self.experts = experts
        self.stages: dict[object, list[list[str]]] = {}
        self._input: Tensor | None = None
        self._group: list[str] = []

    def add(self, name: str, layer: nn.Module, x: Tensor) -> None:
        if self._input is x:
            self._group.append(name)
            return
        self._input, self._group = x, [name]
        self.stages.setdefault(self.experts.get(layer, object()), []).append(self._group)

    def end_forward(self) -> None:
        # the next forward's tensors may take the memory of this one's
        self._input = None
