"""A model taken apart, all of it or what is named, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from ..fsdp import is_distributed, resharded
from ..replacement import base_layers, replace_modules
from .experts import ExpertsForm
from .form import Conv1DForm, Form, Joins, Views

HOOKS = "has hooks, which its replacement would lose"
OWN_FORWARD = "has a forward of its own, which its replacement would lose"

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
    against, _ = _take_apart(model, names)
    return against


# (form, module as it was, what stands for it now, what undoes a change of the module itself)
Done = tuple[Form, nn.Module, nn.Module, Callable[[], None]]


def _take_apart(model: nn.Module, names: Collection[str] | None) -> tuple[dict[str, str], list[Done]]:
    found = {name: (form, module) for name, module in model.named_modules() if name for form in _built(module)}
    beside = set(base_layers(model))
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
        for form in _built(module):
            found |= {f"{prefix}{own}": Matrix(module, get) for own, get in form.matrices(module).items()}
    return found


def taken_apart(model: nn.Module) -> list[str]:
    """Names of the modules of a model that are taken apart."""
    return [name for name, _, _ in _taken_apart(model)]


def _taken_apart(model: nn.Module) -> Iterator[tuple[str, Form, nn.Module]]:
    for name, module in model.named_modules():
        for form in FORMS:
            if form.parts(module) is not None:
                yield name, form, module


def _built(module: nn.Module) -> Iterator[Form]:
    return (form for form in FORMS if form.is_built(module))


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


def _is_dense(parts: list[nn.Module]) -> bool:
    return all(type(part) is nn.Linear for part in parts)
