"""Modules that multiply with matrices of their own, written as nn.Linear layers, and back again.

Masks are learned on nn.Linear layers. Some modules hold such matrices in another way: transposed (``Conv1DForm``), or
all experts of a mixture in one parameter (``ExpertsForm``). Here they are taken apart, so that everything that knows
nn.Linear knows them, and put together again for a dense checkpoint, whose names and shapes are then those that the
model's authors gave it.

Modules are put in the place of others here, also beside adapters of peft, whose layers are recognised without an
import of it.

A module is *built* as its authors wrote it, or *taken apart*. A new form is a class like those, and an entry in
``FORMS``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .fsdp import is_distributed, resharded

# Attribute of a layer that stands for a module of another kind: the class to build again
BUILT_AS = "built_as"
# Why a layer within an adapter gets no mask
ADAPTER = "adapter of peft"
# What transformers' decorator of experts gives them
MARKS = ("is_transposed", "has_gate", "_apply_gate", "num_experts", "config")
CHILD = "linears"
# Of a parameter whose rows are those of two matrices, one behind the other: what these are called
HALVES = {"gate_up_proj": ("gate_proj", "up_proj")}
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
HOOKS = "has hooks, which its replacement would lose"
OWN_FORWARD = "has a forward of its own, which its replacement would lose"


class Views:
    """Parameters that are views of others, one for each part: what was shared stays shared."""

    def __init__(self):
        self._made: dict[tuple[int, Hashable], tuple[nn.Parameter, nn.Parameter]] = {}

    def of(self, parameter: nn.Parameter, part: Hashable, view: Callable[[Tensor], Tensor]) -> nn.Parameter:
        """``view(parameter)``, a leaf with the parameter's memory; the same one when it is asked for again."""
        # the whole one is kept too, or its id might become another's; of `data`, for views of `detach` count changes
        # together, and a step that changes one in backward would spoil the others for autograd
        made = self._made.setdefault(
            (id(parameter), part), (parameter, nn.Parameter(view(parameter.data), parameter.requires_grad))
        )
        return made[1]


class Joins:
    """Parameters that are made of several: what was shared stays shared."""

    def __init__(self):
        self._made: dict[tuple[int, ...], nn.Parameter] = {}

    def of(self, parameters: list[nn.Parameter], join: Callable[[list[Tensor]], Tensor]) -> nn.Parameter:
        """``join(parameters)``, frozen where all are; the same one when it is asked for again."""
        key = tuple(map(id, parameters))
        if key not in self._made:
            tensor = join([parameter.detach() for parameter in parameters])
            self._made[key] = nn.Parameter(tensor, any(parameter.requires_grad for parameter in parameters))
        return self._made[key]


class Form:
    """One kind of module, built and taken apart.

    Attributes:
        in_place: the module itself changes, so that its hooks stay; else another takes its place.
        by_forward: an adapter of peft beside it needs no more of it than its forward.

    Methods of a form beside these:
        is_built(module): if it is of that kind, built.
        matrices(module): functions that give its matrices as views [..., K], by the names of its parameters.
        take_apart(module, views): (its replacement, or the module itself; what undoes a change of the module itself).
        parts(module): the nn.Linear layers, or their replacements, of one that was taken apart; None of another.
        put_together(module, joins): the module built, from nn.Linear layers.
    """

    in_place = by_forward = False

    def reason_against(self, module: nn.Module) -> str | None:
        """Why a module of that kind is not taken apart; None where it can be."""
        return None


def is_conv1d(module: nn.Module) -> bool:
    """True of transformers' Conv1D, which stores its weight transposed; without an import of transformers."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def linear(weight: nn.Parameter, bias: nn.Parameter | None, training: bool) -> nn.Linear:
    """An nn.Linear of these parameters."""
    rows, k = weight.shape
    layer = nn.Linear(k, rows, bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer.train(training)


class Conv1DForm(Form):
    """transformers' Conv1D, of GPT-2 and its kin: an nn.Linear whose weight is stored transposed, [K, out].

    The layer that stands for it has its name, and shares its memory by a transposed view. The class to build again is
    an attribute of the layer, which ``replace_modules`` hands on.
    """

    by_forward = True

    def is_built(self, module: nn.Module) -> bool:
        return is_conv1d(module)

    def matrices(self, module: nn.Module) -> dict[str, Callable[[], Tensor]]:
        return {"weight": lambda: module.weight.T}

    def take_apart(self, module: nn.Module, views: Views) -> tuple[nn.Module, Callable[[], None]]:
        layer = linear(views.of(module.weight, "transposed", lambda weight: weight.T), module.bias, module.training)
        setattr(layer, BUILT_AS, type(module))
        return layer, lambda: None

    def parts(self, module: nn.Module) -> list[nn.Module] | None:
        return [module] if hasattr(module, BUILT_AS) else None

    def put_together(self, module: nn.Module, joins: Joins) -> nn.Module:
        rows, k = module.weight.shape
        with torch.device("meta"):
            built = getattr(module, BUILT_AS)(rows, k)
        built.weight = joins.of([module.weight], lambda weights: weights[0].T.contiguous())
        built.bias = module.bias
        return built.train(module.training)


class ExpertLinears(nn.ModuleDict):
    """The layers of all experts, [out, K] each, in a list by the name of what they multiply with.

    ``sources`` has the names of the lists that a parameter has become, ``config`` is that of the experts before.
    """

    def __init__(self, lists: dict[str, nn.ModuleList], sources: dict[str, tuple[str, ...]], config):
        super().__init__(lists)
        self.sources, self.config = sources, config

    def of(self, parameter: str) -> list[nn.ModuleList]:
        return [self[name] for name in self.sources[parameter]]


class ExpertWeights:
    """Stands where the parameter of all experts was."""

    # transformers would give it random values
    _is_hf_initialized = True

    def __init__(self, lists: list[nn.ModuleList]):
        self.lists = lists

    def __getitem__(self, expert) -> ExpertWeight:
        return ExpertWeight([layers[int(expert)] for layers in self.lists])


class ExpertWeight:
    """Stands for the matrix of one expert in a product, which its layers make."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if len(args) >= 2 and isinstance(args[1], cls) and not kwargs:
            x, weight, *bias = args
            # of a linear product [out, K], of another one [K, out]; a layer is one of the two
            if func is nn.functional.linear or (func in PRODUCTS and not bias):
                parts = [layer(x) for layer in weight.layers]
                y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
                return y + bias[0] if bias and bias[0] is not None else y
        raise TypeError(f"experts: expected a product with the matrix of one, got {getattr(func, '__name__', func)}")


class Fusion(NamedTuple):
    """How a parameter holds the matrices of experts.

    Attributes:
        parts: of how many matrices an expert's rows are made, one behind the other.
        transposed: true where it is [experts, K, out]; else it is [experts, out, K].
    """

    parts: int
    transposed: bool

    def apart(self, fused: Tensor) -> Tensor:
        """A view [parts, experts, out / parts, K]."""
        rows = 2 if self.transposed else 1
        single = fused.unflatten(rows, (self.parts, -1)).movedim(rows, 0)
        return single.mT if self.transposed else single

    def together(self, single: Sequence[Tensor]) -> Tensor:
        """A new tensor of matrices: those of the first part of all experts, then those of the next one."""
        experts, (rows, k), first = len(single) // self.parts, single[0].shape, single[0]
        shape = (experts, k, self.parts * rows) if self.transposed else (experts, self.parts * rows, k)
        fused = torch.empty(shape, dtype=first.dtype, device=first.device)
        views = self.apart(fused)
        for place, matrix in enumerate(single):
            views[divmod(place, experts)].copy_(matrix)
        return fused


def _fusion(module: nn.Module, name: str) -> Fusion:
    """How a parameter of experts holds their matrices."""
    halves = name in HALVES and module.has_gate and _gate_stands_ahead(module)
    return Fusion(len(HALVES[name]) if halves else 1, module.is_transposed)


@torch.no_grad()
def _gate_stands_ahead(module: nn.Module) -> bool:
    """True if all outputs of the gate stand ahead of those of up; else they take turns.

    Not every transformers has a flag for it. Of four outputs the second one belongs to the first result where they take
    turns.
    """
    one, other = module._apply_gate(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0]], device="cpu"))
    return bool(one[0] == other[0])


class ExpertsForm(Form):
    """transformers' experts of a mixture: one parameter [experts, out, K] for the matrices of all.

    Their eager forward multiplies with one expert's matrix after the other, ``linear(x, self.gate_up_proj[expert])``
    or, of parameters [experts, K, out], ``x @ self.gate_up_proj[expert]``. The parameter's place is taken by
    ``ExpertWeights``, and the product is then that of the expert's layers: one, or where gate's rows stand ahead of
    up's a layer of each. The experts stay in their place, run eagerly, and hold the layers in their child ``linears``.
    """

    in_place = True

    def is_built(self, module: nn.Module) -> bool:
        return all(hasattr(module, mark) for mark in MARKS) and bool(self._fused(module))

    def _fused(self, module: nn.Module) -> dict[str, nn.Parameter]:
        own = module.named_parameters(recurse=False)
        # where they are spread over ranks, it counts those of one
        spread = getattr(module, "_is_expert_parallel", False)
        return {name: x for name, x in own if x.dim() == 3 and (spread or len(x) == module.num_experts)}

    def reason_against(self, module: nn.Module) -> str | None:
        if getattr(module, "_is_expert_parallel", False):
            return "its experts are spread over devices"
        fused = self._fused(module)
        parameter = next(iter(fused.values()))
        # one on meta has no values to choose an expert by, and a checkpoint that names it was made of one that has
        if parameter.is_meta:
            return None
        # one token through one expert has to come out the same by ``ExpertWeights``
        with torch.no_grad(), suppress(Exception):
            token = parameter.new_ones(1, parameter.shape[1 if module.is_transposed else 2])
            call = token, torch.zeros(1, 1, dtype=torch.int64, device=token.device), token[:, :1]
            expected = type(module).forward.__wrapped__(module, *call)
            undo = self._take_apart(module, fused, Views())
            try:
                if torch.allclose(type(module).forward(module, *call), expected, rtol=1e-2, atol=1e-2):
                    return None
            finally:
                undo()
        return "its forward does more with the matrices than multiply"

    def matrices(self, module: nn.Module) -> dict[str, Callable[[], Tensor]]:
        def view(name: str) -> Tensor:
            return getattr(module, name).mT if module.is_transposed else getattr(module, name)

        return {name: partial(view, name) for name in self._fused(module)}

    def take_apart(self, module: nn.Module, views: Views) -> tuple[nn.Module, Callable[[], None]]:
        return module, self._take_apart(module, self._fused(module), views)

    def _take_apart(self, module: nn.Module, fused: dict[str, nn.Parameter], views: Views) -> Callable[[], None]:
        config, training, before = module.config, module.training, dict(module._parameters)
        lists, sources = {}, {}
        for name, parameter in fused.items():
            how = _fusion(module, name)

            def layer(part: int, expert: int, parameter=parameter, how=how) -> nn.Linear:
                view = views.of(parameter, (how, part, expert), lambda fused: how.apart(fused)[part, expert])
                return linear(view, None, training)

            parts = [[layer(part, expert) for expert in range(len(parameter))] for part in range(how.parts)]
            sources[name] = (name,) if how.parts == 1 else HALVES[name]
            lists |= dict(zip(sources[name], map(nn.ModuleList, parts), strict=True))
        linears = ExpertLinears(lists, sources, config).train(training)
        for name in fused:
            del module._parameters[name]
            setattr(module, name, ExpertWeights(linears.of(name)))
        setattr(module, CHILD, linears)
        # the other ways to run experts take the parameter as a whole
        module.config = copy.copy(config)
        module.config._experts_implementation_internal = "eager"

        def undo() -> None:
            self._remove_layers(module)
            module._parameters = before

        return undo

    def _remove_layers(self, module: nn.Module) -> ExpertLinears:
        linears = getattr(module, CHILD)
        module.config = linears.config
        for name in (CHILD, *linears.sources):
            delattr(module, name)
        return linears

    def parts(self, module: nn.Module) -> list[nn.Module] | None:
        lists = getattr(module, CHILD, None)
        return [layer for layers in lists.values() for layer in layers] if isinstance(lists, ExpertLinears) else None

    def put_together(self, module: nn.Module, joins: Joins) -> nn.Module:
        linears = self._remove_layers(module)
        for name in linears.sources:
            weights = [layer.weight for layer in chain(*linears.of(name))]
            module.register_parameter(name, joins.of(weights, _fusion(module, name).together))
        return module


def expert_groups(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """For each layer of an expert, those of all experts of the same parameter: none of them feeds another."""
    found = [module for module in model.modules() if isinstance(module, ExpertLinears)]
    groups = (tuple(chain(*linears.of(name))) for linears in found for name in linears.sources)
    return {layer: layers for layers in groups for layer in layers}


FORMS: tuple[Form, ...] = (Conv1DForm(), ExpertsForm())


def as_linears(model: nn.Module, names: Collection[str] | None = None) -> dict[str, str]:
    """Take modules apart into nn.Linear layers, in place. These share the memory of the parameters that there were.

    What the model computes stays as it is, up to the rounding of products. Experts run one after the other. It is for a
    while: a checkpoint of a dense model is to be written of what is built, see ``as_built``.

    Args:
        model: holds the modules; is none of them itself.
        names: of the modules to take apart. Default: all that can be.

    Returns:
        Names of modules that could not be taken apart, each with the reason.

    Raises:
        ValueError: if one of ``names`` is of no module that can be taken apart. The model is then as it was.
    """
    return _take_apart(model, names)[0]


# (form, module as it was, what stands for it now, what undoes a change of the module itself)
Done = tuple[Form, nn.Module, nn.Module, Callable[[], None]]


def _take_apart(model: nn.Module, names: Collection[str] | None) -> tuple[dict[str, str], list[Done]]:
    found = {
        name: (form, module)
        for name, module in model.named_modules()
        if name
        for form in FORMS
        if form.is_built(module)
    }
    beside = {layer.get_base_layer() for layer in model.modules() if _has_adapters(layer)}
    # of what FSDP2 has cut, the parameters are DTensors then
    resharded(model)
    reasons = {name: _reason_against(form, module, beside) for name, (form, module) in found.items()}
    against = {name: reason for name, reason in reasons.items() if reason}
    for name in names or ():
        if name not in found or name in against:
            raise ValueError(
                f"names: expected modules that can be taken apart, got {name!r}: {against.get(name, 'it is none')}"
            )
    done: list[Done] = []
    views = Views()
    try:
        for name, (form, module) in found.items():
            if name not in against and (names is None or name in names):
                after, undo = form.take_apart(module, views)
                done.append((form, module, after, undo))
        replace_modules(model, {id(before): after for _, before, after, _ in done if after is not before})
    except BaseException:
        _undo(model, done)
        raise
    return against, done


def _undo(model: nn.Module, done: list[Done]) -> None:
    """Put back the very modules and parameters that were there, but where a layer is no nn.Linear any more."""
    back = {}
    for form, before, after, undo in done:
        if _is_dense(form.parts(after)):
            undo()
            if after is not before:
                back[id(after)] = before
    replace_modules(model, back)


@contextmanager
def in_linear_form(model: nn.Module) -> Iterator[dict[str, str]]:
    """A model taken apart while it lasts; what has got no sparse layer then is as before, the same parameters.

    Weights may be written into, but not moved or cast. Yields the names of modules that could not be taken apart, each
    with the reason.
    """
    against, done = _take_apart(model, None)
    try:
        yield against
    finally:
        _undo(model, done)


def as_built(model: nn.Module) -> None:
    """Build again what was taken apart, in place, where all of its layers are nn.Linear; parameters are new ones."""
    back, joins = {}, Joins()
    resharded(model)
    for _, form, module in list(_taken_apart(model)):
        if _is_dense(form.parts(module)):
            built = form.put_together(module, joins)
            if built is not module:
                back[id(module)] = built
    replace_modules(model, back)


class Matrix(NamedTuple):
    """A parameter of a model that can have a mask.

    Attributes:
        module: that holds it.
        get: gives it as a view [..., K], looked up anew.
    """

    module: nn.Module
    get: Callable[[], Tensor]


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Those of nn.Linear layers, and of modules that can be taken apart, by the names of the parameters."""
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Linear):
            found[f"{prefix}weight"] = Matrix(module, partial(getattr, module, "weight"))
        for form in (form for form in FORMS if form.is_built(module)):
            found |= {f"{prefix}{own}": Matrix(module, get) for own, get in form.matrices(module).items()}
    return found


def taken_apart(model: nn.Module) -> list[str]:
    return [name for name, _, _ in _taken_apart(model)]


def _taken_apart(model: nn.Module) -> Iterator[tuple[str, Form, nn.Module]]:
    for name, module in model.named_modules():
        for form in FORMS:
            if form.parts(module) is not None:
                yield name, form, module


def _reason_against(form: Form, module: nn.Module, beside: set[nn.Module]) -> str | None:
    if module in beside and not form.by_forward:
        return "an adapter of peft beside it reads its parameters"
    if any(map(is_distributed, module.parameters(recurse=False))):
        return "its parameter is cut over ranks: convert it ahead of fully_shard"
    lost = lost_with(module)
    return form.reason_against(module) or (None if form.in_place and lost == HOOKS else lost)


def lost_with(module: nn.Module) -> str | None:
    """Hooks or a forward of its own that a module has, and another one in its place would not; accelerate's stay."""
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        return OWN_FORWARD
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return HOOKS if any(getattr(module, name) for name in names) else None


def is_linear(module: nn.Module) -> bool:
    """True of nn.Linear, and of a subclass that adds a forward alone, which computes x W^T + b, such as Falcon's."""
    kind = type(module)
    if kind is nn.Linear or kind.__base__ is not nn.Linear or {x for x in vars(kind) if x[:2] != "__"} != {"forward"}:
        return kind is nn.Linear
    weight, training = module.weight, module.training
    if weight.is_meta or is_distributed(weight):
        # without values: a checkpoint that names such a layer was made of one with values
        return weight.is_meta
    with torch.no_grad(), suppress(Exception):
        x = torch.linspace(-1.0, 1.0, 4 * module.in_features, device=weight.device).view(2, 2, -1).to(weight.dtype)
        expected = nn.functional.linear(x, weight, module.bias)
        found = [kind.forward(module.train(mode), x) for mode in (not training, training)]
        bound = max(4 * torch.finfo(weight.dtype).eps, 1e-5) * expected.abs().max()
        return all(y.shape == expected.shape and (y - expected).abs().max() <= bound for y in found)
    module.training = training
    return False


def _is_dense(parts: list[nn.Module]) -> bool:
    return all(type(part) is nn.Linear for part in parts)


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put a replacement wherever a module with that id stands, under every name it has, with accelerate's hook."""
    for module in list(model.modules()):
        if id(module) in replacements:
            replacement = replacements[id(module)]
            if hasattr(module, "_hf_hook"):
                # accelerate has made the hook, so it is there; the hook moves to its device what is not there
                from accelerate.hooks import add_hook_to_module

                logits = getattr(replacement, "logits", None)
                add_hook_to_module(replacement, module._hf_hook)
                if logits is not None:
                    replacement.logits = logits
            kind = getattr(module, BUILT_AS, None)
            if kind is not None and not isinstance(replacement, kind):
                setattr(replacement, BUILT_AS, kind)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


def adapter_modules(model: nn.Module) -> set[str]:
    """Names of the modules within peft's layers, but for the base layers that these stand in for."""
    names = set()
    for name, layer in model.named_modules():
        # of a module that is trained as a whole, the copy that learns
        saved = "original_module" if _of_peft(layer, "AuxiliaryTrainingWrapper") else None
        base = "base_layer" if _has_adapters(layer) else saved
        if base is not None:
            own = (child for child, _ in layer.named_modules() if child and child.split(".")[0] != base)
            names |= {f"{name}.{child}" if name else child for child in own}
    return names


def refuse_merging(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Have peft's layers refuse to merge into base layers of these kinds: the sum would lose the pattern.

    Where a base layer is of another kind again, they merge as before.
    """
    for name, layer in model.named_modules():
        if _has_adapters(layer):
            sparse = isinstance(layer.get_base_layer(), kinds)
            for method in ("merge", "unmerge"):
                layer.__dict__.pop(method, None)
                if sparse:
                    setattr(layer, method, partial(_refuse, method, name))


def fit_adapters(model: nn.Module) -> None:
    """Have adapters merge as their base layers store weights now, which may have changed: transposed, or not."""
    for layer in model.modules():
        if _has_adapters(layer) and hasattr(layer, "fan_in_fan_out"):
            layer.fan_in_fan_out = is_conv1d(layer.get_base_layer())


def check_not_merged(model: nn.Module) -> None:
    """Raise ValueError if an adapter is merged into its base layer, which could not be undone under a mask."""
    for name, layer in model.named_modules():
        if _has_adapters(layer) and layer.merged:
            raise ValueError(
                f"model: expected adapters that are not merged, got a merged one in {name}; unmerge it first"
            )


def _refuse(method: str, name: str, *_, **__) -> None:
    raise ValueError(
        f"{method}: expected a dense base layer, got a masked or packed one{f' in {name}' if name else ''}, whose "
        "pattern the sum would not follow; put the adapter beside the dense export, which finalize gives, merge there, "
        "and call the restore of a KeptZeros that was made before"
    )


def _has_adapters(layer: nn.Module) -> bool:
    return _of_peft(layer, "BaseTunerLayer")


def _of_peft(layer: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.split(".")[0] == "peft" for kind in type(layer).__mro__)
