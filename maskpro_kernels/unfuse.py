"""Turn modules with their own matrices into nn.Linear layers (unfuse), and back (fuse).

Masks are learned on nn.Linear layers. Some modules store matrices in another way: transposed (``Conv1DForm``), or all
experts of a mixture in one parameter (``ExpertsForm``). They are unfused into nn.Linear layers, and fused again for a
dense checkpoint, which then has the original names and shapes. For a new form, write a class like those and add it to
``FORMS``.

This file also replaces modules of a model, with adapters of peft too, whose layers are recognised without its import.
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

from .fsdp import reshard
from .shards import is_distributed

# Attribute of a layer that replaces a module of another class: this class
BUILT_AS = "built_as"
# Reason why a layer inside an adapter gets no mask
ADAPTER = "adapter of peft"
# Attributes that transformers' decorator adds to experts
MARKS = ("is_transposed", "has_gate", "_apply_gate", "num_experts", "config")
CHILD = "linears"
# Names of the two matrices whose rows a parameter has, one after the other
HALVES = {"gate_up_proj": ("gate_proj", "up_proj")}
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
HOOKS = "has hooks, which its replacement would lose"
OWN_FORWARD = "has a forward of its own, which its replacement would lose"


class Views:
    """Parameters that are views of others, one for each part; shared parameters have shared views."""

    def __init__(self):
        self._views: dict[tuple[int, Hashable], tuple[nn.Parameter, nn.Parameter]] = {}

    def of(self, parameter: nn.Parameter, part: Hashable, view: Callable[[Tensor], Tensor]) -> nn.Parameter:
        """Return ``view(parameter)``, a leaf with the parameter's memory; equal calls return the same object."""
        # keep the parameter too, so that no other gets its id; views of `detach` would share a version counter, and a
        # step that changes one in backward would make autograd refuse the others
        _, result = self._views.setdefault(
            (id(parameter), part), (parameter, nn.Parameter(view(parameter.data), parameter.requires_grad))
        )
        return result


class Joins:
    """Parameters that are joined from several; shared parameters have shared results."""

    def __init__(self):
        self._joined: dict[tuple[int, ...], nn.Parameter] = {}

    def of(self, parameters: list[nn.Parameter], join: Callable[[list[Tensor]], Tensor]) -> nn.Parameter:
        """Return ``join(parameters)``, frozen if all are; equal calls return the same object."""
        key = tuple(map(id, parameters))
        if key not in self._joined:
            tensor = join([parameter.detach() for parameter in parameters])
            self._joined[key] = nn.Parameter(tensor, any(parameter.requires_grad for parameter in parameters))
        return self._joined[key]


class Form:
    """One kind of module, fused and unfused.

    Attributes:
        in_place: true if the module itself changes and keeps its hooks; else it is replaced.
        by_forward: true if an adapter of peft on it only needs its forward.

    Other methods of a form:
        is_built(module): whether it is such a module, fused.
        matrices(module): functions that return its matrices as views [..., K], by names of its parameters.
        unfuse(module, views): (its replacement, or the module itself; a function that undoes the change).
        parts(module): the nn.Linear layers, or their replacements, of an unfused module; None for others.
        fuse(module, joins): the fused module, from nn.Linear layers.
    """

    in_place = by_forward = False

    def reason_against(self, module: nn.Module) -> str | None:
        """Reason why a module of this kind cannot be unfused; None if it can."""
        return None


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, with a transposed weight; transformers is not imported."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def linear(weight: nn.Parameter, bias: nn.Parameter | None, training: bool) -> nn.Linear:
    """Make an nn.Linear with these parameters."""
    rows, k = weight.shape
    layer = nn.Linear(k, rows, bias=bias is not None, device="meta")
    layer.weight = weight
    layer.bias = bias
    return layer.train(training)


class Conv1DForm(Form):
    """transformers' Conv1D, of models like GPT-2: an nn.Linear whose weight is stored transposed, [K, out].

    Its replacement has its name, and shares its memory by a transposed view. The original class is an attribute of the
    layer, which ``replace_modules`` copies.
    """

    by_forward = True

    def is_built(self, module: nn.Module) -> bool:
        return is_conv1d(module)

    def matrices(self, module: nn.Module) -> dict[str, Callable[[], Tensor]]:
        return {"weight": lambda: module.weight.T}

    def unfuse(self, module: nn.Module, views: Views) -> tuple[nn.Module, Callable[[], None]]:
        layer = linear(views.of(module.weight, "transposed", lambda weight: weight.T), module.bias, module.training)
        setattr(layer, BUILT_AS, type(module))
        return layer, lambda: None

    def parts(self, module: nn.Module) -> list[nn.Module] | None:
        return [module] if hasattr(module, BUILT_AS) else None

    def fuse(self, module: nn.Module, joins: Joins) -> nn.Module:
        rows, k = module.weight.shape
        with torch.device("meta"):
            built = getattr(module, BUILT_AS)(rows, k)
        built.weight = joins.of([module.weight], lambda weights: weights[0].T.contiguous())
        built.bias = module.bias
        return built.train(module.training)


class ExpertLinears(nn.ModuleDict):
    """The layers [out, K] of all experts, a list for each matrix, by its name.

    ``sources`` has the names of a parameter's lists; ``config`` is the original one of the experts.
    """

    def __init__(self, lists: dict[str, nn.ModuleList], sources: dict[str, tuple[str, ...]], config):
        super().__init__(lists)
        self.sources = sources
        self.config = config

    def of(self, parameter: str) -> list[nn.ModuleList]:
        return [self[name] for name in self.sources[parameter]]


class ExpertWeights:
    """Replacement of the parameter of all experts."""

    # else transformers would initialize it randomly
    _is_hf_initialized = True

    def __init__(self, lists: list[nn.ModuleList]):
        self.lists = lists

    def __getitem__(self, expert) -> ExpertWeight:
        return ExpertWeight([layers[int(expert)] for layers in self.lists])


class ExpertWeight:
    """Replacement of one expert's matrix in a product, which its layers compute."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if len(args) >= 2 and isinstance(args[1], cls) and not kwargs:
            x, weight, *bias = args
            # a weight [out, K] in a linear product, [K, out] in another one; a layer computes both
            if func is nn.functional.linear or (func in PRODUCTS and not bias):
                outputs = [layer(x) for layer in weight.layers]
                y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
                return y + bias[0] if bias and bias[0] is not None else y
        raise TypeError(f"experts: expected a product with the matrix of one, got {getattr(func, '__name__', func)}")


class Fusion(NamedTuple):
    """Layout of experts' matrices in a parameter.

    Attributes:
        parts: number of matrices whose rows an expert has, one after the other.
        transposed: true if it is [experts, K, out]; else it is [experts, out, K].
    """

    parts: int
    transposed: bool

    def apart(self, fused: Tensor) -> Tensor:
        """Return a view [parts, experts, out / parts, K]."""
        rows = 2 if self.transposed else 1
        single = fused.unflatten(rows, (self.parts, -1)).movedim(rows, 0)
        return single.mT if self.transposed else single

    def together(self, single: Sequence[Tensor]) -> Tensor:
        """Join matrices in a new tensor; they are in the order of parts, then of experts."""
        experts = len(single) // self.parts
        rows, k = single[0].shape
        first = single[0]
        shape = (experts, k, self.parts * rows) if self.transposed else (experts, self.parts * rows, k)
        fused = torch.empty(shape, dtype=first.dtype, device=first.device)
        views = self.apart(fused)
        for place, matrix in enumerate(single):
            views[divmod(place, experts)].copy_(matrix)
        return fused


def _fusion(module: nn.Module, name: str) -> Fusion:
    """Layout of a parameter of experts."""
    halves = name in HALVES and module.has_gate and _gate_is_first(module)
    return Fusion(len(HALVES[name]) if halves else 1, module.is_transposed)


@torch.no_grad()
def _gate_is_first(module: nn.Module) -> bool:
    """Return whether all outputs of the gate come before those of up; else they alternate.

    Not every transformers has a flag for it. If they alternate, the first result depends on the second of four outputs.
    """
    first, second = module._apply_gate(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0]], device="cpu"))
    return bool(first[0] == second[0])


class ExpertsForm(Form):
    """transformers' experts of a mixture: one parameter [experts, out, K] for all matrices.

    Their eager forward multiplies by one expert's matrix after the other, ``linear(x, self.gate_up_proj[expert])`` or,
    for parameters [experts, K, out], ``x @ self.gate_up_proj[expert]``. ``ExpertWeights`` replaces the parameter, and
    the expert's layers compute the product: one layer, or two if gate's rows come before those of up. The module of
    experts remains, runs eagerly, and has the layers in its child ``linears``.
    """

    in_place = True

    def is_built(self, module: nn.Module) -> bool:
        return all(hasattr(module, mark) for mark in MARKS) and bool(self._fused(module))

    def _fused(self, module: nn.Module) -> dict[str, nn.Parameter]:
        parameters = module.named_parameters(recurse=False)
        # if they are distributed over ranks, it counts those of one
        spread = getattr(module, "_is_expert_parallel", False)
        return {name: x for name, x in parameters if x.dim() == 3 and (spread or len(x) == module.num_experts)}

    def reason_against(self, module: nn.Module) -> str | None:
        if getattr(module, "_is_expert_parallel", False):
            return "its experts are distributed over devices"
        fused = self._fused(module)
        parameter = next(iter(fused.values()))
        # without values on meta: it was tested when the checkpoint was made
        if parameter.is_meta:
            return None
        # ``ExpertWeights`` must give the same output for one token of one expert
        with torch.no_grad(), suppress(Exception):
            token = parameter.new_ones(1, parameter.shape[1 if module.is_transposed else 2])
            call = token, torch.zeros(1, 1, dtype=torch.int64, device=token.device), token[:, :1]
            expected = type(module).forward.__wrapped__(module, *call)
            undo = self._unfuse(module, fused, Views())
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

    def unfuse(self, module: nn.Module, views: Views) -> tuple[nn.Module, Callable[[], None]]:
        return module, self._unfuse(module, self._fused(module), views)

    def _unfuse(self, module: nn.Module, fused: dict[str, nn.Parameter], views: Views) -> Callable[[], None]:
        config = module.config
        training = module.training
        before = dict(module._parameters)
        lists = {}
        sources = {}
        for name, parameter in fused.items():
            fusion = _fusion(module, name)

            def layer(part: int, expert: int, parameter=parameter, fusion=fusion) -> nn.Linear:
                view = views.of(parameter, (fusion, part, expert), lambda fused: fusion.apart(fused)[part, expert])
                return linear(view, None, training)

            sources[name] = (name,) if fusion.parts == 1 else HALVES[name]
            for part, source in enumerate(sources[name]):
                lists[source] = nn.ModuleList([layer(part, expert) for expert in range(len(parameter))])
        linears = ExpertLinears(lists, sources, config).train(training)
        for name in fused:
            del module._parameters[name]
            setattr(module, name, ExpertWeights(linears.of(name)))
        setattr(module, CHILD, linears)
        # all other implementations of experts use the parameter as a whole
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
        if not isinstance(lists, ExpertLinears):
            return None
        return [layer for layers in lists.values() for layer in layers]

    def fuse(self, module: nn.Module, joins: Joins) -> nn.Module:
        linears = self._remove_layers(module)
        for name in linears.sources:
            weights = [layer.weight for layer in chain(*linears.of(name))]
            module.register_parameter(name, joins.of(weights, _fusion(module, name).together))
        return module


def expert_groups(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """For each layer of an expert, the layers of all experts from the same parameter; none is an input of another."""
    expert_linears = [module for module in model.modules() if isinstance(module, ExpertLinears)]
    groups = (tuple(chain(*linears.of(name))) for linears in expert_linears for name in linears.sources)
    return {layer: layers for layers in groups for layer in layers}


FORMS: tuple[Form, ...] = (Conv1DForm(), ExpertsForm())


def as_linears(model: nn.Module, names: Collection[str] | None = None) -> dict[str, str]:
    """Unfuse modules into nn.Linear layers, in place, which share the memory of the original parameters.

    Outputs of the model do not change, up to the rounding of products. Experts run one after the other. Call
    ``as_built`` before a checkpoint of a dense model is written.

    Args:
        model: contains the modules; is none of them itself.
        names: names of the modules to unfuse. Default: all that can be.

    Returns:
        Names of modules that cannot be unfused, each with the reason.

    Raises:
        ValueError: if a module in ``names`` cannot be unfused. The model does not change.
    """
    return _unfuse(model, names)[0]


# (form, original module, its replacement or itself, function that undoes a change of the module itself)
Done = tuple[Form, nn.Module, nn.Module, Callable[[], None]]


def _unfuse(model: nn.Module, names: Collection[str] | None) -> tuple[dict[str, str], list[Done]]:
    candidates = {
        name: (form, module)
        for name, module in model.named_modules()
        if name
        for form in FORMS
        if form.is_built(module)
    }
    beside = {layer.get_base_layer() for layer in model.modules() if _has_adapters(layer)}
    # so that parameters of FSDP2 are DTensors
    reshard(model)
    reasons = {name: _reason_against(form, module, beside) for name, (form, module) in candidates.items()}
    against = {name: reason for name, reason in reasons.items() if reason}
    for name in names or ():
        if name not in candidates or name in against:
            raise ValueError(
                f"names: expected modules that can be unfused, got {name!r}: {against.get(name, 'it is none')}"
            )
    done: list[Done] = []
    views = Views()
    try:
        for name, (form, module) in candidates.items():
            if name not in against and (names is None or name in names):
                after, undo = form.unfuse(module, views)
                done.append((form, module, after, undo))
        replace_modules(model, {id(before): after for _, before, after, _ in done if after is not before})
    except BaseException:
        _undo(model, done)
        raise
    return against, done


def _undo(model: nn.Module, done: list[Done]) -> None:
    """Restore the original modules and parameters, except of modules with sparse layers."""
    back = {}
    for form, before, after, undo in done:
        if _is_dense(form.parts(after)):
            undo()
            if after is not before:
                back[id(after)] = before
    replace_modules(model, back)


@contextmanager
def in_linear_form(model: nn.Module) -> Iterator[dict[str, str]]:
    """Unfuse a model for a while; modules without sparse layers at the end get their original parameters back.

    Weights may be changed in place, but not moved or cast. Yields the names of modules that cannot be unfused, each
    with the reason.
    """
    against, done = _unfuse(model, None)
    try:
        yield against
    finally:
        _undo(model, done)


def as_built(model: nn.Module) -> None:
    """Fuse unfused modules whose layers are all nn.Linear, in place, with new parameters."""
    back = {}
    joins = Joins()
    for _, form, module in list(_unfused(model)):
        if _is_dense(form.parts(module)):
            built = form.fuse(module, joins)
            if built is not module:
                back[id(module)] = built
    replace_modules(model, back)


class Matrix(NamedTuple):
    """A parameter of a model that can have a mask.

    Attributes:
        module: module with the parameter.
        get: returns the current parameter as a view [..., K].
    """

    module: nn.Module
    get: Callable[[], Tensor]


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Matrices of nn.Linear layers and of modules that can be unfused, by names of the parameters."""
    by_name = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Linear):
            by_name[f"{prefix}weight"] = Matrix(module, partial(getattr, module, "weight"))
        for form in FORMS:
            if form.is_built(module):
                for parameter_name, get in form.matrices(module).items():
                    by_name[f"{prefix}{parameter_name}"] = Matrix(module, get)
    return by_name


def unfused_modules(model: nn.Module) -> list[str]:
    return [name for name, _, _ in _unfused(model)]


def _unfused(model: nn.Module) -> Iterator[tuple[str, Form, nn.Module]]:
    for name, module in model.named_modules():
        for form in FORMS:
            if form.parts(module) is not None:
                yield name, form, module


def _reason_against(form: Form, module: nn.Module, beside: set[nn.Module]) -> str | None:
    if module in beside and not form.by_forward:
        return "an adapter of peft reads its parameters"
    if any(map(is_distributed, module.parameters(recurse=False))):
        return "its parameter is split over ranks: convert it before fully_shard"
    lost = lost_with(module)
    return form.reason_against(module) or (None if form.in_place and lost == HOOKS else lost)


def lost_with(module: nn.Module) -> str | None:
    """Reason why a module should not be replaced: hooks, or its own forward; accelerate's are kept."""
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        return OWN_FORWARD
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return HOOKS if any(getattr(module, name) for name in names) else None


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is nn.Linear, or a subclass with only its own forward, of x W^T + b, like Falcon's."""
    kind = type(module)
    if kind is nn.Linear:
        return True
    if kind.__base__ is not nn.Linear or {name for name in vars(kind) if name[:2] != "__"} != {"forward"}:
        return False
    # transformers and accelerate add some
    usual = {*vars(nn.Linear(1, 1, device="meta")), "_is_hf_initialized", "_hf_hook", "_old_forward", "forward"}
    if vars(module).keys() - usual or module._buffers or module._modules:
        return False
    if {*module._parameters} != {"weight", "bias"}:
        return False
    weight = module.weight
    if weight.is_meta or is_distributed(weight):
        # no values to test: the layer was tested when its checkpoint was made
        return weight.is_meta
    with torch.no_grad(), suppress(Exception):
        x = torch.linspace(-1.0, 1.0, 4 * weight.shape[1], device=weight.device).view(2, 2, -1)
        # float32, whose rounding cannot hide a factor near 1
        both = [p if p is None else nn.Parameter(p.float()) for p in (weight, module.bias)]
        layer = linear(*both, training=True)
        expected = nn.functional.linear(x, *both)
        layer.__class__ = kind
        outputs = [layer.train(mode).forward(x) for mode in (True, False)]
        bound = 1e-5 * expected.abs().max()
        return all(output.shape == expected.shape and (output - expected).abs().max() <= bound for output in outputs)
    return False


def _is_dense(layers: list[nn.Module]) -> bool:
    return all(type(layer) is nn.Linear for layer in layers)


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Replace modules by id, under each of their names, with accelerate's hooks."""
    for module in list(model.modules()):
        if id(module) in replacements:
            replacement = replacements[id(module)]
            if hasattr(module, "_hf_hook"):
                # the hook is accelerate's, so accelerate is installed; the hook moves tensors to its device
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
    """Names of the modules inside peft's layers, except their base layers."""
    names = set()
    for name, layer in model.named_modules():
        # a copy learns of a module that is trained as a whole
        saved = "original_module" if _of_peft(layer, "AuxiliaryTrainingWrapper") else None
        base = "base_layer" if _has_adapters(layer) else saved
        if base is not None:
            inner_names = (child for child, _ in layer.named_modules() if child and child.split(".")[0] != base)
            names |= {f"{name}.{child}" if name else child for child in inner_names}
    return names


def refuse_merging(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Let peft's layers refuse to merge into base layers of these kinds: the sum would not follow the pattern.

    Layers whose base has another kind again can merge again.
    """
    for name, layer in model.named_modules():
        if _has_adapters(layer):
            sparse = isinstance(layer.get_base_layer(), kinds)
            for method in ("merge", "unmerge"):
                layer.__dict__.pop(method, None)
                if sparse:
                    setattr(layer, method, partial(_refuse, method, name))


def fit_adapters(model: nn.Module) -> None:
    """Let adapters merge in the current layout of their base layers' weights: transposed or not."""
    for layer in model.modules():
        if _has_adapters(layer) and hasattr(layer, "fan_in_fan_out"):
            layer.fan_in_fan_out = is_conv1d(layer.get_base_layer())


def check_not_merged(model: nn.Module) -> None:
    """Raise ValueError if an adapter is merged into its base layer: a masked layer could not undo this."""
    for name, layer in model.named_modules():
        if _has_adapters(layer) and layer.merged:
            raise ValueError(
                f"model: expected adapters that are not merged, got a merged one in {name}; unmerge it first"
            )


def _refuse(method: str, name: str, *_, **__) -> None:
    raise ValueError(
        f"{method}: expected a dense base layer, got a masked or packed one{f' in {name}' if name else ''}, whose "
        "pattern the sum would not follow; add the adapter to the dense model of finalize, merge there, and call the "
        "restore of a KeptZeros that was made before"
    )


def _has_adapters(layer: nn.Module) -> bool:
    return _of_peft(layer, "BaseTunerLayer")


def _of_peft(layer: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.split(".")[0] == "peft" for kind in type(layer).__mro__)
